"""TSV-Merge: the tasks' singular vectors, decorrelated, with their own singular values.

Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging", CVPR 2025,
algorithm 1. In the reference: ``get_tsv_delta_w``. With adapters of rank r a task has r triplets,
and all are used. The reference takes ``min(m, n) / T`` triplets in full space, most of them
arbitrary null vectors of a rank-r matrix (its result changes by 71 % under a relative perturbation
of 1e-9); this is the well-defined part.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from enmp_jax.merges.base import LayerMethod
from enmp_jax.merges.linalg import svd
from enmp_jax.merges.spaces import Coordinates, MatrixMethod, Size, matrix_method_in_space
from enmp_jax.merges.spectral import isotropic_product, polar


class Triplets(NamedTuple):
    """Singular triplets of each task; those of singular value zero are zero vectors."""

    u: Float[Array, "task p rank"]
    s: Float[Array, "task rank"]
    v: Float[Array, "task q rank"]


def triplets(x: Coordinates) -> Triplets:
    """SVD of every task; its right factors having orthonormal rows, that of the left ones suffices."""
    u, s, wt = jax.vmap(svd)(x.left)
    kept = s > 10 * jnp.finfo(s.dtype).eps * s[:, :1]
    v = jnp.swapaxes(jnp.matmul(wt, x.right), 1, 2)
    return Triplets(jnp.where(kept[:, None], u, 0), jnp.where(kept, s, 0), jnp.where(kept[:, None], v, 0))


def tsv(space: str = "full") -> LayerMethod:
    """TSV-Merge: ``polar(U K) diag(S K) polar(V K)^T``. Core space gives the same delta as full space.

    Low-rank in every space: export as a PEFT adapter is exact.
    """

    def weighted(
        x: Triplets, weights: Float[Array, " task"]
    ) -> tuple[Float[Array, "p k"], Float[Array, " k"], Float[Array, "q k"]]:
        def side(vectors: Float[Array, "task p rank"]) -> Float[Array, "p k"]:
            scaled = vectors * weights[:, None, None]
            return jnp.moveaxis(scaled, 0, 1).reshape(vectors.shape[1], -1)

        return side(x.u), (x.s * weights[:, None]).reshape(-1), side(x.v)

    def combine(x: Triplets, weights: Float[Array, " task"], size: Size) -> Float[Array, "p q"]:
        u, s, v = weighted(x, weights)
        return (polar(u) * s) @ polar(v).T

    def combine_isotropic(x: Triplets, weights: Float[Array, " task"], size: Size) -> Float[Array, "p q"]:
        return isotropic_product(*weighted(x, weights))

    return matrix_method_in_space(space, MatrixMethod(triplets, combine, combine_isotropic))
