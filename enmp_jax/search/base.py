"""The contract of a search strategy, and how all of them start.

A strategy is a factory of a ``Space`` that returns a ``Strategy``: three pure functions. Fitness is
higher-is-better. Everything can be jitted, scanned and vmapped, and a state is a pytree of strongly
typed arrays that orbax saves and that compiles once. Build one instance per run: two instances are
two functions to compile.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, PRNGKeyArray

State = Any  # a pytree of arrays that only the strategy that made it understands
Genomes = Float[Array, "member gene"]
Keys = Key[Array, "*seed"]  # one random key; of several searches at once, one each


class Strategy(NamedTuple):
    """An ask-tell strategy.

    Attributes:
        population: members per generation.
        init: ``init(key, mean [gene]) -> state``.
        ask: ``ask(key, state) -> (genomes [member, gene], state)``.
        tell: ``tell(key, genomes, fitness [member], state) -> state``; NaN counts as the worst.
    """

    population: int
    init: Callable[[Keys, Float[Array, " gene"]], State]
    ask: Callable[[Keys, State], tuple[Genomes, State]]
    tell: Callable[[Keys, Genomes, Float[Array, " member"], State], State]


class Space(NamedTuple):
    """The space that a strategy searches, and how it starts.

    Attributes:
        genome_size: real genes, of which the last ``free`` are plain numbers and all others stand for
            a bit: of the ``max_count`` largest, those above ``threshold`` are set (a module is pruned).
        population: members per generation.
        sigma0: the first standard deviation.
        threshold: see ``genome_size``.
        free: see ``genome_size``.
        max_count: most bits that may be set.
        effects: gain in fitness when one bit alone is set, where that is known already (leave-one-out
            or first-order): a warm start for every strategy. An effect that is not finite says nothing.
    """

    genome_size: int
    population: int
    sigma0: float
    threshold: float
    free: int
    max_count: int
    effects: Float[np.ndarray, " bit"] | None = None

    @property
    def n_bits(self) -> int:
        """Genes that stand for a bit."""
        return self.genome_size - self.free

    def genes(self, bits: Bool[Array, "*member bit"]) -> Float[Array, "*member bit"]:
        """Genes that decode to bits, of which at most ``max_count`` are set."""
        return jnp.where(bits, self.threshold + 1.0, self.threshold - 1.0).astype(jnp.float32)

    def bits(self, genomes: Float[Array, "*member gene"]) -> Bool[Array, "*member bit"]:
        """The bits of genomes that set at most ``max_count``."""
        return genomes[..., : self.n_bits] > self.threshold

    def gaussian(self, key: PRNGKeyArray, mean: Float[Array, " gene"]) -> Genomes:
        """A generation from N(mean, sigma0^2)."""
        noise = jax.random.normal(key, (self.population, self.genome_size))
        return jnp.asarray(mean, jnp.float32) + self.sigma0 * noise

    def mutated_free(self, key: PRNGKeyArray, genome: Float[Array, " gene"]) -> Float[Array, "member free"]:
        """The free genes of a generation: those of ``genome`` + N(0, sigma0^2)."""
        noise = jax.random.normal(key, (self.population, self.free))
        return genome[self.n_bits :] + self.sigma0 * noise


def start_mean(space: Space, x0: float | Literal["auto"]) -> float:
    """The value of every bit's gene that a search starts from.

    ``auto``: genes drawn from N(x0, sigma0^2) set ``max_count / 2`` bits on average.
    """
    if x0 != "auto":
        return float(x0)
    share = max(space.max_count, 1) / (2 * space.n_bits)
    return space.threshold - space.sigma0 * NormalDist().inv_cdf(1 - share)


def warm_mean(space: Space, mean: Float[Array, " gene"]) -> Float[Array, " gene"]:
    """The mean of a strategy that samples: genes shifted by sigma0 times the standardised effects."""
    mean = jnp.asarray(mean, jnp.float32)
    if space.effects is None:
        return mean
    effects = np.asarray(space.effects, float)
    known = np.isfinite(effects)
    shift = np.zeros(space.genome_size, np.float32)
    if np.any(known) and np.std(effects[known]) > 0:
        standardised = (effects[known] - np.mean(effects[known])) / np.std(effects[known])
        shift[: space.n_bits][known] = space.sigma0 * standardised
    return mean + shift


def largest_effects(space: Space, count: int) -> Bool[np.ndarray, " bit"]:
    """The ``count`` bits of largest known effect; equal effects: the earlier bit first."""
    effects = np.zeros(space.n_bits) if space.effects is None else np.asarray(space.effects, float)
    order = np.argsort(-np.where(np.isnan(effects), -np.inf, effects), kind="stable")
    return np.isin(np.arange(space.n_bits), order[:count])


def worst_if_nan(fitness: Float[Array, "*member"]) -> Float[Array, "*member"]:
    """Fitness as single precision numbers that can be compared: NaN becomes minus infinity."""
    return jnp.where(jnp.isnan(fitness), -jnp.inf, fitness).astype(jnp.float32)
