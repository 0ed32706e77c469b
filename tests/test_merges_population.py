"""Deltas whose core reaches all inputs itself (no right factor): a population scores as dense weights do."""

import jax
import jax.numpy as jnp
import numpy as np

from enmp_jax import merges
from enmp_jax.deltas import Dense, LowRank
from enmp_jax.evaluation.evaluator import ExecutionPlan
from enmp_jax.merges.base import Merge


def test_knots_ties_in_a_population_equals_dense_weights(demo_evaluator) -> None:
    merge = merges.make("ties", "knots", density=0.4)
    ingredients = merge.prepare(demo_evaluator.loaded.stack)
    inputs = demo_evaluator.inputs("search")._replace(ingredients=ingredients)
    keep = np.random.default_rng(0).random((3, *demo_evaluator.loaded.mask_spec.shape)) > 0.3
    scale = jnp.asarray([0.3, 0.5, 0.8], jnp.float32)
    deltas = jax.eval_shape(merge.merge, ingredients, jnp.asarray(keep[0]), 1.0)
    assert all(isinstance(delta, LowRank) and delta.right is None for delta in deltas.values())

    def materialised(ingredients, keep, scale):
        found = merge.merge(ingredients, keep, scale)
        return {name: Dense(delta.materialise()) for name, delta in found.items()}

    ours = jax.jit(demo_evaluator.evaluate(ExecutionPlan(merge, 4)))(inputs, jnp.asarray(keep), scale)
    dense = jax.jit(demo_evaluator.evaluate(ExecutionPlan(Merge(merge.prepare, materialised), 4)))(
        inputs, jnp.asarray(keep), scale
    )
    np.testing.assert_allclose(ours.log_likelihood, dense.log_likelihood, rtol=1e-4)
    np.testing.assert_array_equal(ours.correct, dense.correct)
    assert np.ptp(np.asarray(ours.log_likelihood), axis=0).min() > 1e-3  # the masks matter
