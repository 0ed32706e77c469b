"""Heads, counts and fitness against plain numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from enmp_jax.evaluation.scoring import (
    class_log_probabilities,
    count_examples,
    mean_normalised,
    stack_heads,
    sum_by_task,
)

RNG = np.random.default_rng(0)


def log_softmax(x):
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


@pytest.mark.parametrize("normalise", [False, True])
def test_every_example_is_scored_by_its_own_head(normalise):
    raw = [(RNG.normal(size=(3, 4)), RNG.normal(size=3)), (RNG.normal(size=(5, 4)), None)]
    heads = stack_heads(raw, masked=[(), (2,)], normalise=normalise, logit_scale=2.0)
    features, task = RNG.normal(size=(6, 4)), np.array([0, 1, 1, 0, 1, 0])
    got = np.asarray(class_log_probabilities(heads, jnp.asarray(features), jnp.asarray(task)))
    for row, f, t in zip(got, features, task):
        f = f / np.linalg.norm(f) if normalise else f
        weight, bias = raw[t]
        logits = 2.0 * (weight @ f) + (0 if bias is None else bias)
        if t == 1:
            logits[2] = -np.inf
        np.testing.assert_allclose(row[: len(logits)], log_softmax(logits), atol=2e-6)
        assert np.all(np.isneginf(row[len(logits) :]))


def test_counts_leave_padding_out():
    scores = jnp.log(jnp.asarray([[0.7, 0.3], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5]]))
    label, task = jnp.asarray([0, 0, 0, 1]), jnp.asarray([0, 0, 1, 1])
    examples = count_examples(scores, label, jnp.asarray([True, True, True, False]))
    counts = sum_by_task(examples, task, 3)
    np.testing.assert_array_equal(counts.correct, [1, 1, 0])
    expected = [np.log(0.7) + np.log(0.2), np.log(0.6), 0]
    np.testing.assert_allclose(counts.log_likelihood, expected, rtol=1e-6)


def test_an_impossible_label_in_padding_gives_no_nan():
    scores = jnp.asarray([[0.0, -jnp.inf]])
    examples = count_examples(scores, jnp.asarray([1]), jnp.asarray([False]))
    counts = sum_by_task(examples, jnp.asarray([0]), 1)
    assert np.all(np.isfinite(counts.log_likelihood))


def test_mean_normalised():
    accuracy = {"a": 0.4, "b": 0.5}
    assert mean_normalised(accuracy, {"a": 0.8, "b": 0.5}) == pytest.approx(0.75)
