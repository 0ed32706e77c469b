"""TIES: trim each task, elect a sign for each entry, average what agrees with it.

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, section 3.
In the reference: ``ties_merging`` (``merging_functions.py``). Trimming there keeps entries not
below the ``d - int(d * density)``-th smallest magnitude of d; so does this.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from enmp_jax.merges.base import LayerMethod
from enmp_jax.merges.entrywise import Band, Combine, Entrywise, Tasks, in_full_space
from enmp_jax.merges.thresholds import threshold_of_largest


def ties(space: str = "full", density: float = 0.2) -> LayerMethod:
    """TIES.

    Args:
        space: see ``SPACES``.
        density: share of the largest entries kept of each task (the paper's k, there 20 %).
    """
    return in_full_space(Entrywise(elect, largest(density)))


def largest(density: float) -> Callable[[Float[Array, "row column"], int], Band]:
    """The band of the ``int(density * size) + 1`` largest magnitudes, and those equal to them."""

    def band(magnitudes: Float[Array, "row column"], size: int) -> Band:
        low = threshold_of_largest(magnitudes, int(size * density) + 1)
        return Band(low, jnp.full_like(low, jnp.inf))

    return band


def _weighted(x: Tasks, weights: Float[Array, " task"]) -> Float[Array, "row column"]:
    return jnp.tensordot(weights, x, 1)


def _vote(x: Tasks, weights: Float[Array, " task"]) -> Float[Array, ""]:
    return jax.lax.stop_gradient(jnp.sum(jnp.sign(_weighted(x, weights))))


def _elect(
    x: Tasks, weights: Float[Array, " task"], majority: Float[Array, ""]
) -> Float[Array, "row column"]:
    """Mean of the entries with the elected sign.

    The sign is that of the sum; where that is zero, that of the sum of all signs (``majority``).
    """
    total = jax.lax.stop_gradient(_weighted(x, weights))
    positive = jnp.where(total == 0, majority, total) > 0
    sums = jnp.where(positive, _weighted(jnp.maximum(x, 0), weights), _weighted(jnp.minimum(x, 0), weights))
    counts = jnp.where(
        positive,
        _weighted((x > 0).astype(x.dtype), weights),
        _weighted((x < 0).astype(x.dtype), weights),
    )
    return jnp.where(counts > 0, sums / jnp.where(counts > 0, counts, 1), 0)


elect = Combine(_vote, _elect)
