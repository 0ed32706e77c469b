"""Pico: directions that the output sides B of many adapters share are damped before the merge.

Tang and Yang, "Crowded in B-Space: Calibrating Shared Directions for LoRA Merging", arXiv 2604.16826, section
4. With ``[B_1 .. B_T] = U diag(s) V^T``, ``share_j = s_j^2 / sum s^2``, ``a_j = 1 / (1 + (T - 1) share_j)``
the calibrated sides are ``S B_i``, ``S = I + U diag(a - 1) U^T``; that is ``(I + c M)^-1`` with
``M = sum_i B_i B_i^T`` and ``c = (T - 1) / trace M``, and needs no SVD. The merge here is the paper's task
arithmetic, the mean of ``S B_i A_i``, stretched to the mean Frobenius norm of the tasks' deltas. B holds
alpha / r.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from enmp_jax.deltas import LowRank
from enmp_jax.merges.base import LayerInputs, LayerMethod
from enmp_jax.merges.spaces import QrFactors, qr_factors


class _Ingredients(NamedTuple):
    factors: QrFactors
    cores: Float[Array, "task p q"]


def pico(space: str = "full") -> LayerMethod:
    """Pico with task arithmetic.

    Low-rank: export as a PEFT adapter is exact.

    Args:
        space: full or core, which give the same.
    """

    def prepare(inputs: LayerInputs) -> _Ingredients:
        factors = qr_factors(inputs)
        return _Ingredients(factors, jnp.matmul(factors.left, factors.right))

    def merge(x: _Ingredients, weights: Float[Array, " task"]) -> LowRank:
        count = jnp.sum(weights)
        shares = weights / jnp.where(count > 0, count, 1)
        moment = jnp.einsum("t,tpr,tqr->pq", weights, x.factors.r_b, x.factors.r_b)
        trace = jnp.trace(moment)
        crowd = (count - 1) / jnp.where(trace > 0, trace, 1)
        mean = _inverse(crowd * moment, weights.shape[0]) @ jnp.einsum("t,tpq->pq", shares, x.cores)
        wanted = jnp.sum(shares * jnp.sqrt(_guarded(jnp.sum(x.cores**2, axis=(1, 2)))))
        size = jnp.sum(mean**2)
        gain = jnp.where(size > 0, wanted / jnp.sqrt(_guarded(size)), 0)
        return LowRank(x.factors.q_b, gain * mean, x.factors.q_a.T)

    return LayerMethod(prepare, merge)


def _guarded(x: Array) -> Array:
    """A number whose root has a derivative; a norm of zero stays far below all others."""
    return jnp.maximum(x, jnp.finfo(x.dtype).tiny)


def _inverse(matrix: Float[Array, "p p"], tasks: int) -> Float[Array, "p p"]:
    """``(I + matrix)^-1`` for a matrix with eigenvalues from 0 to ``tasks - 1``, by Newton's iteration.

    The error is squared in every step; products alone, so that members batch and derivatives pass.
    """
    identity = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    whole = identity + matrix
    error = (tasks - 1) / (tasks + 1)
    exact = math.log(float(jnp.finfo(matrix.dtype).eps) / 10)
    steps = math.ceil(math.log2(exact / math.log(error))) if error else 0

    def step(_: Int[Array, ""] | int, x: Array) -> Array:
        return x @ (2 * identity - whole @ x)

    return jax.lax.fori_loop(0, steps, step, 2 / (tasks + 1) * identity)
