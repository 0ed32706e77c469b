"""A comma-selection evolutionary algorithm on the bits themselves."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from enmp_jax.search.base import Genomes, Space, State, Strategy, largest_effects, worst_if_nan


class _Parent(NamedTuple):
    genome: Float[Array, " gene"]


def bit_flip(space: Space) -> Strategy:
    """(1, lambda) evolutionary algorithm on the bits, from the mask that the mean decodes to.

    With known effects: from the mask that sets the bits of largest positive effect, half of
    ``max_count`` at most and one at least.

    Every member flips each bit of the parent with probability 1 / bits, and at least one; the best
    member is the next parent. Bits live in the genes as distance from the threshold, so that a
    decode that allows only the k largest sees an order among set bits: a bit set lately may
    replace another or wait behind it. Free genes mutate by N(0, sigma0^2).
    """
    n_bits = space.n_bits

    def init(key: PRNGKeyArray, mean: Float[Array, " gene"]) -> State:
        mean = jnp.asarray(mean, jnp.float32)
        if space.effects is None:
            return _Parent(mean)
        count = min(max(space.max_count // 2, 1), space.max_count)
        chosen = largest_effects(space, count) & (np.asarray(space.effects) > 0)
        return _Parent(jnp.concatenate([space.genes(jnp.asarray(chosen)), mean[n_bits:]]))

    def ask(key: PRNGKeyArray, state: Any) -> tuple[Genomes, State]:
        flip_key, one_key, size_key, free_key = jax.random.split(key, 4)
        shape = (space.population, n_bits)
        flips = jax.random.bernoulli(flip_key, 1 / n_bits, shape)
        one = jax.nn.one_hot(jax.random.randint(one_key, shape[:1], 0, n_bits), n_bits, dtype=bool)
        flips = jnp.where(flips.any(axis=1, keepdims=True), flips, one)
        bits = state.genome[:n_bits]
        side = jnp.where(bits > space.threshold, -1.0, 1.0)
        flipped = space.threshold + side * jax.random.uniform(size_key, shape, minval=0.5, maxval=1.5)
        free = space.mutated_free(free_key, state.genome)
        return jnp.concatenate([jnp.where(flips, flipped, bits), free], axis=1), state

    def tell(key: PRNGKeyArray, genomes: Genomes, fitness: Array, state: Any) -> State:
        best = jnp.argmax(worst_if_nan(fitness))
        return _Parent(jnp.where(jnp.all(jnp.isnan(fitness)), state.genome, genomes[best]))

    return Strategy(space.population, init, ask, tell)
