"""Iso-CTS: isotropic merging in common and task-specific subspaces.

Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
Subspaces", ICML 2025, algorithm 2. The paper merges full-rank task matrices; here the rank that is
shared out is that of the kept adapters together, ``R = min(out, in, sum of their ranks)``. Not in
the reference.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from enmp_jax.merges.base import LayerMethod
from enmp_jax.merges.hyperparameters import Share
from enmp_jax.merges.linalg import svd
from enmp_jax.merges.spaces import Coordinates, MatrixMethod, Size, matrix_method_in_space
from enmp_jax.merges.spectral import polar


def iso_cts(space: str = "full", common_fraction: Share = 0.8) -> LayerMethod:
    """Iso-CTS: ``sigma * polar([U_common U_1 .. U_T]) polar([V_common V_1 .. V_T])^T``.

    The common subspace holds the ``k = round(common_fraction * R)`` largest triplets of the sum;
    each of the n kept tasks adds ``(R - k) // n`` triplets of its delta, projected off the common left
    vectors. ``sigma`` is the mean of all their singular values. Under a relaxed mask the subspaces
    are those of the tasks with weight above zero, and weights act on the tasks' own parts.
    Low-rank: export as a PEFT adapter is exact.

    Args:
        space: full or core, which give the same delta.
        common_fraction: share of the common subspace (0.8 in the paper).
    """

    def combine(x: Coordinates, weights: Float[Array, " task"], size: Size) -> Float[Array, "p q"]:
        kept = jax.lax.stop_gradient((weights > 0).astype(weights.dtype))
        matrices = x.matrices() * kept[:, None, None]
        rank = size.lookup(min)
        common = size.lookup(lambda rows, columns: round(common_fraction * min(rows, columns)))
        own = (rank - common) // jnp.maximum(jnp.sum(kept).astype(jnp.int32), 1)

        u, s, v = _leading(matrices.sum(0), common)
        projected = matrices - u @ (u.T @ matrices)
        us, ss, vs = jax.vmap(_leading, (0, None))(projected, own)
        most = min(x.left.shape[2], s.shape[0])  # a task has no more triplets than its rank
        us, ss, vs = us[:, :, :most], ss[:, :most], vs[:, :, :most]

        n_own = jnp.sum(ss > 0, axis=1)
        count = jnp.sum(s > 0) + jnp.sum(n_own)
        sigma = (jnp.sum(s) + jnp.sum(ss * weights[:, None])) / jnp.maximum(count, 1)
        left = jnp.concatenate([u, jnp.moveaxis(us, 0, 1).reshape(u.shape[0], -1)], axis=1)
        right = jnp.concatenate([v, jnp.moveaxis(vs, 0, 1).reshape(v.shape[0], -1)], axis=1)
        gain = jnp.concatenate([jnp.ones_like(s), jnp.repeat(weights, most)])
        return sigma * (polar(left) * gain) @ polar(right).T

    # the core space's size is the rank R that is shared out
    return matrix_method_in_space("core", MatrixMethod(lambda x: x, combine), sequential=True)


def _leading(
    matrix: Float[Array, "p q"], count: Int[Array, ""]
) -> tuple[Float[Array, "p k"], Float[Array, " k"], Float[Array, "q k"]]:
    """The first ``count`` singular triplets; zeros beyond, and where the singular value is zero."""
    u, s, vt = svd(matrix)
    noise = 10 * jnp.finfo(s.dtype).eps * s[0]
    kept = (jnp.arange(s.shape[0]) < count) & (s > noise)
    return jnp.where(kept, u, 0), jnp.where(kept, s, 0), jnp.where(kept[:, None], vt, 0).T
