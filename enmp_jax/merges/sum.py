"""Task arithmetic: the sum, or the mean, of the kept deltas.

Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, equation (1). In the reference:
``merge_method`` ``tv`` and ``mean`` of ``MatrixPerLayerMerger._merge_tensors``.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from enmp_jax.deltas import LowRank
from enmp_jax.merges.base import LayerInputs, LayerMethod


class _Ingredients(NamedTuple):
    left: Float[Array, "out k"]
    right: Float[Array, "k in"]


def _prepare(inputs: LayerInputs) -> _Ingredients:
    tasks, out, rank = inputs.b.shape
    left = jnp.moveaxis(inputs.b, 0, 1).reshape(out, tasks * rank)
    return _Ingredients(left, inputs.a.reshape(tasks * rank, -1))


def _merge(ingredients: _Ingredients, weights: Float[Array, " task"]) -> LowRank:
    rank = ingredients.left.shape[1] // weights.shape[0]
    return LowRank(ingredients.left, jnp.diag(jnp.repeat(weights, rank)), ingredients.right)


def sum_(space: str = "full") -> LayerMethod:
    """``sum_i keep_i D_i``: left ``[B_1 .. B_T]``, core ``K``, right ``[A_1; ..; A_T]``.

    Low-rank: export as a PEFT adapter is exact.
    """
    return LayerMethod(_prepare, _merge)


def mean(space: str = "full") -> LayerMethod:
    """``sum_i keep_i D_i / sum_i keep_i``; zero where nothing is kept. Low-rank as the sum is."""

    def merge(ingredients: _Ingredients, weights: Float[Array, " task"]) -> LowRank:
        count = weights.sum()
        return _merge(ingredients, weights / jnp.where(count > 0, count, 1))

    return LayerMethod(_prepare, merge)
