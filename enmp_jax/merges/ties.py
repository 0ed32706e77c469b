"""TIES: trim each task, elect a sign for each entry, average what agrees with it.

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, section 3.
In the reference: ``ties_merging`` (``merging_functions.py``). Trimming there keeps entries not
below the ``d - int(d * density)``-th smallest magnitude of d; so does this.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from enmp_jax.merges.base import LayerMethod
from enmp_jax.merges.entrywise import Combine, Entrywise, Tasks, entrywise_in_space, total
from enmp_jax.merges.hyperparameters import PositiveShare


def ties(space: str = "full", density: PositiveShare = 0.2) -> LayerMethod:
    """TIES.

    Dense in full space, where export as a PEFT adapter truncates; low-rank, and exported exactly, in the
    KnOTS and core spaces.

    Args:
        space: see ``SPACES``.
        density: share of the largest entries kept of each task (the paper's k, there 20 %).
    """
    return entrywise_in_space(space, Entrywise(elect, largest(density)))


def largest(density: float) -> Callable[[int], tuple[int, int]]:
    """Of d entries the ``int(density * d) + 1`` largest survive, as in the reference."""
    return lambda size: (0, int(size * density) + 1)


def _vote(x: Tasks, weights: Float[Array, " task"]) -> Float[Array, ""]:
    return jax.lax.stop_gradient(jnp.sum(jnp.sign(total(x, weights))))


def _elect(x: Tasks, weights: Float[Array, " task"], votes: Float[Array, ""]) -> Float[Array, "row column"]:
    """Mean of the entries with the elected sign.

    The sign is that of the sum; where that is zero, that of the sum of all signs (``votes``).
    """
    sums = jax.lax.stop_gradient(total(x, weights))
    positive = jnp.where(sums == 0, votes, sums) > 0
    sums = jnp.where(positive, total(jnp.maximum(x, 0), weights), total(jnp.minimum(x, 0), weights))
    above, below = (x > 0).astype(x.dtype), (x < 0).astype(x.dtype)
    counts = jnp.where(positive, total(above, weights), total(below, weights))
    return jnp.where(counts > 0, sums / jnp.where(counts > 0, counts, 1), 0)


elect = Combine(_vote, _elect)
