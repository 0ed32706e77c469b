"""Greedy pruning as a strategy: one module after another, then exchanges, with a generation at a time.

What to try next follows from the state alone: which single flips of the current mask were tried, and
how many exchanges. So there is no phase to store, and ``tell`` recognises what a member tried by how it
differs from the current mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from enmp_jax.search.base import Genomes, Space, State, Strategy, worst_if_nan

LARGEST = float(np.finfo(np.float32).max)
RANDOM_FLIPS = 3  # on average: every single flip of a finished mask was tried already


class _Greedy(NamedTuple):
    """State.

    Attributes:
        genome: the current mask and free genes.
        fitness: its fitness; NaN until it was scored.
        best: the best genome seen, next to become the current one.
        best_fitness: its fitness.
        gains: last known gain of setting each bit; infinite where unknown.
        tried: bits whose flip was scored on the current mask.
        exchanged: exchanges scored on the current mask.
        jumped: whether sets of the largest gains were tried.
    """

    genome: Float[Array, " gene"]
    fitness: Float[Array, ""]
    best: Float[Array, " gene"]
    best_fitness: Float[Array, ""]
    gains: Float[Array, " bit"]
    tried: Bool[Array, " bit"]
    exchanged: Int[Array, ""]
    jumped: Bool[Array, ""]


class _Moves(NamedTuple):
    """What a generation tries: masks, and which kind of move they are."""

    bits: Bool[Array, "member bit"]
    exchanges: Bool[Array, ""]
    jump: Bool[Array, ""]
    finished: Bool[Array, ""]


def greedy(space: Space) -> Strategy:
    """Lazy greedy pruning (Minoux 1978), completed to a local search by un-prunings and exchanges.

    1. Unless effects are known: the empty mask and each bit alone; the best becomes the current mask.
    2. The bits of largest gain together, up to ``max_count`` of them in ``population`` steps; then set one
       more bit, those of largest last known gain first, ``population`` at a time. The best of a generation
       becomes the current mask if it is strictly better.
    3. When no bit helps or ``max_count`` are set: unset each, then exchange a set bit (smallest last
       known gain first) with an unset one (largest first). After an improvement back to 2.
    4. When no such move is left: random flips of the mask, free genes mutated by N(0, sigma0^2) (until
       then they stay); after an improvement back to 2.

    Members without a move to try repeat the current mask, which costs nothing where scores are
    remembered. The fitness of a mask is taken to be deterministic: it is scored once.
    """
    n_bits, population = space.n_bits, space.population
    members = jnp.arange(population)

    def init(key: PRNGKeyArray, mean: Float[Array, " gene"]) -> State:
        empty = space.genes(jnp.zeros(n_bits, bool))
        genome = jnp.concatenate([empty, jnp.asarray(mean, jnp.float32)[n_bits:]])
        if space.effects is None:
            gains = np.full(n_bits, np.inf)
        else:
            gains = np.nan_to_num(np.asarray(space.effects, float), nan=-LARGEST)
            gains = np.clip(gains, -LARGEST, LARGEST)
        return _Greedy(
            genome, jnp.float32(jnp.nan), genome, jnp.float32(-jnp.inf),
            jnp.asarray(gains, jnp.float32), jnp.zeros(n_bits, bool), jnp.int32(0), jnp.bool_(False),
        )  # fmt: skip

    def moves(state: _Greedy) -> _Moves:
        current = space.bits(state.genome)
        settable = ~current & ~state.tried & (current.sum() < space.max_count)
        setting = settable.any()
        flippable = jnp.where(setting, settable, current & ~state.tried)
        # the current mask itself is the very first member
        place = members - jnp.isnan(state.fitness)
        order = jnp.lexsort((jnp.where(setting, -state.gains, state.gains), ~flippable))
        flipped = order[jnp.clip(place, 0, n_bits - 1)]
        flips = jnp.arange(n_bits) == flipped[:, None]
        flips &= ((place >= 0) & (place < flippable.sum()))[:, None]

        # what single bits gain adds up well enough to skip the first rounds
        rank = jnp.argsort(jnp.argsort(-state.gains))
        places = population - jnp.isnan(state.fitness)
        size = jnp.where(place >= 0, (place + 1) * space.max_count / places, 0)
        largest = jnp.where((place >= 0)[:, None], rank < jnp.ceil(size)[:, None], current)
        jump = ~state.jumped & ~jnp.isinf(state.gains).any() & (places > 0)

        leaving = jnp.lexsort((state.gains, ~current))
        entering = jnp.lexsort((-state.gains, current))
        number = current.sum() * (~current).sum()
        exchange = state.exchanged + members
        row, column = jnp.divmod(exchange, jnp.maximum(current.sum(), 1))
        leaves = jnp.arange(n_bits) == leaving[column][:, None]
        enters = jnp.arange(n_bits) == entering[jnp.minimum(row, n_bits - 1)][:, None]
        exchanges = (leaves | enters) & (exchange < number)[:, None]

        single = flippable.any()
        double = ~single & (state.exchanged < number)
        tried = jnp.where(jump, largest, current ^ jnp.where(single, flips, exchanges))
        return _Moves(tried, double & ~jump, jump, ~single & ~double & ~jump)

    def ask(key: PRNGKeyArray, state: Any) -> tuple[Genomes, State]:
        flip_key, drop_key, free_key = jax.random.split(key, 3)
        proposed = moves(state)
        shape = (population, n_bits)
        flips = jax.random.bernoulli(flip_key, min(RANDOM_FLIPS / n_bits, 0.5), shape)
        random = space.bits(state.genome) ^ flips
        # too many: some random ones are left out
        draws = jnp.where(random, jax.random.uniform(drop_key, shape), 2.0)
        random &= jnp.argsort(jnp.argsort(draws, axis=1), axis=1) < space.max_count
        wander = (proposed.finished & ~(jnp.isnan(state.fitness) & (members == 0)))[:, None]
        bits = jnp.where(wander, random, proposed.bits)
        free = jnp.where(wander, space.mutated_free(free_key, state.genome), state.genome[n_bits:])
        return jnp.concatenate([space.genes(bits), free], axis=1), state

    def tell(key: PRNGKeyArray, genomes: Genomes, fitness: Array, state: Any) -> State:
        fitness = worst_if_nan(fitness)
        current = space.bits(state.genome)
        differs = space.bits(genomes) != current
        same_free = (genomes[:, n_bits:] == state.genome[n_bits:]).all(axis=1)
        distance = jnp.where(same_free, differs.sum(axis=1), n_bits + 1)
        own = jnp.max(jnp.where(distance == 0, fitness, -jnp.inf))
        own = jnp.where(jnp.isnan(state.fitness), own, state.fitness)

        flipped = differs & (distance == 1)[:, None]
        measured = flipped.any(axis=0)
        # where the current mask has no fitness, gains are counted from 0: they still rank the bits
        change = jnp.max(jnp.where(flipped, fitness[:, None], -jnp.inf), axis=0)
        change -= jnp.where(jnp.isfinite(own), own, 0.0)
        change = jnp.clip(change, -LARGEST, LARGEST)  # infinite gains would pass for unknown ones
        gains = jnp.where(measured, jnp.where(current, -change, change), state.gains)

        first = jnp.argmax(fitness)
        better = fitness[first] > state.best_fitness
        best = jnp.where(better, genomes[first], state.best)
        best_fitness = jnp.where(better, fitness[first], state.best_fitness)
        sweeping = jnp.isinf(gains).any() & (space.max_count > 0)
        accepted = ~sweeping & (best_fitness > own)
        proposed = moves(state)
        exchanged = state.exchanged + population * proposed.exchanges
        return _Greedy(
            jnp.where(accepted, best, state.genome),
            jnp.where(accepted, best_fitness, own),
            best,
            best_fitness,
            gains,
            (state.tried | measured) & ~accepted,
            jnp.where(accepted, 0, exchanged).astype(jnp.int32),
            state.jumped | proposed.jump,
        )

    return Strategy(population, init, ask, tell)
