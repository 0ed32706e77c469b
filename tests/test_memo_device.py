"""The memo inside the compiled search: identical fitness, nothing run twice, resumable."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.runs.evolve import make_score
from enmp_jax.runs.evolve_record import MemberScores
from enmp_jax.search import device_memo, loop, strategies
from enmp_jax.search.device_memo import Remembered, Scored


def hashed(keep, scale):
    """A fitness that depends on every bit and the scale."""
    weights = jnp.sin(jnp.arange(1, keep[0].size + 1) * 1.7)
    return keep.reshape(len(keep), -1).astype(jnp.float32) @ weights + scale


def remembering(score, chunk):
    """The memo around a plain ``score(keep, scale) -> fitness``."""

    def scored(keep, scale):
        return Scored(score(keep, scale), jnp.ones(len(keep), bool))

    return device_memo.remembering(device_memo.once(scored, chunk))


def random_masks(n, kinds, seed=0):
    random = np.random.default_rng(seed)
    return (random.random((kinds, 5, 9)) > 0.5)[random.integers(0, kinds, n)]


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_every_mask_is_run_once_and_gets_its_own_fitness(chunk):
    calls = []

    def score(keep, scale):
        jax.debug.callback(lambda k: calls.append(np.asarray(k)), keep)
        return hashed(keep, scale)

    step = jax.jit(remembering(score, chunk))
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
    step = remembering(lambda keep, scale: jnp.full(len(keep), jnp.nan), 2)
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
    found, memo = remembering(hashed, 2)(memo, new, scale[:5])
    np.testing.assert_allclose(found.fitness, hashed(new, scale[:5]), rtol=1e-6)
    np.testing.assert_array_equal(found.evaluated, [False] * 4 + [True])


def test_estimates_are_not_remembered():
    """Masks whose fitness is an estimate are run again when they come again, the others are not."""

    def evaluate(new, keep, scale):
        return Scored(hashed(keep, scale), jnp.arange(len(keep)) % 2 == 0)

    step = device_memo.remembering(evaluate)
    keep, scale = random_masks(40, 40)[:6], np.ones(6, np.float32)
    keep[0, 0], keep[1, 0], keep[2, 0] = True, False, [True] * 4 + [False] * 5  # three that differ
    keep = keep[[0, 1, 2, 0]]  # the estimate at 1, and a copy of 0, whose own fitness is an estimate
    found, memo = step(device_memo.start(9, (5, 9)), keep, scale[:4])
    assert found.evaluated.tolist() == [True] * 3 + [False] and int(memo.used) == 2
    again, memo = step(memo, keep, scale[:4])
    assert again.evaluated.tolist() == [False, True, False, False] and int(memo.used) == 2
    assert again.final.tolist() == [True, False, True, True]


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
    plan = evaluator.plan(inputs)
    evaluate = evaluator.evaluate(plan)

    def plain(genomes, memo, inputs, scoring, scale):
        keep = jax.vmap(spec.decode)(genomes)
        fitness = scoring.fitness(evaluate(inputs, keep, jnp.full(6, scale)), evaluator.kind)
        return Remembered(fitness, fitness > 0, fitness > 0, keep), memo

    with_memo, without = (
        loop.run(
            loop.make_step(strategy, score, 4), jax.random.key(0), mean, 8, operands=operands, memory=memory
        )
        for score, memory in ((make_score(evaluator, plan), memo), (plain, ()))
    )
    scores: MemberScores = with_memo.scores
    np.testing.assert_array_equal(with_memo.genomes, without.genomes)
    np.testing.assert_array_equal(scores.keep, without.scores.details)
    np.testing.assert_allclose(scores.fitness, without.scores.fitness, rtol=1e-6)
    distinct = {mask.tobytes() for generation in scores.keep for mask in generation}
    assert scores.evaluated.sum() == len(distinct) == int(with_memo.memory.used) < 48
    np.testing.assert_array_equal(scores.cost, scores.evaluated)
    np.testing.assert_allclose(scores.mean[scores.evaluated], scores.fitness[scores.evaluated], rtol=1e-6)
    assert np.isnan(scores.mean[~scores.evaluated]).all() and scores.final.all()
