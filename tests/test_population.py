"""Masks to scores: the compiled population against one model at a time, merged by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enmp_jax import merges
from enmp_jax.deltas import Dense
from enmp_jax.errors import UserError
from enmp_jax.evaluation.population import make_evaluate, make_mesh
from enmp_jax.evaluation.problem import in_populations
from enmp_jax.evaluation.scoring import class_log_probabilities, count


@pytest.fixture(scope="module")
def setting(demo_problem):
    return demo_problem, demo_problem.fixed("search"), jax.jit(demo_problem.evaluator())


def random_masks(problem, n, seed=0):
    return np.random.default_rng(seed).random((n, *problem.mask_spec.shape)) > 0.3


def by_hand(problem, fixed, keep, scale):
    """Counts of one mask, with eager merging and dense deltas, batch by batch."""
    deltas = problem.merge.merge(problem.ingredients, jnp.asarray(keep), scale)
    dense = {name: Dense(delta.materialise()) for name, delta in deltas.items()}
    correct, likelihood = np.zeros(6), np.zeros(6)
    for bucket in fixed.batches:
        for i in range(len(bucket.label)):
            features = problem.backbone.features(
                fixed.params, {k: v[i] for k, v in bucket.inputs.items()}, dense
            )
            scores = class_log_probabilities(fixed.heads, features, bucket.task[i])
            counts = count(scores, bucket.label[i], bucket.task[i], bucket.mask[i], 6)
            correct, likelihood = correct + counts.correct, likelihood + counts.log_likelihood
    return correct, likelihood


def test_a_population_equals_one_model_at_a_time(setting):
    problem, fixed, evaluate = setting
    keep, scale = random_masks(problem, 3), np.asarray([0.3, 0.5, 0.8], np.float32)
    counts = evaluate(fixed, jnp.asarray(keep), jnp.asarray(scale))
    for p in range(3):
        correct, likelihood = by_hand(problem, fixed, keep[p], scale[p])
        np.testing.assert_allclose(counts.log_likelihood[p], likelihood, rtol=1e-4)
        np.testing.assert_array_equal(counts.correct[p], correct)


def test_an_all_kept_mask_is_the_plain_merge_and_scale_zero_the_base(setting):
    problem, fixed, evaluate = setting
    everything = problem.mask_spec.all_kept()
    nothing = np.zeros_like(everything)
    counts = evaluate(fixed, jnp.asarray([everything, everything, nothing]), jnp.asarray([0.5, 0.0, 0.5]))
    _, likelihood = by_hand(problem, fixed, everything, 0.5)
    np.testing.assert_allclose(counts.log_likelihood[0], likelihood, rtol=1e-4)
    np.testing.assert_allclose(counts.log_likelihood[1], counts.log_likelihood[2], rtol=1e-5)
    base = problem.score_base("search")
    np.testing.assert_allclose(counts.log_likelihood[2], base.log_likelihood, rtol=1e-5)


def test_a_pruned_task_is_an_absent_one(setting):
    problem, fixed, evaluate = setting
    keep = problem.mask_spec.all_kept()
    keep[:, 2] = False
    counts = evaluate(fixed, jnp.asarray(keep[None]), jnp.asarray([0.5]))
    others = [0, 1, 3, 4, 5]
    smaller = problem.stack.select(others)
    without = fixed._replace(ingredients=problem.merge.prepare(smaller))
    ones = jnp.ones((1, problem.stack.n_layers, 5))
    absent = jax.jit(make_evaluate(problem.backbone, problem.merge, 6))(without, ones, jnp.asarray([0.5]))
    np.testing.assert_allclose(counts.log_likelihood, absent.log_likelihood, rtol=1e-5)


def test_chunks_and_padding_change_nothing(setting):
    problem, fixed, evaluate = setting
    keep, scale = jnp.asarray(random_masks(problem, 5)), jnp.linspace(0.2, 1.0, 5)
    whole = evaluate(fixed, keep, scale)
    for chunk in (1, 2, 5):
        evaluate_chunks = make_evaluate(problem.backbone, problem.merge, 6, member_chunk=chunk)
        parts = jax.jit(evaluate_chunks)(fixed, keep, scale)
        np.testing.assert_allclose(parts.log_likelihood, whole.log_likelihood, rtol=1e-5)
    host = in_populations(evaluate, fixed, np.asarray(keep), np.asarray(scale), size=3)
    np.testing.assert_allclose(host.log_likelihood, whole.log_likelihood, rtol=1e-5)
    assert host.correct.shape == (5, 6)


def test_experts_are_the_adapters_alone(demo_problem):
    """Against the merge of a single adapter at its own scaling."""
    counts = demo_problem.score_experts("search")
    merge = merges.make("sum")
    for i in (0, 3):
        alone = demo_problem.stack.select([i])
        fixed = demo_problem.fixed("search")._replace(ingredients=merge.prepare(alone))
        ones = jnp.ones((1, demo_problem.stack.n_layers, 1))
        own = jax.jit(make_evaluate(demo_problem.backbone, merge, 6))(fixed, ones, jnp.ones(1))
        np.testing.assert_allclose(counts.log_likelihood[i], own.log_likelihood[0, i], rtol=1e-5)


def test_evaluation_compiles_once_for_all_masks_and_scales(demo_problem):
    before = demo_problem.compilations
    evaluate = jax.jit(demo_problem.evaluator())
    fixed = demo_problem.fixed("search")
    for seed in range(3):
        evaluate(fixed, jnp.asarray(random_masks(demo_problem, 4, seed)), jnp.full(4, 0.1 * (seed + 1)))
    assert demo_problem.compilations == before + 1


def test_projection_masks_with_equal_projections_are_layer_masks(setting):
    problem, fixed, evaluate = setting
    keep = random_masks(problem, 2)
    scale = jnp.asarray([0.5, 0.5])
    fine = np.repeat(keep[:, :, None], len(problem.stack.projections), axis=2)
    np.testing.assert_allclose(
        evaluate(fixed, jnp.asarray(fine), scale).log_likelihood,
        evaluate(fixed, jnp.asarray(keep), scale).log_likelihood,
        rtol=1e-6,
    )


def test_a_mesh_larger_than_the_machine():
    with pytest.raises(UserError, match="needs 4096 devices"):
        make_mesh(population=4096)
