"""All strategies by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from enmp_jax.errors import UserError, suggestion
from enmp_jax.search.base import Genomes, Keys, Space, State, Strategy, start_mean
from enmp_jax.search.bit_flip import bit_flip
from enmp_jax.search.evolution import cma_es, de, random, sep_cma_es, snes
from enmp_jax.search.greedy import greedy
from enmp_jax.search.swap import swap

__all__ = ["STRATEGIES", "Entry", "Genomes", "Space", "State", "Strategy", "build", "several", "start_mean"]


class Entry(NamedTuple):
    """A strategy, and the smallest population that it works with."""

    make: Callable[[Space], Strategy]
    smallest_population: int


STRATEGIES: dict[str, Entry] = {
    "cma_es": Entry(cma_es, 2),
    "sep_cma_es": Entry(sep_cma_es, 2),
    "snes": Entry(snes, 2),
    "de": Entry(de, 4),
    "bit_flip": Entry(bit_flip, 1),
    "swap": Entry(swap, 1),
    "greedy": Entry(greedy, 1),
    "random": Entry(random, 1),
}


def build(
    name: str,
    genome_size: int,
    population: int,
    sigma0: float,
    *,
    threshold: float = 0.0,
    free: int = 0,
    max_count: int | None = None,
    effects: Float[np.ndarray, " bit"] | None = None,
) -> Strategy:
    """Build a strategy of ``STRATEGIES`` (see ``Space`` for the arguments).

    ``max_count`` is by default the number of bits.

    Raises:
        UserError: unknown name, a population too small for the strategy, a sigma0 that is not
            positive, no gene to search, or nothing to exchange for ``swap``.
        ValueError: effects of another number of bits.
    """
    if name not in STRATEGIES:
        raise UserError(f"search.strategy: unknown strategy {name!r}; {suggestion(name, STRATEGIES)}")
    entry = STRATEGIES[name]
    if population < entry.smallest_population:
        raise UserError(
            f"search.population is {population}: {name} needs at least {entry.smallest_population}"
        )
    if not 0 < sigma0 < float("inf"):
        raise UserError(f"search.sigma0 is {sigma0}: it must be a positive number")
    n_bits = genome_size - free
    if n_bits < 1:
        raise UserError("there is no module to search over: the adapters have none that may be pruned")
    if effects is not None and np.shape(effects) != (n_bits,):
        raise ValueError(f"effects of shape {np.shape(effects)} for {n_bits} bits")
    count = n_bits if max_count is None else min(max_count, n_bits)
    if name == "swap" and not 0 < count < n_bits:
        raise UserError(
            f"search.max_pruned lets {count} of {n_bits} modules be pruned: swap prunes exactly so many and "
            "exchanges them with others, so it must be some but not all"
        )
    return entry.make(Space(genome_size, population, sigma0, threshold, free, count, effects))


def several(strategy: Strategy, seeds: int) -> Strategy:
    """Several independent searches as one, of population ``seeds * strategy.population``.

    Where a strategy takes a key, this one takes ``seeds`` keys; the members of search ``i`` are the
    rows ``i * P`` to ``(i + 1) * P``, those of a separate search with its key.
    """
    size = strategy.population

    def ask(keys: Keys, state: State) -> tuple[Genomes, State]:
        genomes, state = jax.vmap(strategy.ask)(keys, state)
        return genomes.reshape(seeds * size, -1), state

    def tell(keys: Keys, genomes: Genomes, fitness: Array, state: State) -> State:
        return jax.vmap(strategy.tell)(
            keys, genomes.reshape(seeds, size, -1), fitness.reshape(seeds, size), state
        )

    return Strategy(seeds * size, jax.vmap(strategy.init, in_axes=(0, None)), ask, tell)
