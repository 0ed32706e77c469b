"""Factors or full matrices: the same scores, chosen by what they cost and by the memory there is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enmp_jax import merges
from enmp_jax.deltas import Dense, LowRank
from enmp_jax.evaluation import delta_format
from enmp_jax.evaluation.population import make_evaluate

KEEP = (12, 8)
MANY, ROOM = 25_600, 10**9


def shapes(width: int = 768, rank: int = 16) -> merges.Merge:
    """A method whose deltas have the shapes of ViT-B/32 with eight adapters; nothing is computed."""
    k, layers = rank * KEEP[1], KEEP[0]

    def merge(ingredients, keep, scale):
        square = LowRank(
            jnp.zeros((layers, width, k)), jnp.zeros((layers, k, k)), jnp.zeros((layers, k, width))
        )
        open_ = LowRank(jnp.zeros((layers, width, k)), jnp.zeros((layers, k, width)), None)
        return {"q": square, "v": open_, "o": Dense(jnp.zeros((layers, width, width)))}

    return merges.Merge(lambda stack: None, merge)


def chosen(**options) -> set[str]:
    method = shapes()
    given = {"tokens": MANY, "batches": 8, "free_bytes": ROOM} | options
    formed = delta_format.choose(method, None, KEEP, **given)
    deltas = jax.eval_shape(formed.merge, None, jnp.ones(KEEP, bool), 1.0)
    assert {name: delta.weight.shape for name, delta in deltas.items() if isinstance(delta, Dense)}
    return {name for name, delta in deltas.items() if isinstance(delta, Dense)}


def test_many_tokens_pay_for_full_matrices():
    assert chosen() == {"q", "v", "o"}
    assert chosen(tokens=64, batches=1) == {"o"}


def test_a_batch_for_every_few_tokens_does_not_pay():
    assert chosen(tokens=MANY, batches=2000) == {"o"}


def test_full_matrices_need_memory():
    two = 2 * 12 * 768 * 768 * 4
    assert chosen(free_bytes=two) == {"q", "v", "o"}
    assert chosen(free_bytes=two - 1) == {"o"}


@pytest.mark.parametrize("method, space", [("sum", "full"), ("ties", "knots"), ("ties", "full")])
def test_both_forms_score_alike(demo_evaluator, method, space):
    evaluator, merge = demo_evaluator, merges.make(method, space)
    inputs = evaluator.inputs("search")._replace(ingredients=merge.prepare(evaluator.loaded.stack))
    keep = np.random.default_rng(0).random((3, *evaluator.loaded.mask_spec.shape)) > 0.3
    scale = np.full(3, 0.4, np.float32)
    full = delta_format.with_full(merge, list(evaluator.loaded.stack.pairs))
    results = [
        jax.jit(make_evaluate(evaluator.loaded.backbone, m, len(evaluator.loaded.tasks)))(inputs, keep, scale)
        for m in (merge, full)
    ]
    np.testing.assert_allclose(results[0].log_likelihood, results[1].log_likelihood, rtol=2e-5)
    np.testing.assert_array_equal(results[0].correct, results[1].correct)


def test_an_evaluator_plans_its_population(demo_evaluator):
    """Thousands of tokens on a small model: full matrices."""
    merge = merges.make("sum")
    inputs = demo_evaluator.inputs("search")._replace(ingredients=merge.prepare(demo_evaluator.loaded.stack))
    formed, chunk = demo_evaluator.plan(inputs, merge)
    deltas = jax.eval_shape(
        formed.merge, inputs.ingredients, jnp.ones(demo_evaluator.loaded.mask_spec.shape, bool), 1.0
    )
    assert all(isinstance(delta, Dense) for delta in deltas.values()) and chunk == 4
