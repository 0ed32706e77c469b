"""Fisher merging: entries of the deltas averaged with the information that each task's data have on them.

Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, arXiv 2111.09832, equation
(4) and section 3.2: ``D = sum_i F_i * D_i / sum_i F_i`` entry by entry, ``F_i`` the diagonal of task i's
Fisher information, divided by its norm, module by module, so that no task outweighs the others. The base
weight is common to all tasks, so averaging deltas is averaging weights. Sums go over the kept tasks.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from enmp_jax.deltas import Dense
from enmp_jax.merges.base import LayerInputs, LayerMethod

_FLOOR = 1e-6  # of the mean information: entries of which no task knows anything get their plain mean


class _Ingredients(NamedTuple):
    deltas: Float[Array, "task out in"]
    fisher: Float[Array, "task out in"]


def fisher(space: str = "full") -> LayerMethod:
    """Fisher-weighted average; needs ``statistics`` of kind fisher.

    Dense: export as a PEFT adapter is cut to a rank.

    Args:
        space: full only.
    """

    def prepare(inputs: LayerInputs) -> _Ingredients:
        assert inputs.statistics is not None
        found = jnp.asarray(inputs.statistics, inputs.a.dtype)
        norm = jnp.sqrt(jnp.sum(found**2, axis=(1, 2), keepdims=True))
        found = found / jnp.where(norm > 0, norm, 1)
        return _Ingredients(jnp.matmul(inputs.b, inputs.a), found + _FLOOR * jnp.mean(found))

    def merge(x: _Ingredients, weights: Float[Array, " task"]) -> Dense:
        total = jnp.einsum("t,tij->ij", weights, x.fisher)
        found = jnp.einsum("t,tij,tij->ij", weights, x.fisher, x.deltas)
        return Dense(found / jnp.where(total > 0, total, 1))

    return LayerMethod(prepare, merge, sequential=True, statistics="fisher")
