"""Norms, angles and random adapters, against the full matrices."""

import jax
import numpy as np
from test_masks import make_stack

from enmp_jax.lora import stack_adapters
from enmp_jax.masks import MaskSpec
from enmp_jax.search import controls
from enmp_jax.search.geometry import cosines, norms, random_like

RNG = np.random.default_rng(0)


def stack():
    """Three layers, two projections, three tasks of ranks 2, 3 and 1; one task lacks a module."""
    adapters = {
        task: {
            f"layers.{i}.{p}": (RNG.normal(size=(rank, 6)), RNG.normal(size=(5, rank)))
            for i in range(3)
            for p in "qk"
        }
        for task, rank in (("a", 2), ("b", 3), ("c", 1))
    }
    del adapters["c"]["layers.1.q"]
    return stack_adapters(adapters)


def deltas(stack):
    """[layer, projection, task, out, in]."""
    return np.stack(
        [np.asarray(stack.pairs[n].b) @ np.asarray(stack.pairs[n].a) for n in stack.projections], axis=1
    ).astype(float)


def test_norms_and_cosines_are_those_of_the_full_matrices():
    full = deltas(made := stack())
    for granularity in ("layer", "projection"):
        spec = MaskSpec.of(made, granularity)
        flat = full if granularity == "projection" else np.moveaxis(full, 1, 2)
        flat = flat.reshape(*spec.shape, -1)
        own = np.linalg.norm(flat, axis=-1)
        others = flat.sum(axis=-2, keepdims=True) - flat
        known = (flat * others).sum(-1) / np.maximum(own * np.linalg.norm(others, axis=-1), 1e-30)
        present = spec.present()
        np.testing.assert_allclose(norms(made, spec)[present], own[present], rtol=1e-5)
        np.testing.assert_allclose(cosines(made, spec)[present], known[present], rtol=1e-4, atol=1e-6)
        assert np.isnan(norms(made, spec)[~present]).all() and np.isnan(cosines(made, spec)[~present]).all()


def test_random_adapters_have_the_norms_and_ranks_and_nothing_else():
    made = stack()
    drawn, full = random_like(made, 0), deltas(made)
    found = deltas(drawn)
    np.testing.assert_allclose(
        np.linalg.norm(found, axis=(-2, -1)), np.linalg.norm(full, axis=(-2, -1)), rtol=1e-5
    )
    ranks = np.stack([made.pairs[n].rank for n in made.projections], axis=1)
    assert (np.linalg.matrix_rank(found, tol=1e-4) == ranks).all()
    assert {n: p.rank for n, p in drawn.pairs.items()} == {n: p.rank for n, p in made.pairs.items()}
    present = ranks > 0
    cosine = (found * full).sum((-2, -1))[present] / (full**2).sum((-2, -1))[present]
    assert np.abs(cosine).max() < 0.9 and np.abs(cosine.mean()) < 0.3
    assert not np.allclose(found, deltas(random_like(made, 1)))
    np.testing.assert_array_equal(found, deltas(random_like(made, 0)))


def test_shuffled_masks_keep_their_values_on_modules_that_exist():
    spec = MaskSpec.of(make_stack(missing=[(1, "q_proj", "dtd"), (1, "v_proj", "dtd")]), max_pruned=0.5)
    weights = np.where(spec.present(), RNG.random(spec.shape), 1).astype(np.float32)
    found = controls.shuffled(jax.random.key(0), spec, weights, 200)
    assert found.dtype == weights.dtype and (found[:, ~spec.present()] == 1).all()
    values = np.sort(found[:, spec.present()], axis=1)
    assert (values == np.sort(weights[spec.present()])).all()
    assert len(np.unique(found.reshape(200, -1), axis=0)) == 200
    mean = found[:, spec.present()].mean(axis=0)  # every value is as likely everywhere
    assert np.abs(mean - weights[spec.present()].mean()).max() < 0.1
    mask = spec.keep_from_pruned([(0, "dtd")])
    assert ((~controls.shuffled(jax.random.key(1), spec, mask, 9)).sum((1, 2)) == 1).all()
