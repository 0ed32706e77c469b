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
        inner = self.core if self.right is None else jnp.matmul(self.core, self.right, precision="highest")
        return jnp.matmul(self.left, inner, precision="highest")

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


def scale_delta(delta: Delta, scale: Float[Array, ""] | float) -> Delta:
    """``scale * delta``, on the part that depends on the mask."""
    if isinstance(delta, LowRank):
        return LowRank(delta.left, delta.core * jnp.asarray(scale, delta.core.dtype), delta.right)
    return Dense(delta.weight * jnp.asarray(scale, delta.weight.dtype))


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
