"""The memo inside the compiled search: identical fitness, nothing run twice, resumable."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.runs.evolve import MemberScores, make_score
from enmp_jax.search import device_memo, loop, strategies


def hashed(keep, scale):
    """A fitness that depends on every bit and the scale."""
    weights = jnp.sin(jnp.arange(1, keep[0].size + 1) * 1.7)
    return keep.reshape(len(keep), -1).astype(jnp.float32) @ weights + scale


def random_masks(n, kinds, seed=0):
    random = np.random.default_rng(seed)
    return (random.random((kinds, 5, 9)) > 0.5)[random.integers(0, kinds, n)]


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_every_mask_is_run_once_and_gets_its_own_fitness(chunk):
    calls = []

    def score(keep, scale):
        jax.debug.callback(lambda k: calls.append(np.asarray(k)), keep)
        return hashed(keep, scale)

    step = jax.jit(device_memo.remembering(score, chunk))
    memo, seen = device_memo.start(60, (5, 9)), set()
    for generation in range(5):
        keep = random_masks(10, 12, generation % 2)
        # the same mask with another scale is another candidate
        scale = np.where(np.arange(10) < 5, 0.5, 0.7).astype(np.float32)
        found, memo = step(memo, keep, scale)
        jax.effects_barrier()
        np.testing.assert_allclose(found.fitness, hashed(keep, scale), rtol=1e-6)
        own = [(k.tobytes(), float(s)) for k, s in zip(keep, scale, strict=True)]
        first = [o not in seen and o not in own[:i] for i, o in enumerate(own)]
        np.testing.assert_array_equal(found.evaluated, first)
        assert len(calls) == -(-sum(first) // chunk)  # and not one chunk more
        calls.clear()
        seen.update(own)
        assert int(memo.used) == len(seen)


def test_nan_is_remembered_too():
    step = device_memo.remembering(lambda keep, scale: jnp.full(len(keep), jnp.nan), 2)
    memo, keep, scale = device_memo.start(9, (5, 9)), random_masks(3, 3), np.ones(3, np.float32)
    found, memo = step(memo, keep, scale)
    again, memo = step(memo, keep, scale)
    assert np.isnan(found.fitness).all() and np.isnan(again.fitness).all() and not again.evaluated.any()


def test_masks_of_one_word_and_a_bit_more_are_told_apart():
    """33 modules: the 33rd bit sits in the second word."""
    keep = np.ones((2, 33, 1), bool)
    keep[1, 32] = False
    key = np.asarray(device_memo.keys(jnp.asarray(keep), jnp.ones(2)))
    assert key.shape == (2, 3) and (key[0] != key[1]).any()


def test_a_memo_of_what_was_scored_before_knows_it():
    keep, scale = random_masks(20, 6), np.full(20, 0.5, np.float32)
    memo = device_memo.start(30, (5, 9), keep, scale, np.asarray(hashed(keep, scale)))
    assert int(memo.used) == len({k.tobytes() for k in keep})
    new = np.concatenate([keep[:4], random_masks(1, 1, seed=5)])
    found, memo = device_memo.remembering(hashed, 2)(memo, new, scale[:5])
    np.testing.assert_allclose(found.fitness, hashed(new, scale[:5]), rtol=1e-6)
    np.testing.assert_array_equal(found.evaluated, [False] * 4 + [True])


def test_a_search_is_the_same_with_and_without_memo(demo_run, demo_evaluator):
    """And about half of the demo's masks are not paid for."""
    search = dataclasses.replace(demo_run.search, population=6, generations=8, sigma0=0.5)
    run = dataclasses.replace(demo_run, search=search)
    evaluator = Evaluator(dataclasses.replace(demo_evaluator.loaded, run=run))
    inputs, scoring, spec = (
        evaluator.inputs("search"),
        evaluator.scoring("search"),
        evaluator.loaded.mask_spec,
    )
    strategy = strategies.build("cma_es", spec.genome_size, 6, 0.5)
    memo = device_memo.start(48, spec.shape)
    operands, mean = (inputs, scoring, jnp.float32(0.5)), jnp.asarray(spec.start(-1.0))
    step = loop.make_step(strategy, make_score(evaluator, evaluator.plan(inputs)), 4)
    with_memo, without = (
        loop.run(step, jax.random.key(0), mean, 8, operands=operands, memory=memory) for memory in (memo, ())
    )
    scores: MemberScores = with_memo.scores
    np.testing.assert_array_equal(with_memo.genomes, without.genomes)
    np.testing.assert_array_equal(scores.keep, without.scores.keep)
    np.testing.assert_allclose(scores.fitness, without.scores.fitness, rtol=1e-6)
    distinct = {mask.tobytes() for generation in scores.keep for mask in generation}
    assert scores.evaluated.sum() == len(distinct) == int(with_memo.memory.used) < 48
    assert without.scores.evaluated.all() and without.memory == ()
