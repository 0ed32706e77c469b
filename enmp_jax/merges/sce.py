"""SCE: entries that differ most between tasks are selected, weighted by energy, and minority signs erased.

Wan et al., "FuseChat: Knowledge Fusion of Chat Models", arXiv 2408.07990 (Select, Calculate, Erase), on one
weight matrix at a time as there. Of the entries with the largest variance over tasks a share is kept;
``c_i = |D_i|^2 / sum_j |D_j|^2`` of what is kept; entries against the sign of the sum are erased, and the
others averaged with the weights c_i. mergekit's ``sce`` counts its share from the entries with a variance
above zero; here it is of all.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from enmp_jax.merges.base import LayerMethod
from enmp_jax.merges.entrywise import Combine, Entrywise, Tasks, entrywise_in_space, total
from enmp_jax.merges.hyperparameters import PositiveShare


def sce(space: str = "full", density: PositiveShare = 0.1) -> LayerMethod:
    """SCE.

    Dense in full space, where export as a PEFT adapter truncates; low-rank, and exported exactly, in the
    KnOTS and core spaces.

    Args:
        space: see ``SPACES``.
        density: share of entries selected, those with the largest variance over the tasks (the paper's tau).
    """
    return entrywise_in_space(space, Entrywise(Combine(_energy, _erase), varying=density))


def _energy(x: Tasks, weights: Float[Array, " task"]) -> Float[Array, " task"]:
    return weights * jnp.sum(x * x, axis=(1, 2))


def _erase(
    x: Tasks, weights: Float[Array, " task"], energy: Float[Array, " task"]
) -> Float[Array, "row column"]:
    positive = jax.lax.stop_gradient(total(x, weights)) >= 0
    agrees = jnp.where(positive, x > 0, x < 0).astype(x.dtype)
    whole = total(agrees, energy)
    return jnp.where(whole > 0, total(agrees * x, energy) / jnp.where(whole > 0, whole, 1), 0)
