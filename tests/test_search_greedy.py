"""The greedy strategy against brute force, the host's greedy removal, and its own promises."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enmp_jax.masks import MaskSpec
from enmp_jax.search import controls
from enmp_jax.search.loop import make_step, run
from enmp_jax.search.strategies import build

N, LIMIT = 24, 6
SPEC = MaskSpec(4, ("q_proj",), tuple("abcdef"), tuple(range(N)), max_pruned=LIMIT / N)
RNG = np.random.default_rng(11)
SINGLE = np.round(RNG.normal(0.0, 1.0, N), 3)
PAIRS = np.round(np.triu(RNG.normal(0.0, 0.7, (N, N)), k=1), 3)


class Scores(NamedTuple):
    fitness: jax.Array
    pruned: jax.Array


def value(pruned, pairs):
    """Effects of single modules plus pairwise interactions, [member]."""
    pruned = pruned.astype(np.float32)
    return pruned @ jnp.asarray(SINGLE, jnp.float32) + ((pruned @ pairs) * pruned).sum(-1)


def evaluate(genomes, memory, pairs):
    pruned = ~jax.vmap(SPEC.decode)(genomes).reshape(len(genomes), N)
    return Scores(value(pruned, pairs), pruned), memory


def search(population, generations, pairs, evaluate=evaluate, seed=0, **options):
    strategy = build("greedy", N, population, 1.0, max_count=LIMIT, **options)
    mean = np.zeros(N, np.float32)  # the strategy starts from the empty mask, wherever the mean is
    step = make_step(strategy, evaluate, generations)
    return run(step, jax.random.key(seed), mean, generations, operands=(jnp.asarray(pairs, jnp.float32),))


def host_score(pairs):
    """What the host-side controls score, in the numbers that the strategy sees."""
    return lambda keep: np.asarray(value(~keep.reshape(len(keep), N), jnp.asarray(pairs, jnp.float32)))


def best_so_far(result):
    return np.maximum.accumulate(result.scores.fitness.max(axis=1))


def best_mask(result):
    return result.scores.pruned.reshape(-1, N)[np.nanargmax(result.scores.fitness)]


def distinct(result, generations):
    return len({mask.tobytes() for mask in result.scores.pruned[:generations].reshape(-1, N)})


@pytest.mark.parametrize("population", [1, 5, 32])
def test_separable_problem_is_solved_exactly(population):
    """A sweep, then one generation of the modules of largest gain together."""
    assert (SINGLE > 0).sum() > LIMIT
    sweep = -(-(N + 1) // population)
    result = search(population, sweep + 1, np.zeros((N, N)))
    assert not result.scores.pruned[0, 0].any()
    singles = result.scores.pruned[:sweep].reshape(-1, N)[1 : N + 1]
    np.testing.assert_array_equal(singles, np.eye(N, dtype=bool))
    assert not result.scores.pruned[:sweep].reshape(-1, N)[N + 1 :].any()  # past the end: the current mask
    np.testing.assert_array_equal(np.flatnonzero(best_mask(result)), np.sort(np.argsort(-SINGLE)[:LIMIT]))
    assert distinct(result, None) <= N + 1 + population


CROWDED = np.triu(np.full((N, N), -10.0), k=1)
"""Interactions that make any two modules together worse than the better one: sets of them gain nothing."""


@pytest.mark.parametrize("pairs", [PAIRS, CROWDED], ids=["mixed", "crowded"])
@pytest.mark.parametrize("population", [N + 1, 4])
def test_no_worse_than_the_greedy_removal_of_the_host_at_any_time(population, pairs):
    """One module a generation, from the sweep on; the sets of largest gains cost one generation at most."""
    effects, _ = controls.leave_one_out(host_score(pairs), SPEC)
    host = controls.greedy_removal(host_score(pairs), SPEC, 1000, width=min(population, N), first=effects)
    sweep = -(-(N + 1) // population)
    found = best_so_far(search(population, 60, pairs))
    path = np.asarray(host.path[1:])
    assert (found[sweep : sweep + len(path)] >= path - 1e-6).all()
    assert found[-1] >= host.fitness - 1e-6


def test_sets_of_the_largest_gains_are_tried_once():
    result = search(4, 20, CROWDED, effects=SINGLE)
    order = np.argsort(-SINGLE)
    masks = [[np.flatnonzero(mask).tolist() for mask in generation] for generation in result.scores.pruned]
    assert masks[0] == [[], *(sorted(order[:k].tolist()) for k in (2, 4, 6))]
    assert masks[1] == [[i] for i in order[:4]]  # none of them gained: one by one


def neighbours(mask):
    for i in range(N):
        flipped = mask.copy()
        flipped[i] ^= True
        if flipped.sum() <= LIMIT:
            yield flipped
        for j in range(i):
            if mask[i] != mask[j]:
                exchanged = mask.copy()
                exchanged[[i, j]] ^= True
                yield exchanged


def test_ends_in_a_local_optimum_of_flips_and_exchanges():
    """And exchanges are what got it there: greedy alone stops below."""
    result = search(8, 80, PAIRS)
    host = controls.greedy_removal(host_score(PAIRS), SPEC, budget=1000)
    found = best_so_far(result)[-1]
    assert found > host.fitness + 0.1
    around = np.stack(list(neighbours(best_mask(result))))
    assert np.asarray(value(around, jnp.asarray(PAIRS, jnp.float32))).max() <= found
    assert (result.scores.pruned.sum(axis=-1) <= LIMIT).all()
    assert (result.genomes > 0).sum(axis=-1).max() <= LIMIT  # genes say what the decode makes of them


def test_no_move_is_tried_twice_on_a_mask_before_all_are_done():
    """On a problem where nothing helps: the sweep, then nothing is left but random flips."""

    def nothing_helps(genomes, memory, pairs):
        pruned = genomes > 0
        return Scores(-pruned.sum(-1).astype(jnp.float32), pruned), memory

    result = search(5, 9, np.zeros((N, N)), nothing_helps)
    assert distinct(result, 5) == N + 1
    assert result.scores.pruned[5:].sum(axis=-1).max() > 1


def test_a_finished_search_wanders_and_comes_back():
    """Three modules that only help together: no flip or exchange finds them, random flips do."""
    trap = np.isin(np.arange(N), [3, 9, 20])

    def trapped(genomes, memory, pairs):
        pruned = genomes > 0
        together = (pruned | ~trap).all(-1)
        return Scores(jnp.where(together, 10.0, 0.0) - pruned.sum(-1), pruned), memory

    result = search(64, 300, np.zeros((N, N)), trapped)
    np.testing.assert_array_equal(best_mask(result), trap)
    assert best_so_far(result)[1] == 0.0


def test_known_effects_replace_the_sweep():
    order = np.argsort(-SINGLE)
    result = search(4, 1, np.zeros((N, N)), effects=SINGLE)
    assert best_so_far(result)[0] == pytest.approx(SINGLE[order[:LIMIT]].sum(), rel=1e-5)
    # what could not be measured comes last, and is no reason to sweep
    result = search(4, 1, np.zeros((N, N)), effects=np.where(np.arange(N) == order[0], np.nan, SINGLE))
    assert set(np.flatnonzero(result.scores.pruned[0, 1])) == set(order[1:3])


@pytest.mark.parametrize("population", [1, 6])
def test_an_empty_mask_without_fitness_is_left_behind(population):
    def broken(genomes, memory, pairs):
        scores, memory = evaluate(genomes, memory, pairs)
        failed = ~scores.pruned.any(-1)
        return scores._replace(fitness=jnp.where(failed, jnp.nan, scores.fitness)), memory

    sweep = -(-(N + 1) // population)
    result = search(population, sweep + LIMIT, np.zeros((N, N)), broken)
    best = np.argsort(-SINGLE)[:LIMIT]
    np.testing.assert_array_equal(np.flatnonzero(best_mask(result)), np.sort(best))


def test_free_genes_stay_until_the_masks_are_done():
    strategy = build("greedy", 5, 4, 0.5, max_count=2, free=1)

    def score(genomes, memory):
        pruned = genomes[:, :4] > 0
        return Scores(-pruned.sum(-1) - jnp.abs(genomes[:, 4] - 2.0), pruned), memory

    result = run(make_step(strategy, score, 30), jax.random.key(0), np.full(5, 1.25, np.float32), 30)
    scale = result.genomes[..., 4]
    assert (scale[:2] == 1.25).all()
    assert np.abs(result.state.genome[4] - 2.0) < 0.25
    assert not (result.state.genome[:4] > 0).any()


def test_nothing_may_be_pruned():
    strategy = build("greedy", N, 4, 1.0, max_count=0)
    result = run(make_step(strategy, lambda g, m: (Scores(g[:, 0], g > 0), m), 4), jax.random.key(0),
                 np.zeros(N, np.float32), 4)  # fmt: skip
    assert not result.scores.pruned.any()
