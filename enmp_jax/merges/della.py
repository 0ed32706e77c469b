"""DELLA: entries are dropped at random, small ones more often; the rest is rescaled, then signs are elected.

Deep et al., "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling", arXiv
2406.11617 (MagPrune). The k-th smallest magnitude of the n in a row is dropped with probability
``p + epsilon (1 - 2 (k - 1) / (n - 1))``; survivors are divided by the probability of their survival.
Epsilon is mergekit's; the paper's is twice that. Draws repeat as DARE's do.
"""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from enmp_jax.errors import UserError
from enmp_jax.merges.base import LayerMethod
from enmp_jax.merges.dare import random_rows
from enmp_jax.merges.entrywise import Entrywise, Tasks, entrywise_in_space
from enmp_jax.merges.hyperparameters import ProperShare, Range
from enmp_jax.merges.ties import elect


def della(
    space: str = "full", drop_rate: ProperShare = 0.5, epsilon: Annotated[float, Range(0, 0.5)] = 0.1
) -> LayerMethod:
    """DELLA.

    Dense in full space, where export as a PEFT adapter truncates; low-rank, and exported exactly, in the
    KnOTS space.

    Args:
        space: full or knots.
        drop_rate: mean share of entries dropped (the paper's p).
        epsilon: how much more often the smallest entry of a row is dropped, and the largest less often.

    Raises:
        UserError: probabilities outside 0 to 1.
    """
    if drop_rate - epsilon < 0 or drop_rate + epsilon >= 1:
        raise UserError(
            f"della: drop_rate {drop_rate:g} and epsilon {epsilon:g}: drop_rate - epsilon must be at least 0 "
            "and drop_rate + epsilon below 1"
        )

    def drop(x: Tasks, key: Key[Array, " task"], first_row: Int[Array, ""] | int) -> Tasks:
        last = max(x.shape[2] - 1, 1)
        rank = jnp.argsort(jnp.argsort(jnp.abs(jax.lax.stop_gradient(x)), axis=2), axis=2)
        keep = 1 - drop_rate - epsilon * (1 - 2 * rank.astype(x.dtype) / last)
        drawn = random_rows(x.shape, key, first_row).astype(x.dtype) / 2.0**32
        return jnp.where(drawn < keep, x / keep, 0)

    return entrywise_in_space(space, Entrywise(elect, drop=drop))
