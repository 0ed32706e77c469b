"""DARE: drop entries of each delta at random, rescale the rest, then sum or TIES.

Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free
Lunch", ICML 2024, equations (2) to (4). In the reference: ``get_dare_delta_w``, which draws anew at
every evaluation; here the draw depends on seed, task name, layer and module only, so it is the
same for every mask of a search and for the final merge.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, UInt32

from enmp_jax.merges.base import LayerMethod
from enmp_jax.merges.entrywise import Combine, Entrywise, Tasks, entrywise_in_space, total
from enmp_jax.merges.hyperparameters import PositiveShare, ProperShare
from enmp_jax.merges.ties import elect, largest

added = Combine(None, lambda x, weights, votes: total(x, weights))


def dare(space: str = "full", drop_rate: ProperShare = 0.9) -> LayerMethod:
    """DARE with task arithmetic.

    Dense in full space, where export as a PEFT adapter truncates; low-rank, and exported exactly, in the
    KnOTS and core spaces.

    Args:
        space: see ``SPACES``.
        drop_rate: share of entries dropped (the paper's p; it goes up to 0.9 and beyond).
    """
    return entrywise_in_space(space, Entrywise(added, drop=random_drop(drop_rate)))


def dare_ties(space: str = "full", drop_rate: ProperShare = 0.9, density: PositiveShare = 0.2) -> LayerMethod:
    """DARE, then TIES on what is left. Dense or low-rank, and exported, as ``dare`` is.

    Args:
        space: see ``SPACES``.
        drop_rate: share of entries dropped first.
        density: share of all entries that TIES then keeps of each task.
    """
    return entrywise_in_space(space, Entrywise(elect, largest(density), random_drop(drop_rate)))


def random_drop(rate: float) -> Callable[[Tasks, Key[Array, " task"], Int[Array, ""] | int], Tasks]:
    """Zero entries with probability ``rate``, divide the others by ``1 - rate``; blocks of rows apart."""
    limit = min(round(rate * 2**32), 2**32 - 1)

    def drop(x: Tasks, key: Key[Array, " task"], first_row: Int[Array, ""] | int) -> Tasks:
        return jnp.where(random_rows(x.shape, key, first_row) >= jnp.uint32(limit), x / (1 - rate), 0)

    return drop


def random_rows(
    shape: tuple[int, ...], key: Key[Array, " task"], first_row: Int[Array, ""] | int
) -> UInt32[Array, "task row column"]:
    """Random bits for the entries of a block of rows; each row has its own key."""
    rows = jnp.arange(shape[1]) + first_row

    def bits(key: Key[Array, ""], row: Int[Array, ""]) -> Array:
        return jax.random.bits(jax.random.fold_in(key, row), (shape[2],), jnp.uint32)

    return jax.vmap(jax.vmap(bits, (None, 0)), (0, None))(key, rows)
