"""What merging adds to the base weights, as pytrees that models apply and exporters write.

This is where merges and models meet: a merge returns ``Deltas``, a backbone takes them.
"""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from enmp_jax.devices.matmul import times_transposed


@flax.struct.dataclass
class LowRank:
    """``left @ core @ right``. Only ``core`` depends on the mask, so only it has a population axis.

    ``right`` is None where the core reaches all inputs itself (entrywise methods in the KnOTS space).
    """

    left: Float[Array, "*layer out k"]
    core: Float[Array, "*member k j"]
    right: Float[Array, "*layer j in"] | None

    def apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """``x @ delta.T`` without forming the delta (one layer, no leading axes)."""
        factors = (self.core, self.left) if self.right is None else (self.right, self.core, self.left)
        for factor in factors:
            x = times_transposed(x, factor.astype(x.dtype))
        return x

    def materialise(self) -> Float[Array, "*member out in"]:
        """The full matrices."""
        return jnp.matmul(self.left, _inner(self), precision="highest")

    @property
    def max_rank(self) -> int:
        """Upper bound on the rank of each matrix."""
        return min(self.core.shape[-2:])


@flax.struct.dataclass
class Dense:
    """A delta without useful low-rank structure (entrywise methods in full space)."""

    weight: Float[Array, "*member out in"]

    def apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """``x @ delta.T`` (one layer, no leading axes)."""
        return times_transposed(x, self.weight.astype(x.dtype))

    def materialise(self) -> Float[Array, "*member out in"]:
        """The full matrices."""
        return self.weight

    @property
    def max_rank(self) -> int:
        """Upper bound on the rank of each matrix."""
        return min(self.weight.shape[-2:])


Delta = LowRank | Dense
Deltas = dict[str, Delta]  # name template (see LoraStack) -> delta with a leading layer axis


def _inner(delta: LowRank) -> Float[Array, "*member k in"]:
    """The core with the right factor taken in."""
    return delta.core if delta.right is None else jnp.matmul(delta.core, delta.right, precision="highest")


def scale_delta(delta: Delta, scale: Float[Array, ""] | float) -> Delta:
    """``scale * delta``, on the part that depends on the mask."""
    if isinstance(delta, LowRank):
        return LowRank(delta.left, delta.core * jnp.asarray(scale, delta.core.dtype), delta.right)
    return Dense(delta.weight * jnp.asarray(scale, delta.weight.dtype))


def add_deltas(a: Deltas, b: Deltas) -> Deltas:
    """The sum of two merges. Low-rank deltas stay low-rank, their ranks added up; others become full."""

    def one(x: Delta, y: Delta) -> Delta:
        if isinstance(x, Dense) or isinstance(y, Dense):
            return Dense(x.materialise() + y.materialise())
        if x.right is None or y.right is None:
            # a core that reaches all inputs itself takes the right factor in
            inner = [
                d.core if d.right is None else jnp.matmul(d.core, d.right, precision="highest")
                for d in (x, y)
            ]
            return LowRank(jnp.concatenate([x.left, y.left], axis=-1), jnp.concatenate(inner, axis=-2), None)
        (m, n), (p, q) = x.core.shape[-2:], y.core.shape[-2:]
        core = jnp.zeros((*x.core.shape[:-2], m + p, n + q), x.core.dtype)
        core = core.at[..., :m, :n].set(x.core).at[..., m:, n:].set(y.core)
        left = jnp.concatenate([x.left, y.left], axis=-1)
        return LowRank(left, core, jnp.concatenate([x.right, y.right], axis=-2))

    return {
        name: one(a[name], b[name]) if name in a and name in b else a.get(name, b.get(name))
        for name in sorted({*a, *b})
    }  # type: ignore[return-value]


def member_axes(delta: Delta, axis: int = 0) -> Delta:
    """Where the population axis goes, for ``in_axes`` / ``out_axes`` of ``jax.vmap``.

    The same kind of delta with ``axis`` at ``core`` or ``weight`` and None at what members share.
    """
    if isinstance(delta, LowRank):
        return LowRank(None, axis, None)  # pyright: ignore[reportArgumentType]
    return Dense(axis)  # pyright: ignore[reportArgumentType]


def n_bytes(delta: Delta) -> int:
    """Bytes held by a delta, all its axes included."""
    leaves = (delta.left, delta.core, delta.right) if isinstance(delta, LowRank) else (delta.weight,)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf is not None)
