"""DO-Merging: the tasks' factors made more orthogonal, then lengths and directions of columns merged apart.

Zheng et al., "Decouple and Orthogonalize: A Data-Free Framework for LoRA Merging", arXiv 2505.15875.
Orthogonalise: each side's factors move by a little, ``A_i + d_i``, so that those of different tasks overlap
less, by gradient descent on half of ``sum_(i<j) |A_i A_j^T|^2 + proximity sum_i |d_i|^2``; likewise B's.
Decouple: every column of ``B_i A_i`` is split into length and direction; the merge has the mean of the
lengths times the sum of the directions. The paper leaves scale, step size and number of steps of the descent
open. Here both sides are divided by the root mean square of the kept tasks' norms beforehand, so that
``proximity`` means the same for all adapters, and a step is one over a bound of the curvature.
"""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from enmp_jax.deltas import LowRank
from enmp_jax.merges.base import LayerMethod
from enmp_jax.merges.hyperparameters import Range
from enmp_jax.merges.spaces import QrFactors, qr_factors


def do_merging(
    space: str = "full",
    orthogonal_steps: Annotated[int, Range(0, 1000)] = 20,
    proximity: Annotated[float, Range(0)] = 0.1,
) -> LayerMethod:
    """DO-Merging.

    Low-rank: export as a PEFT adapter is exact.

    Args:
        space: full only.
        orthogonal_steps: steps of the descent that makes factors orthogonal; 0 leaves them as they are.
        proximity: how strongly the factors are held where they were.
    """

    def merge(factors: QrFactors, weights: Float[Array, " task"]) -> LowRank:
        # in coordinates of the bases: [task, rank, side]
        left = jnp.swapaxes(factors.r_b, 1, 2)
        right = jnp.swapaxes(factors.r_a, 1, 2)
        left, right = (_orthogonal(side, weights, orthogonal_steps, proximity) for side in (left, right))
        a = jnp.matmul(right, factors.q_a.T)
        # |column|^2 of B A, by the inner products of the columns of B
        squared = jnp.sum(a * jnp.matmul(jnp.matmul(left, jnp.swapaxes(left, 1, 2)), a), axis=1)
        real = squared > 0
        lengths = jnp.where(real, jnp.sqrt(jnp.where(real, squared, 1)), 0)
        directions = jnp.where(real, weights[:, None] / jnp.where(real, lengths, 1), 0)
        total = jnp.sum(weights)
        mean = weights @ lengths / jnp.where(total > 0, total, 1)
        core = jnp.einsum("trp,trn->pn", left, a * directions[:, None]) * mean
        return LowRank(factors.q_b, core, None)

    return LayerMethod(qr_factors, merge)


def _orthogonal(
    start: Float[Array, "task rank side"], weights: Float[Array, " task"], steps: int, proximity: float
) -> Float[Array, "task rank side"]:
    """Factors whose rows overlap less between tasks."""
    count = jnp.sum(weights)
    mean_square = jnp.sum(weights * jnp.sum(start**2, axis=(1, 2))) / jnp.where(count > 0, count, 1)
    unit = jnp.sqrt(jnp.where(mean_square > 0, mean_square, 1))
    first = start / unit
    # the curvature of the overlaps is at most the sum of the squared norms, twice: once for each of a pair
    step_size = 1 / (2 * count + proximity + (count == 0))

    def step(_: Int[Array, ""] | int, x: Array) -> Array:
        own = jnp.einsum("trp,tsp->trs", x, x)
        everyone = jnp.einsum("t,trp,trq->pq", weights, x, x)
        others = jnp.matmul(x, everyone) - weights[:, None, None] * jnp.matmul(own, x)
        return x - step_size * (others + proximity * (x - first))

    return unit * jax.lax.fori_loop(0, steps, step, first)
