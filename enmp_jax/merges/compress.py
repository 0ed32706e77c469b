"""Compress, then sum: the adapters in one pair of bases of a fixed rank, so that the merge has that rank.

Brueel-Gabrielsson et al., "Compress then Serve: Serving Thousands of LoRA Adapters with Little Overhead",
arXiv 2407.00066, JD-Full: ``min sum_i |B_i A_i - U C_i V^T|^2`` over orthonormal U and V with r
columns, where ``C_i = U^T B_i A_i V``. U and V are set to the leading left singular vectors of
``[D_1 V .. D_T V]`` and ``[D_1^T U .. D_T^T U]`` in turn. The sum of the compressed adapters is
``U (sum_i C_i) V^T``.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from enmp_jax.deltas import LowRank
from enmp_jax.merges.base import LayerInputs, LayerMethod
from enmp_jax.merges.hyperparameters import Range
from enmp_jax.merges.linalg import svd
from enmp_jax.merges.spaces import QrFactors, qr_factors

_ROUNDS = 5


class _Ingredients(NamedTuple):
    factors: QrFactors
    cores: Float[Array, "task p q"]


def compress(space: str = "full", compressed_rank: Annotated[int, Range(1, 65536)] = 16) -> LayerMethod:
    """The sum of the adapters, compressed to one rank first.

    Export as a PEFT adapter is exact at that rank.

    Args:
        space: full or core, which give the same.
        compressed_rank: rank of the compressed adapters and of their sum.
    """

    def prepare(inputs: LayerInputs) -> _Ingredients:
        factors = qr_factors(inputs)
        return _Ingredients(factors, jnp.matmul(factors.left, factors.right))

    def merge(x: _Ingredients, weights: Float[Array, " task"]) -> LowRank:
        kept = jax.lax.stop_gradient((weights > 0).astype(weights.dtype))
        cores = x.cores * kept[:, None, None]
        left = _leading(x.factors.left * kept[:, None, None], compressed_rank)
        right = _leading(jnp.einsum("tpq,pk->tqk", cores, left), compressed_rank)
        for _ in range(_ROUNDS):
            left = _leading(jnp.matmul(cores, right), compressed_rank)
            right = _leading(jnp.einsum("tpq,pk->tqk", cores, left), compressed_rank)
        middle = left.T @ jnp.einsum("t,tpq->pq", weights, x.cores) @ right
        return LowRank(x.factors.q_b, left @ middle @ right.T, x.factors.q_a.T)

    return LayerMethod(prepare, merge)


def _leading(matrices: Float[Array, "task p k"], rank: int) -> Float[Array, "p j"]:
    """The leading left singular vectors of the matrices side by side, ``rank`` of them at most."""
    return svd(jnp.moveaxis(matrices, 0, 1).reshape(matrices.shape[1], -1))[0][:, :rank]
