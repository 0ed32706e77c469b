"""Fitness kinds against their definitions in numpy; objectives; what experts have to do with it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from enmp_jax.errors import UserError
from enmp_jax.evaluation import fitness
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.fitness import FITNESS, TEMPERATURES
from enmp_jax.evaluation.scoring import Counts, Scoring, count_examples, sum_by_task

RNG = np.random.default_rng(0)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


LOGITS = log_softmax(RNG.normal(size=(7, 4)) * 2)
EXPERT = log_softmax(RNG.normal(size=(7, 4)) * 2)
LABEL = RNG.integers(0, 4, 7)


def margin(x, chosen):
    return 1 / (1 + np.exp(-(x[chosen] - np.delete(x, chosen).max())))


DEFINITIONS = {
    "accuracy": lambda x, y, e: float(x.argmax() == y),
    "probability": lambda x, y, e: np.exp(x[y]),
    "margin": lambda x, y, e: margin(x, y),
    "log_likelihood": lambda x, y, e: x[y],
    "expert_margin": lambda x, y, e: margin(x, e.argmax()),
    "expert_probability": lambda x, y, e: np.exp(x[e.argmax()]),
    "expert_kl": lambda x, y, e: -np.sum(np.exp(e) * (e - x)),
    "entropy": lambda x, y, e: np.sum(np.exp(x) * x),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_values_are_their_definitions(name):
    got = FITNESS[name].value(jnp.asarray(LOGITS), jnp.asarray(LABEL), jnp.asarray(EXPERT))
    expected = [DEFINITIONS[name](x, y, e) for x, y, e in zip(LOGITS, LABEL, EXPERT, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


def test_every_kind_is_defined_here():
    # the hidden states of expert_hidden, beside the KL divergence, are in test_rivals.py
    assert set(DEFINITIONS) | {"calibrated", "expert_hidden"} == set(FITNESS)


@pytest.mark.parametrize("name", FITNESS)
def test_classes_that_a_task_does_not_have_change_nothing(name):
    """Padding of the heads is -inf; its values and derivatives must be those without it."""
    import jax

    kind, padding = FITNESS[name], np.full((7, 2), -np.inf)
    label = jnp.asarray(LABEL)

    def total(x, pad):
        wide = [jnp.concatenate([a, pad], 1) for a in (x, jnp.asarray(EXPERT))] if pad is not None else [
            x, jnp.asarray(EXPERT)
        ]  # fmt: skip
        return kind.value(wide[0], label, wide[1]).sum()

    x = jnp.asarray(LOGITS)
    np.testing.assert_allclose(total(x, padding), total(x, None), rtol=1e-5)
    if kind.has_gradient:
        np.testing.assert_allclose(
            jax.grad(total)(x, padding), jax.grad(total)(x, None), rtol=1e-4, atol=1e-6
        )


def test_calibrated_is_the_likelihood_at_the_best_temperature_of_each_task():
    task = np.asarray([0, 0, 0, 1, 1, 1, 1])
    sharp = LOGITS * np.where(task == 0, 5.0, 0.3)[:, None]  # task 0 too sure, task 1 not sure enough
    examples = count_examples(
        jnp.asarray(log_softmax(sharp)), jnp.asarray(LABEL), jnp.ones(7, bool), FITNESS["calibrated"]
    )
    counts = sum_by_task(examples, jnp.asarray(task), 2)
    got = fitness.task_values(counts.value, jnp.asarray([3.0, 4.0]), FITNESS["calibrated"])
    for t in range(2):
        rows, labels = sharp[task == t], LABEL[task == t]
        at = [np.mean([log_softmax(r / T)[y] for r, y in zip(rows, labels)]) for T in TEMPERATURES]
        assert float(got[t]) == pytest.approx(max(at), rel=1e-4)


def test_relative_to_the_expert_and_over_tasks():
    """An expert is worth 1 to itself, in every kind; tasks weigh the same, or as one says."""
    scoring = Scoring(*map(jnp.asarray, ([10.0, 4.0], [0.8, 0.5], [0.8, 0.5], [1.0, 3.0])))
    values = jnp.asarray([[8.0, 2.0], [4.0, 2.0]])
    counts = Counts(values, values, values)
    np.testing.assert_allclose(scoring.task_values(counts, FITNESS["margin"]), [[1, 1], [0.5, 1]])
    np.testing.assert_allclose(scoring.fitness(counts, FITNESS["margin"]), [1, (0.5 + 3) / 4])
    np.testing.assert_allclose(scoring.fitness(counts, FITNESS["margin"], "worst"), [1, 0.5])
    front = [1, ((0.5 + 3) / 4 + 0.5) / 2]
    np.testing.assert_allclose(scoring.fitness(counts, FITNESS["margin"], "pareto"), front)
    logs = Counts(values, values, -values)
    own = scoring._replace(expert=jnp.asarray([-0.8, -0.5]))
    expected = [[1, 1], [np.exp(0.4), 1]]
    np.testing.assert_allclose(own.task_values(logs, FITNESS["log_likelihood"]), expected, rtol=1e-6)


def test_weights_of_tasks_are_checked():
    np.testing.assert_array_equal(fitness.importances(("a", "b"), {"b": 2.0}), [1, 2])
    with pytest.raises(UserError, match="unknown task 'bb'; did you mean 'b'"):
        fitness.importances(("a", "b"), {"bb": 2.0})
    with pytest.raises(UserError, match="must be positive"):
        fitness.importances(("a", "b"), {"b": 0.0})
    with pytest.raises(UserError, match="did you mean 'margin'"):
        fitness.get("margn")


@pytest.mark.parametrize("name", FITNESS)
def test_every_kind_scores_a_merge(demo_loaded, name):
    """Through the evaluator: finite, and the experts' own value is what the merge is compared with."""
    run = demo_loaded.run
    run = dataclasses.replace(run, search=dataclasses.replace(run.search, fitness=name))
    evaluator = Evaluator(dataclasses.replace(demo_loaded, run=run))
    inputs, scoring = evaluator.inputs("search"), evaluator.scoring("search")
    keep = evaluator.loaded.mask_spec.all_kept()[None]
    counts = evaluator.score(inputs, keep, np.asarray([0.5], np.float32))
    (value,) = np.asarray(scoring.fitness(counts, evaluator.kind))
    assert 0.05 < value < 3
    if name == "accuracy":
        np.testing.assert_array_equal(scoring.expert, scoring.reference)


def test_answers_that_do_not_fit_are_refused(demo_loaded, monkeypatch):
    from enmp_jax.evaluation import budget

    run = demo_loaded.run
    run = dataclasses.replace(run, search=dataclasses.replace(run.search, fitness="expert_kl"))
    evaluator = Evaluator(dataclasses.replace(demo_loaded, run=run))
    monkeypatch.setattr(budget, "device_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"keeps 60 x 10 answers .* set evaluation.search_examples"):
        evaluator.inputs("search")
