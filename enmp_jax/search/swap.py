"""Level-switch mutation at a fixed ratio: EvoPress (Sieberling et al., arXiv 2410.14649)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from enmp_jax.search.base import Genomes, Space, State, Strategy, largest_effects, worst_if_nan

MOST_EXCHANGED = 3  # as EvoPress


class _Elite(NamedTuple):
    genome: Float[Array, " gene"]
    fitness: Float[Array, ""]  # NaN until it was scored


def swap(space: Space) -> Strategy:
    """(1 + lambda) evolutionary algorithm among the masks that set exactly ``max_count`` bits.

    It starts from the bits of largest known effect, or else from random ones. Offspring exchange one
    to three set bits with as many unset ones; as in EvoPress the number is the smaller of two uniform
    draws. The elite stays unless an offspring is at least as good: on plateaus, which accuracies are
    full of, the search drifts instead of standing still. Free genes mutate by N(0, sigma0^2).
    """
    n_bits, count = space.n_bits, space.max_count
    most = min(MOST_EXCHANGED, count, n_bits - count)

    def init(key: PRNGKeyArray, mean: Float[Array, " gene"]) -> State:
        if space.effects is None:
            chosen = _rank(jax.random.uniform(key, (n_bits,))) < count
        else:
            chosen = jnp.asarray(largest_effects(space, count))
        free = jnp.asarray(mean, jnp.float32)[n_bits:]
        return _Elite(jnp.concatenate([space.genes(chosen), free]), jnp.float32(jnp.nan))

    def ask(key: PRNGKeyArray, state: Any) -> tuple[Genomes, State]:
        out_key, in_key, number_key, free_key = jax.random.split(key, 4)
        chosen = space.bits(state.genome)
        number = jax.random.randint(number_key, (2, space.population, 1), 1, MOST_EXCHANGED + 1).min(axis=0)
        number = jnp.minimum(number, most)
        exchanged = _first(out_key, chosen, number) | _first(in_key, ~chosen, number)
        free = space.mutated_free(free_key, state.genome)
        genomes = jnp.concatenate([space.genes(chosen ^ exchanged), free], axis=1)
        # the elite's own fitness must be known before offspring can be compared with it
        return genomes.at[0].set(jnp.where(jnp.isnan(state.fitness), state.genome, genomes[0])), state

    def tell(key: PRNGKeyArray, genomes: Genomes, fitness: Array, state: Any) -> State:
        fitness = worst_if_nan(fitness)
        elite = worst_if_nan(state.fitness)
        best = jnp.argmax(fitness)
        accepted = fitness[best] >= elite
        return _Elite(
            jnp.where(accepted, genomes[best], state.genome), jnp.where(accepted, fitness[best], elite)
        )

    return Strategy(space.population, init, ask, tell)


def _first(key: PRNGKeyArray, among: Bool[Array, " bit"], number: Array) -> Bool[Array, "member bit"]:
    """``number`` [member, 1] bits drawn at random, in every member, from those of ``among``."""
    draws = jax.random.uniform(key, (len(number), len(among)))
    return (_rank(jnp.where(among, draws, 2.0)) < number) & among


def _rank(values: Float[Array, "*member bit"]) -> Array:
    return jnp.argsort(jnp.argsort(values, axis=-1), axis=-1)
