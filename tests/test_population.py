"""Masks to scores: the compiled population against one model at a time, merged by hand."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enmp_jax import merges
from enmp_jax.deltas import Dense
from enmp_jax.devices.mesh import make_mesh
from enmp_jax.errors import UserError
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.population import make_evaluate, score_in_chunks
from enmp_jax.evaluation.scoring import class_log_probabilities, count_examples, sum_by_task


@pytest.fixture(scope="module")
def setting(demo_evaluator):
    inputs = demo_evaluator.inputs("search")
    return demo_evaluator, inputs, jax.jit(demo_evaluator.evaluate(demo_evaluator.plan(inputs)))


def random_masks(evaluator, n, seed=0):
    return np.random.default_rng(seed).random((n, *evaluator.loaded.mask_spec.shape)) > 0.3


def by_hand(evaluator, inputs, keep, scale):
    """Counts of one mask, with eager merging and dense deltas, batch by batch."""
    deltas = evaluator.merge.merge(evaluator.ingredients, jnp.asarray(keep), float(scale))
    dense = {name: Dense(delta.materialise()) for name, delta in deltas.items()}
    correct, likelihood = np.zeros(6), np.zeros(6)
    for bucket in inputs.batches:
        for i in range(len(bucket.label)):
            features = evaluator.loaded.backbone.features(
                inputs.params, {k: v[i] for k, v in bucket.inputs.items()}, dense
            )
            scores = class_log_probabilities(inputs.heads, features, bucket.task[i])
            examples = count_examples(scores, bucket.label[i], bucket.mask[i])
            counts = sum_by_task(examples, bucket.task[i], 6)
            correct, likelihood = correct + counts.correct, likelihood + counts.log_likelihood
    return correct, likelihood


def test_a_population_equals_one_model_at_a_time(setting):
    evaluator, inputs, evaluate = setting
    keep, scale = random_masks(evaluator, 3), np.asarray([0.3, 0.5, 0.8], np.float32)
    counts = evaluate(inputs, jnp.asarray(keep), jnp.asarray(scale))
    for p in range(3):
        correct, likelihood = by_hand(evaluator, inputs, keep[p], scale[p])
        np.testing.assert_allclose(counts.log_likelihood[p], likelihood, rtol=1e-4)
        np.testing.assert_array_equal(counts.correct[p], correct)


def test_an_all_kept_mask_is_the_plain_merge_and_scale_zero_the_base(setting):
    evaluator, inputs, evaluate = setting
    everything = evaluator.loaded.mask_spec.all_kept()
    nothing = np.zeros_like(everything)
    counts = evaluate(inputs, jnp.asarray([everything, everything, nothing]), jnp.asarray([0.5, 0.0, 0.5]))
    _, likelihood = by_hand(evaluator, inputs, everything, 0.5)
    np.testing.assert_allclose(counts.log_likelihood[0], likelihood, rtol=1e-4)
    np.testing.assert_allclose(counts.log_likelihood[1], counts.log_likelihood[2], rtol=1e-5)
    base = evaluator.score_base("search")
    np.testing.assert_allclose(counts.log_likelihood[2], base.log_likelihood, rtol=1e-5)


def test_a_pruned_task_is_an_absent_one(setting):
    evaluator, inputs, evaluate = setting
    keep = evaluator.loaded.mask_spec.all_kept()
    keep[:, 2] = False
    counts = evaluate(inputs, jnp.asarray(keep[None]), jnp.asarray([0.5]))
    others = [0, 1, 3, 4, 5]
    smaller = evaluator.loaded.stack.select(others)
    without = inputs._replace(ingredients=evaluator.merge.prepare(smaller))
    ones = jnp.ones((1, evaluator.loaded.stack.n_layers, 5))
    absent = jax.jit(make_evaluate(evaluator.loaded.backbone, evaluator.merge, 6))(
        without, ones, jnp.asarray([0.5])
    )
    np.testing.assert_allclose(counts.log_likelihood, absent.log_likelihood, rtol=1e-5)


def test_chunks_and_padding_change_nothing(setting):
    evaluator, inputs, evaluate = setting
    keep, scale = jnp.asarray(random_masks(evaluator, 5)), jnp.linspace(0.2, 1.0, 5)
    whole = evaluate(inputs, keep, scale)
    for chunk in (1, 2, 5):
        evaluate_chunks = make_evaluate(evaluator.loaded.backbone, evaluator.merge, 6, member_chunk=chunk)
        parts = jax.jit(evaluate_chunks)(inputs, keep, scale)
        np.testing.assert_allclose(parts.log_likelihood, whole.log_likelihood, rtol=1e-5)
    host = score_in_chunks(partial(evaluate, inputs), np.asarray(keep), np.asarray(scale), size=3)
    np.testing.assert_allclose(host.log_likelihood, whole.log_likelihood, rtol=1e-5)
    assert host.correct.shape == (5, 6)


def test_experts_are_the_adapters_alone(demo_evaluator):
    """Each task's answers against the merge of its adapter alone at its own scaling, and its accuracy."""
    answers, accuracy = demo_evaluator.expert_answers("search"), demo_evaluator.expert_scores("search")
    merge, loaded = merges.make("sum"), demo_evaluator.loaded
    for i in (0, 3):
        alone, examples = loaded.stack.select([i]), loaded.examples["search"][i]
        deltas = merge.merge(merge.prepare(alone), jnp.ones((loaded.stack.n_layers, 1)), 1.0)
        inputs = {name: jnp.asarray(x) for name, x in examples.inputs.items()}
        features = loaded.backbone.features(loaded.params, inputs, deltas)
        own = class_log_probabilities(loaded.heads, features, jnp.full(len(features), i))
        np.testing.assert_allclose(answers[i], own, atol=1e-4)
        right = np.mean(np.asarray(own).argmax(1) == examples.labels)
        assert accuracy[i] == pytest.approx(right)


def test_evaluation_compiles_once_for_all_masks_and_scales(demo_loaded, compilations):
    evaluator = Evaluator(demo_loaded)
    for seed in range(3):
        masks = random_masks(evaluator, 8, seed)
        evaluator.score(evaluator.inputs("search"), masks, np.full(8, 0.1 * (seed + 1), np.float32))
    assert compilations("evaluate") == 1


@pytest.mark.parametrize(("masks", "passes"), [(1, 1), (3, 3), (4, 4), (5, 8)])
def test_a_few_masks_cost_a_few_forward_passes(demo_loaded, masks, passes):
    """What is asked for is paid for, filled up to the chunk of 4 at most: never a population."""
    ran = []

    def features(*args):
        member = jax.tree.leaves(args[2])[0]  # its deltas: under vmap the callback is then called for each
        jax.debug.callback(lambda _: ran.append(1), member.sum())
        return demo_loaded.backbone.features(*args)

    counted = demo_loaded.backbone._replace(features=features)
    run = demo_loaded.run
    run = dataclasses.replace(run, search=dataclasses.replace(run.search, population=16))
    evaluator = Evaluator(dataclasses.replace(demo_loaded, run=run, backbone=counted))
    inputs = evaluator.inputs("search")
    assert evaluator.plan(inputs).member_chunk == 4
    evaluator.score(inputs, random_masks(evaluator, masks), np.full(masks, 0.5, np.float32))
    jax.effects_barrier()
    batches = sum(len(bucket.label) for bucket in inputs.batches)
    assert len(ran) == passes * batches


def test_projection_masks_with_equal_projections_are_layer_masks(setting):
    evaluator, inputs, evaluate = setting
    keep = random_masks(evaluator, 2)
    scale = jnp.asarray([0.5, 0.5])
    fine = np.repeat(keep[:, :, None], len(evaluator.loaded.stack.projections), axis=2)
    np.testing.assert_allclose(
        evaluate(inputs, jnp.asarray(fine), scale).log_likelihood,
        evaluate(inputs, jnp.asarray(keep), scale).log_likelihood,
        rtol=1e-6,
    )


def test_a_mesh_larger_than_the_machine():
    with pytest.raises(UserError, match="needs 4096 devices"):
        make_mesh(population=4096)
