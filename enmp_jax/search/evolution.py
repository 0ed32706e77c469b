"""Strategies that sample real genes: four of evosax, and random search.

evosax minimises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from evosax.algorithms import CMA_ES, SNES, DifferentialEvolution, Sep_CMA_ES
from jaxtyping import Array, Float, PRNGKeyArray

from enmp_jax.search.base import Genomes, Space, State, Strategy, warm_mean


def _ordinal_weights(population: Any, fitness: Array, state: Any, params: Any) -> Array:
    # evosax gives tied members one shared weight, and sigma collapses: rank ordinally
    ranks = jnp.argsort(jnp.argsort(jnp.where(jnp.isnan(fitness), jnp.inf, fitness)))
    return jnp.where(jnp.all(jnp.isnan(fitness)), 0.0, params.weights[ranks])


def _strong(tree: Any) -> Any:
    # a weakly typed leaf would compile the step twice
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), tree)


def _distribution_based(
    algorithm: Any,
    space: Space,
    sample: Callable[[PRNGKeyArray, Any, tuple[int, int]], Genomes] | None = None,
) -> Strategy:
    params = algorithm.default_params.replace(std_init=jnp.asarray(space.sigma0, jnp.float32))

    def init(key: PRNGKeyArray, mean: Float[Array, " gene"]) -> State:
        return _strong(algorithm.init(key, warm_mean(space, mean), params))

    def ask(key: PRNGKeyArray, state: State) -> tuple[Genomes, State]:
        genomes, state = algorithm.ask(key, state, params)
        if sample is not None:
            genomes = sample(key, state, genomes.shape)
        return genomes, state

    def tell(key: PRNGKeyArray, genomes: Genomes, fitness: Array, state: State) -> State:
        state, _ = algorithm.tell(key, genomes, -fitness, state, params)
        return _strong(state)

    return Strategy(space.population, init, ask, tell)


def _symmetric_sample(key: PRNGKeyArray, state: Any, shape: tuple[int, int]) -> Genomes:
    # N(mean, std^2 C) through the symmetric root of C: eigenvectors of equal eigenvalues are arbitrary,
    # and with evosax's own B D z a loop and a scan would draw different members
    z = jax.random.normal(key, shape)
    return state.mean + state.std * ((z @ state.B) * state.D) @ state.B.T


def cma_es(space: Space) -> Strategy:
    """CMA-ES (Hansen, arXiv 1604.00772), what the paper uses; full covariance."""
    algorithm = CMA_ES(space.population, jnp.zeros(space.genome_size), fitness_shaping_fn=_ordinal_weights)
    return _distribution_based(algorithm, space, _symmetric_sample)


def sep_cma_es(space: Space) -> Strategy:
    """Sep-CMA-ES (Ros & Hansen 2008): diagonal covariance, for thousands of genes."""
    solution = jnp.zeros(space.genome_size)
    return _distribution_based(
        Sep_CMA_ES(space.population, solution, fitness_shaping_fn=_ordinal_weights), space
    )


def snes(space: Space) -> Strategy:
    """Separable natural evolution strategy (Wierstra et al. 2014)."""
    algorithm = SNES(space.population, jnp.zeros(space.genome_size), fitness_shaping_fn=_ordinal_weights)
    return _distribution_based(algorithm, space)


def de(space: Space) -> Strategy:
    """Differential evolution (Storn & Price 1997), best/1/bin with crossover rate 0.5.

    The first generation is drawn from N(mean, sigma0^2).
    """
    algorithm = DifferentialEvolution(space.population, jnp.zeros(space.genome_size))
    params = algorithm.default_params.replace(crossover_rate=0.5)

    def init(key: PRNGKeyArray, mean: Float[Array, " gene"]) -> State:
        genomes = space.gaussian(key, warm_mean(space, mean))
        # nothing scored yet: the first generation is this population itself
        fitness = jnp.full(space.population, jnp.inf)
        return _strong(algorithm.init(key, genomes, fitness, params))

    def ask(key: PRNGKeyArray, state: Any) -> tuple[Genomes, State]:
        genomes, state = algorithm.ask(key, state, params)
        return jnp.where(state.generation_counter == 0, state.population, genomes), state

    def tell(key: PRNGKeyArray, genomes: Genomes, fitness: Array, state: State) -> State:
        cost = jnp.where(jnp.isnan(fitness), jnp.inf, -fitness)
        state, _ = algorithm.tell(key, genomes, cost, state, params)
        return _strong(state)

    return Strategy(space.population, init, ask, tell)


class _Mean(NamedTuple):
    mean: Float[Array, " gene"]


def random(space: Space) -> Strategy:
    """Random search: every generation from N(mean, sigma0^2), nothing learnt. A baseline."""

    def init(key: PRNGKeyArray, mean: Float[Array, " gene"]) -> State:
        return _Mean(warm_mean(space, mean))

    def ask(key: PRNGKeyArray, state: Any) -> tuple[Genomes, State]:
        return space.gaussian(key, state.mean), state

    def tell(key: PRNGKeyArray, genomes: Genomes, fitness: Array, state: State) -> State:
        return state

    return Strategy(space.population, init, ask, tell)
