"""RegMean: the merged layer whose outputs are nearest to those of every task's own, on that task's inputs.

Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023, arXiv 2212.09849,
equation (2) and section 3.3: with ``G_i`` the mean of ``x x^T`` over the inputs of task i, entries off the
diagonal times ``off_diagonal`` (the paper's alpha), ``W^T = (sum_i G_i)^-1 sum_i G_i W_i^T``. Every ``W_i``
is the base weight and a delta, so the deltas are merged in the same way:
``D = (sum_i D_i G_i) (sum_i G_i)^-1``. Sums go over the kept tasks; a pruned module counts with neither its
delta nor its data.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from enmp_jax.deltas import LowRank
from enmp_jax.merges.base import LayerInputs, LayerMethod
from enmp_jax.merges.hyperparameters import ProperShare

_RIDGE = 1e-6  # of every input's variance: fewer examples than inputs, and no task kept


class _Ingredients(NamedTuple):
    left: Float[Array, "out k"]
    right: Float[Array, "task rank in"]  # A_i G_i
    gram: Float[Array, "task in in"]


def regmean(space: str = "full", off_diagonal: ProperShare = 0.9) -> LayerMethod:
    """RegMean; needs ``statistics`` of kind gram.

    Low-rank: export as a PEFT adapter is exact.

    Args:
        space: full only.
        off_diagonal: what entries off the diagonal of the inputs' second moments are multiplied by; less is
            safer with few examples.
    """

    def prepare(inputs: LayerInputs) -> _Ingredients:
        assert inputs.statistics is not None
        tasks, out, rank = inputs.b.shape
        diagonal = jnp.eye(inputs.a.shape[2], dtype=inputs.a.dtype)
        gram = jnp.asarray(inputs.statistics, inputs.a.dtype) * (off_diagonal + (1 - off_diagonal) * diagonal)
        left = jnp.moveaxis(inputs.b, 0, 1).reshape(out, tasks * rank)
        return _Ingredients(left, jnp.matmul(inputs.a, gram), gram)

    def merge(x: _Ingredients, weights: Float[Array, " task"]) -> LowRank:
        total = jnp.einsum("t,tij->ij", weights, x.gram)
        # scaled to a unit diagonal, which rounding bears best; inputs that are always zero stay out
        variance = jnp.diagonal(total)
        size = jnp.sqrt(jnp.where(variance > 0, variance, 1))
        scaled = total / size[:, None] / size + _RIDGE * jnp.eye(len(size), dtype=size.dtype)
        kept = (weights[:, None, None] * x.right).reshape(-1, x.right.shape[2])
        solved = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(scaled), (kept / size).T)
        return LowRank(x.left, solved.T / size, None)

    return LayerMethod(prepare, merge, sequential=True, statistics="gram")
