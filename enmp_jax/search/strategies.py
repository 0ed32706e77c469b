"""Evolution strategies as NamedTuples of pure functions, most of them on evosax.

Fitness is higher-is-better here; evosax minimises. Everything can be jitted and scanned, and a
state is a pytree of strongly typed arrays that orbax saves and that compiles once. Build one
instance per run: two instances are two functions to compile.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from evosax.algorithms import CMA_ES, SNES, DifferentialEvolution, Sep_CMA_ES
from jaxtyping import Array, Float, PRNGKeyArray

from enmp_jax.errors import UserError

State = Any  # a pytree of arrays that only the strategy that made it understands
Genomes = Float[Array, "member gene"]


class Strategy(NamedTuple):
    """An ask-tell strategy.

    Attributes:
        population: members per generation.
        init: ``init(key, mean [gene]) -> state``.
        ask: ``ask(key, state) -> (genomes [member, gene], state)``.
        tell: ``tell(key, genomes, fitness [member], state) -> state``; NaN counts as the worst.
    """

    population: int
    init: Callable[[PRNGKeyArray, Float[Array, " gene"]], State]
    ask: Callable[[PRNGKeyArray, State], tuple[Genomes, State]]
    tell: Callable[[PRNGKeyArray, Genomes, Float[Array, " member"], State], State]


class Space(NamedTuple):
    """The space that a strategy searches, and how it starts.

    ``genome_size`` real genes of which the last ``free`` are plain numbers and all others stand for
    a bit, set when the gene is above ``threshold``. ``sigma0`` is the first standard deviation.
    """

    genome_size: int
    population: int
    sigma0: float
    threshold: float = 0.0
    free: int = 0


def _ordinal_weights(population: Any, fitness: Array, state: Any, params: Any) -> Array:
    # evosax gives tied members one shared weight, and sigma collapses (STACK.md): rank ordinally
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
        return _strong(algorithm.init(key, jnp.asarray(mean, jnp.float32), params))

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
    # and with evosax's own B D z a loop and a scan would draw different members (STACK.md)
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
        genomes = _gaussian(key, mean, space)
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


class _Parent(NamedTuple):
    genome: Float[Array, " gene"]


def bit_flip(space: Space) -> Strategy:
    """(1, lambda) evolutionary algorithm on the bits themselves, from the mask that the mean decodes to.

    Every member flips each bit of the parent with probability 1 / bits, and at least one; the best
    member is the next parent. Bits live in the genes as distance from the threshold, so that a
    decode that allows only the k largest sees an order among set bits: a bit set lately may
    replace another or wait behind it. Free genes mutate by N(0, sigma0^2).
    """
    n_bits = space.genome_size - space.free

    def init(key: PRNGKeyArray, mean: Float[Array, " gene"]) -> State:
        return _Parent(jnp.asarray(mean, jnp.float32))

    def ask(key: PRNGKeyArray, state: Any) -> tuple[Genomes, State]:
        flip_key, one_key, size_key, free_key = jax.random.split(key, 4)
        shape = (space.population, n_bits)
        flips = jax.random.bernoulli(flip_key, 1 / n_bits, shape)
        one = jax.nn.one_hot(jax.random.randint(one_key, shape[:1], 0, n_bits), n_bits, dtype=bool)
        flips = jnp.where(flips.any(axis=1, keepdims=True), flips, one)
        bits = state.genome[:n_bits]
        side = jnp.where(bits > space.threshold, -1.0, 1.0)
        flipped = space.threshold + side * jax.random.uniform(size_key, shape, minval=0.5, maxval=1.5)
        noise = jax.random.normal(free_key, (space.population, space.free))
        free = state.genome[n_bits:] + space.sigma0 * noise
        return jnp.concatenate([jnp.where(flips, flipped, bits), free], axis=1), state

    def tell(key: PRNGKeyArray, genomes: Genomes, fitness: Array, state: Any) -> State:
        best = jnp.argmax(jnp.where(jnp.isnan(fitness), -jnp.inf, fitness))
        return _Parent(jnp.where(jnp.all(jnp.isnan(fitness)), state.genome, genomes[best]))

    return Strategy(space.population, init, ask, tell)


def random(space: Space) -> Strategy:
    """Random search: every generation from N(mean, sigma0^2), nothing learnt. A baseline."""

    def init(key: PRNGKeyArray, mean: Float[Array, " gene"]) -> State:
        return _Parent(jnp.asarray(mean, jnp.float32))

    def ask(key: PRNGKeyArray, state: Any) -> tuple[Genomes, State]:
        return _gaussian(key, state.genome, space), state

    def tell(key: PRNGKeyArray, genomes: Genomes, fitness: Array, state: State) -> State:
        return state

    return Strategy(space.population, init, ask, tell)


def _gaussian(key: PRNGKeyArray, mean: Float[Array, " gene"], space: Space) -> Genomes:
    noise = jax.random.normal(key, (space.population, space.genome_size))
    return jnp.asarray(mean, jnp.float32) + space.sigma0 * noise


STRATEGIES: dict[str, Callable[[Space], Strategy]] = {
    "cma_es": cma_es,
    "sep_cma_es": sep_cma_es,
    "snes": snes,
    "de": de,
    "bit_flip": bit_flip,
    "random": random,
}

_SMALLEST_POPULATION = {"cma_es": 2, "sep_cma_es": 2, "snes": 2, "de": 4, "bit_flip": 1, "random": 1}


def build(
    name: str,
    genome_size: int,
    population: int,
    sigma0: float,
    *,
    threshold: float = 0.0,
    free: int = 0,
) -> Strategy:
    """Build a strategy of ``STRATEGIES`` (see ``Space`` for the arguments).

    Raises:
        UserError: unknown name, a population too small for the strategy, a sigma0 that is not
            positive, or no gene to search.
    """
    if name not in STRATEGIES:
        near = difflib.get_close_matches(name, STRATEGIES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(STRATEGIES)}"
        raise UserError(f"search.strategy: unknown strategy {name!r}; {hint}")
    smallest = _SMALLEST_POPULATION[name]
    if population < smallest:
        raise UserError(f"search.population is {population}: {name} needs at least {smallest}")
    if not 0 < sigma0 < float("inf"):
        raise UserError(f"search.sigma0 is {sigma0}: it must be a positive number")
    if genome_size - free < 1:
        raise UserError("there is no module to search over: the adapters have none that may be pruned")
    return STRATEGIES[name](Space(genome_size, population, sigma0, threshold, free))
