"""What rival methods need: matching the experts' hidden states, and masks of singular components."""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_problem import TASKS, make_inputs, random_stack

from enmp_jax import merges
from enmp_jax.config import run_file
from enmp_jax.errors import UserError
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.fitness import FITNESS, state_distance
from enmp_jax.evaluation.kinds import pooled_states
from enmp_jax.evaluation.loaded_run import LoadedRun
from enmp_jax.evaluation.population import count_all
from enmp_jax.evaluation.scoring import Scoring, class_log_probabilities
from enmp_jax.lora import LoraPair, LoraStack
from enmp_jax.merges.components import singular_components
from enmp_jax.search.gradient import straight_through

HIDDEN = FITNESS["expert_hidden"]


def with_own_expert(inputs, backbone, merge):
    """The inputs with answers and hidden states of task 0's adapter as every task's expert."""
    keep = jnp.zeros((2, len(TASKS))).at[:, 0].set(1.0)
    deltas, made = merge.merge(inputs.ingredients, keep, 1.0), []
    for bucket in inputs.batches:
        rows = [jax.tree.map(lambda x, b=b: x[b], bucket) for b in range(len(bucket.label))]
        states = [pooled_states(backbone, inputs.params, row, deltas) for row in rows]
        answers = [
            class_log_probabilities(inputs.heads, s[:, -1], r.task) for s, r in zip(states, rows, strict=True)
        ]
        made.append(bucket._replace(expert=jnp.stack(answers), states=jnp.stack(states)))
    return inputs._replace(batches=tuple(made))


@pytest.fixture(scope="module")
def problem():
    backbone, merge, _, inputs = make_inputs("sum")
    return backbone, merge, with_own_expert(inputs, backbone, merge)


def fitness(problem, weights, scale=0.5):
    backbone, merge, inputs = problem
    ones = jnp.ones(len(TASKS))
    deltas = merge.merge(inputs.ingredients, weights, scale)
    counts = count_all(backbone, inputs, deltas, len(TASKS), HIDDEN, remat=True)
    return Scoring(ones * 7, ones, 0 * ones, ones).fitness(counts, HIDDEN)


def test_the_expert_itself_is_matched_and_nothing_else_is(problem):
    own = jnp.zeros((2, len(TASKS))).at[:, 0].set(1.0)
    assert float(fitness(problem, own, 1.0)) == pytest.approx(1.0, abs=1e-5)
    assert float(fitness(problem, own, 0.5)) < 0.95


def test_hidden_states_count_beside_the_answers(problem):
    """The value is that of expert_kl less the mean relative distance of the pooled states."""
    backbone, merge, inputs = problem
    deltas = merge.merge(inputs.ingredients, jnp.ones((2, len(TASKS))), 0.5)
    both, answers = (
        count_all(backbone, inputs, deltas, len(TASKS), kind).value for kind in (HIDDEN, FITNESS["expert_kl"])
    )
    distance = np.zeros(len(TASKS))
    for bucket in inputs.batches:
        for b in range(len(bucket.label)):
            row = jax.tree.map(lambda x, b=b: x[b], bucket)
            d = state_distance(pooled_states(backbone, inputs.params, row, deltas), row.states)
            np.add.at(distance, np.asarray(row.task)[row.mask], np.asarray(d)[row.mask])
    np.testing.assert_allclose(answers - both, distance, rtol=1e-4)
    assert distance.min() > 0.01


def test_the_last_pooled_states_are_the_features(problem):
    backbone, merge, inputs = problem
    deltas = merge.merge(inputs.ingredients, jnp.ones((2, len(TASKS))), 0.5)
    row = jax.tree.map(lambda x: x[0], inputs.batches[0])
    states = pooled_states(backbone, inputs.params, row, deltas)
    assert states.shape[1] == backbone.n_layers
    features = backbone.features(inputs.params, row.inputs, deltas)
    np.testing.assert_allclose(states[:, -1], features, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_expert_hidden_is_the_finite_difference(problem):
    value = jax.jit(lambda w: fitness(problem, w))
    weights = jnp.asarray(np.random.default_rng(1).uniform(0.5, 1.5, (2, len(TASKS))), jnp.float32)
    got, step = np.asarray(jax.jit(jax.grad(value))(weights)), 1e-2
    for index in np.ndindex(*weights.shape):
        up, down = value(weights.at[index].add(step)), value(weights.at[index].add(-step))
        assert got[index] == pytest.approx(
            float(up - down) / (2 * step), abs=2e-3 + 0.02 * float(abs(got).max())
        )
    assert np.abs(got).max() > 1e-3


def test_a_run_follows_expert_hidden(demo_loaded):
    """Through the evaluator, as a run file asks for it; the experts' states are cached."""
    search = dataclasses.replace(demo_loaded.run.search, fitness="expert_hidden")
    run = dataclasses.replace(demo_loaded.run, search=search)
    evaluator = Evaluator(dataclasses.replace(demo_loaded, run=run))
    inputs, scoring = evaluator.inputs("search"), evaluator.scoring("search")
    first = dataclasses.replace(demo_loaded, run=run).mask_spec.all_kept()
    found = evaluator.fitness_of(inputs, scoring, np.stack([first, ~first]), 0.5)
    assert 0 < found[1] < found[0] < 1  # the base is farther from the experts than the merged model
    again = Evaluator(dataclasses.replace(demo_loaded, run=run)).inputs("search")
    np.testing.assert_array_equal(again.batches[0].states, inputs.batches[0].states)


def test_expert_hidden_is_refused_where_it_means_nothing(demo_loaded):
    run = dataclasses.replace(
        demo_loaded.run,
        search=dataclasses.replace(demo_loaded.run.search, fitness="expert_hidden", fidelity="racing"),
    )
    with pytest.raises(UserError, match="expert_hidden, which looks at hidden states: take expert_kl"):
        run_file.check(run)
    generative = argparse.Namespace(kinds=("classification", "choice"))
    with pytest.raises(UserError, match="search.fitness expert_hidden compares hidden states of class"):
        LoadedRun.check_fitness(generative, "search.fitness", HIDDEN, [])


def ragged_stack():
    """A stack whose tasks differ in rank; one lacks a module."""
    backbone, _, stack, _ = make_inputs("sum")
    pairs = {}
    for j, (name, pair) in enumerate(random_stack(backbone, rank=3).pairs.items()):
        ranks = np.full((2, len(TASKS)), 3)
        ranks[:, 1] = 2
        if j == 0:
            ranks[1, 2] = 0
        live = np.arange(3) < ranks[..., None]
        pairs[name] = LoraPair(
            pair.a * live[..., None], pair.b * live[:, :, None], tuple(map(tuple, ranks.tolist()))
        )
    return LoraStack(pairs, stack.tasks)


def test_components_add_up_to_the_adapters_largest_first():
    stack = ragged_stack()
    parts = singular_components(stack)
    assert parts.tasks[:4] == ("a#0", "a#1", "a#2", "b#0")
    for name, pair in stack.pairs.items():
        whole = jnp.einsum("ltor,ltri->ltoi", pair.b, pair.a)
        part = parts.pairs[name]
        single = jnp.einsum("ltor,ltri->ltoi", part.b, part.a).reshape(2, 3, 3, *whole.shape[2:])
        np.testing.assert_allclose(single.sum(axis=2), whole, atol=2e-5)
        norms = np.linalg.norm(np.asarray(single), axis=(-2, -1))
        assert (np.diff(norms, axis=-1) <= 1e-5).all()
        expected = np.arange(3) < np.asarray(pair.rank)[..., None]
        np.testing.assert_array_equal(part.present, expected.reshape(2, 9))
        np.testing.assert_array_equal(norms > 1e-4, expected)


def test_a_mask_of_components_is_a_mask_of_the_sum():
    stack = ragged_stack()
    merge, parts = merges.make("sum"), singular_components(stack)
    kept = merge.merge(merge.prepare(parts), jnp.ones((2, 9)).at[:, [2, 5, 8]].set(0.0), 0.7)
    for name, pair in stack.pairs.items():
        for layer in range(2):
            total = np.zeros(pair.shape)
            for i in range(3):
                u, s, vt = np.linalg.svd(np.asarray(pair.b[layer, i] @ pair.a[layer, i]))
                total += 0.7 * (u[:, :2] * s[:2]) @ vt[:2]
            np.testing.assert_allclose(kept[name].materialise()[layer], total, atol=5e-5)


def test_straight_through_masks_are_binary_and_have_a_slope():
    logits = jnp.asarray([-3.0, -1e-6, 0.0, 1e-6, 0.1, 5.0])
    np.testing.assert_array_equal(straight_through(logits, 10.0), [0, 0, 0, 1, 1, 1])
    slope = jax.grad(lambda x: (straight_through(x, 10.0) * jnp.arange(1.0, 7.0)).sum())(logits)
    soft = jax.nn.sigmoid(logits / 10)
    np.testing.assert_allclose(slope, jnp.arange(1.0, 7.0) * soft * (1 - soft) / 10, rtol=1e-5)
