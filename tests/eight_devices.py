"""Tests that need 8 devices; test_devices.py runs this file in a process of its own."""

import re

import jax

jax.config.update("jax_num_cpu_devices", 8)

# ruff: noqa: E402
import jax.numpy as jnp
import numpy as np
import pytest
from device_problem import TASKS, make_fixed, masks

from enmp_jax.mesh import choose_shape, make_mesh
from enmp_jax.population import make_evaluate, place

COLLECTIVES = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
SHAPES = [
    (p, d, n // (p * d)) for n in (1, 2, 4, 8) for p in (1, 2, 4, 8) for d in (1, 2, 4, 8) if n % (p * d) == 0
]


@pytest.fixture(scope="module")
def problem():
    return make_fixed()


@pytest.fixture(scope="module")
def expected(problem):
    """64 masks, one at a time, on one device."""
    backbone, merge, _, fixed = problem
    evaluate = jax.jit(make_evaluate(backbone, merge, len(TASKS), member_chunk=1))
    return evaluate(fixed, *map(jnp.asarray, masks(64)))


def scores_on(problem, shape, size, **options):
    backbone, merge, _, fixed = problem
    mesh = make_mesh(*shape)
    evaluate = jax.jit(make_evaluate(backbone, merge, len(TASKS), mesh, **options))
    keep, scale = masks(64)
    return evaluate(place(fixed, mesh), keep[:size], scale[:size])


def assert_scores(counts, expected, size):
    np.testing.assert_array_equal(counts.correct, expected.correct[:size])
    np.testing.assert_allclose(counts.log_likelihood, expected.log_likelihood[:size], rtol=1e-6)


def test_the_problem_tells_masks_apart(expected):
    assert len({tuple(row) for row in np.asarray(expected.correct)}) > 8
    assert np.ptp(np.asarray(expected.log_likelihood), axis=0).min() > 0.1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_do_not_depend_on_the_mesh(problem, expected, shape):
    assert_scores(scores_on(problem, shape, 7), expected, 7)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("size", [1, 8, 64])
def test_any_population_size(problem, expected, size, shape):
    assert_scores(scores_on(problem, shape, size), expected, size)


def test_dense_deltas_in_chunks_on_a_mesh():
    problem = make_fixed("ties")
    backbone, merge, _, fixed = problem
    one = jax.jit(make_evaluate(backbone, merge, len(TASKS), member_chunk=1))
    expected = one(fixed, *(jnp.asarray(x[:16]) for x in masks(64)))
    assert_scores(scores_on(problem, (2, 2, 2), 16, member_chunk=3), expected, 16)


def compiled_text(problem, shape):
    backbone, merge, _, fixed = problem
    mesh = make_mesh(*shape)
    evaluate = jax.jit(make_evaluate(backbone, merge, len(TASKS), mesh))
    return evaluate.lower(place(fixed, mesh), *masks(16)).compile().as_text()


def test_the_only_communication_is_the_last_step(problem):
    """One gather for each of the two counts; nothing in the loops over batches and layers."""
    text = compiled_text(problem, (8, 1, 1))
    found = [line for line in text.splitlines() if re.search(COLLECTIVES, line)]
    assert 1 <= len(found) <= 2, found
    assert all(" all-gather" in line and f"f32[16,{len(TASKS)}]" in line for line in found), found
    entry = text[text.index("\nENTRY ") :]
    assert all(line in entry for line in found)  # not in the body of a loop
    # a sharded model does communicate: the search above would have seen it
    assert len(re.findall(COLLECTIVES, compiled_text(problem, (1, 1, 8)))) > 2


def test_base_weights_are_divided_over_the_model_axis(problem):
    fixed = place(problem[-1], make_mesh(1, 2, 4))
    q = next(v for k, v in fixed.params["layers"].items() if k == "q")["weight"]
    down = fixed.params["layers"]["down"]["weight"]
    assert q.sharding.shard_shape(q.shape) == (2, 4, 16)
    assert down.sharding.shard_shape(down.shape) == (2, 16, 8)
    label = fixed.batches[0].label
    assert label.sharding.shard_shape(label.shape) == (label.shape[0], label.shape[1] // 2)


@pytest.mark.parametrize(
    ("devices", "population", "batch_size", "model", "shape"),
    [
        (8, 16, 64, 1, (8, 1)), (8, 7, 64, 1, (8, 1)), (8, 4, 64, 1, (4, 2)), (8, 1, 64, 1, (1, 8)),
        (8, 16, 64, 4, (2, 1)), (8, 9, 64, 1, (2, 4)), (8, 9, 63, 1, (8, 1)), (6, 8, 64, 1, (3, 2)),
        (1, 16, 64, 1, (1, 1)),
    ],
)  # fmt: skip
def test_the_mesh_that_is_chosen(devices, population, batch_size, model, shape):
    chosen = choose_shape(devices, population, batch_size, model)
    assert (chosen["population"], chosen["data"], chosen["model"]) == (*shape, model)
