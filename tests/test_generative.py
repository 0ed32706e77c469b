"""Choices and completions in evaluation: against plain computations, in one run, from search to refine."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generative_files import loaded_run, save_all, save_tokenizer

from enmp_jax.errors import UserError
from enmp_jax.evaluation import experts
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.fitness import FITNESS
from enmp_jax.evaluation.generation import generated_scores
from enmp_jax.evaluation.loaded_run import load
from enmp_jax.evaluation.text_metrics import METRICS


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("generative"))


def with_fitness(loaded, fitness):
    search = dataclasses.replace(loaded.run.search, fitness=fitness)
    return Evaluator(dataclasses.replace(loaded, run=dataclasses.replace(loaded.run, search=search)))


@pytest.fixture(scope="module")
def loaded(root):
    return load(loaded_run(root))


def dense(loaded, weights, made={}):  # noqa: B006 (kept on purpose: one compilation for all tests)
    """Params with adapters times weights added to the base's, and the next-token logits of one text."""
    if (id(loaded), weights) in made:
        return made[id(loaded), weights]
    params = dict(loaded.params)
    layers = {name: dict(entry) for name, entry in params["layers"].items()}
    for template, pair in loaded.stack.pairs.items():
        name = {"q_proj": "q", "v_proj": "v", "down_proj": "down"}[template.rsplit(".", 1)[-1]]
        products = np.einsum("ltor,ltri->ltoi", np.asarray(pair.b), np.asarray(pair.a))
        layers[name]["weight"] = layers[name]["weight"] + np.einsum("t,ltoi->loi", weights, products)
    params["layers"] = layers

    @jax.jit
    def logits(ids, length):
        inputs = {"input_ids": ids, "attention_mask": (jnp.arange(ids.shape[1]) < length)[None].astype(int)}
        stream = loaded.backbone.embed(params, inputs)._replace(token=None)
        return jax.nn.log_softmax(loaded.backbone.logits(params, loaded.backbone.run(params, stream))[0])

    made[id(loaded), weights] = logits
    return logits


def full_logits(loaded, ids, weights):
    """Next-token log-probabilities of one whole sequence, which shares nothing with another."""
    padded = np.pad(np.asarray(ids, np.int32), (0, 48 - len(ids)))
    return np.asarray(dense(loaded, weights)(padded[None], len(ids)))[: len(ids)]


def sequences(examples, row):
    """(prompt + answer, length of the prompt) of every answer of an example, from the packed row."""
    inputs = {name: x[row] for name, x in examples.inputs.items()}
    prompt = inputs["input_ids"][: inputs["target_from"][0] + 1]
    for branch in range(1, inputs["target_branch"].max() + 1):
        yield [*prompt, *inputs["target_ids"][inputs["target_branch"] == branch]], len(prompt)


def at_answer(loaded, ids, start, weights):
    """Log-probabilities [target, vocabulary] at the tokens from ``start`` on, and those tokens."""
    return full_logits(loaded, ids, weights)[start - 1 : -1], np.asarray(ids[start:])


def expected_counts(loaded, weights, made={}):  # noqa: B006 (see dense)
    """Units, correct, log-likelihood of both tasks on the search split, one sequence at a time."""
    if (id(loaded), weights) not in made:
        made[id(loaded), weights] = _expected_counts(loaded, weights)
    return made[id(loaded), weights]


def _expected_counts(loaded, weights):
    say, pick = loaded.examples["search"]
    tokens = [at_answer(loaded, *s, weights) for row in range(len(say.labels)) for s in sequences(say, row)]
    x, target = np.concatenate([t[0] for t in tokens]), np.concatenate([t[1] for t in tokens])
    own = x[np.arange(len(target)), target]
    correct, found = [(x.argmax(1) == target).sum()], [own.sum()]
    right, total = 0, 0.0
    for row, label in enumerate(pick.labels):
        scores = []
        for ids, start in sequences(pick, row):
            lp, wanted = at_answer(loaded, ids, start, weights)
            scores.append(lp[np.arange(len(wanted)), wanted].mean())
        scores = np.asarray(scores) - np.logaddexp.reduce(scores)
        right, total = right + (scores.argmax() == label), total + scores[label]
    return [len(target), len(pick.labels)], [*correct, right], [*found, total], x, target


def test_losses_and_choices_equal_a_plain_computation(loaded):
    """One sequence at a time, full logits, dense weights."""
    evaluator = with_fitness(loaded, "log_likelihood")
    keep, scale = np.ones((1, 2, 2), bool), np.asarray([0.5], np.float32)
    counts = evaluator.score(evaluator.inputs("search"), keep, scale)
    units, correct, found, *_ = expected_counts(loaded, (0.5, 0.5))
    np.testing.assert_array_equal(loaded.units("search"), units)
    np.testing.assert_array_equal(counts.correct[0], correct)
    np.testing.assert_allclose(counts.log_likelihood[0], found, rtol=2e-5)
    np.testing.assert_allclose(counts.value[0], found, rtol=2e-5)
    assert loaded.kinds == ("completion", "choice")


@pytest.mark.parametrize("fitness", [name for name, kind in FITNESS.items() if not kind.hidden])
def test_every_fitness_of_completions_is_that_of_the_whole_vocabulary(loaded, fitness):
    """Over all targets, with the tokens as classes; the expert's answers from its own plain logits."""
    kind = FITNESS[fitness]
    evaluator = with_fitness(loaded, fitness)
    counts = evaluator.score(evaluator.inputs("search"), np.ones((1, 2, 2), bool), np.full(1, 0.5, "f"))
    *_, x, target = expected_counts(loaded, (0.5, 0.5))
    *_, expert, _ = expected_counts(loaded, (1.0, 0.0))
    each = np.asarray(kind.value(jnp.asarray(x), jnp.asarray(target), jnp.asarray(expert)))
    if fitness == "expert_kl":  # of 20 tokens and the rest: a little less than of all
        assert each.sum() < counts.value[0, 0] < 0
        order = np.argsort(-expert, axis=1)[:, :20]
        p, q = (np.take_along_axis(y, order, axis=1) for y in (expert, x))
        p, q = (np.concatenate([y, np.log1p(-np.exp(y).sum(1, keepdims=True))], axis=1) for y in (p, q))
        each = (np.exp(p) * (q - p)).sum(1)
    np.testing.assert_allclose(counts.value[0, 0], each.sum(0), rtol=2e-4)
    if fitness == "accuracy":  # of a random model
        with pytest.raises(UserError, match="'say' alone has accuracy 0 on search: take another fitness"):
            evaluator.scoring("search")
        return
    own = np.asarray(evaluator.scoring("search").expert)[0]
    alone = (
        np.asarray(kind.value(jnp.asarray(expert), jnp.asarray(target), jnp.asarray(expert))).mean(0).max()
    )
    np.testing.assert_allclose(own, alone, rtol=2e-4, atol=1e-6)


def test_the_expert_alone_scores_one_and_its_answers_are_kept(loaded, monkeypatch):
    evaluator = with_fitness(loaded, "expert_kl")
    scoring = evaluator.scoring("search")
    for task in range(2):
        keep = np.zeros((1, 2, 2), bool)
        keep[..., task] = True
        counts = evaluator.score(evaluator.inputs("search"), keep, np.ones(1, np.float32))
        normalised = np.asarray(scoring.scores(counts) / scoring.reference)[0, task]
        assert normalised == pytest.approx(1, rel=1e-5)
        assert np.asarray(scoring.task_values(counts, evaluator.kind))[0, task] == pytest.approx(1, abs=1e-5)
        losses = np.asarray(scoring.loss(counts))[0, task]
        assert evaluator.expert_losses("search")[task] == pytest.approx(losses, rel=1e-5)
    # exp(expert's loss - loss) under any mask
    counts = evaluator.score(evaluator.inputs("search"), np.ones((1, 2, 2), bool), np.ones(1, np.float32))
    score = (scoring.scores(counts) / scoring.reference)[0, 0]
    gap = evaluator.expert_losses("search")[0] - scoring.loss(counts)[0, 0]
    assert float(score) == pytest.approx(float(np.exp(gap)), rel=1e-5)
    # from the cache, the same
    monkeypatch.setattr(experts, "_compute", None)
    again = experts.answers(loaded, "search")
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(evaluator.expert_answers("search")), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("norm", ["none", "token", "character"])
def test_choices_are_compared_by_their_length(root, norm):
    loaded = load(loaded_run(root, ("pick",), f", choice_norm: {norm}"), ("search",))
    evaluator = Evaluator(loaded)
    (pick,), answers = loaded.examples["search"], evaluator.expert_answers("search")[0]
    for row in range(len(pick.labels)):
        scores = []
        for c, (ids, start) in enumerate(sequences(pick, row)):
            lp, wanted = at_answer(loaded, ids, start, (1.0,))
            length = {"none": 1, "token": len(wanted), "character": pick.inputs["choice_length"][row, c]}[
                norm
            ]
            scores.append(lp[np.arange(len(wanted)), wanted].sum() / length)
        n = len(scores)
        expected = np.asarray(scores) - np.logaddexp.reduce(scores)
        np.testing.assert_allclose(answers[row, :n], expected, rtol=1e-4, atol=1e-5)
        assert np.isneginf(answers[row, n:]).all()


def test_masks_from_a_parent_score_as_from_the_start(loaded):
    evaluator = with_fitness(loaded, "margin")
    keep = np.ones((5, 2, 2), bool)
    keep[[1, 2, 3, 4], [0, 0, 1, 1], [0, 1, 0, 1]] = False
    inputs = evaluator.inputs("search")
    plan = evaluator.plan(inputs)._replace(member_chunk=1)
    whole = evaluator.score(inputs, keep, np.full(5, 0.5, np.float32), plan)
    reused = evaluator.score_from(inputs, keep[0], keep, 0.5, plan)
    assert plan in evaluator._compiled_from
    for a, b in zip(whole, reused, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_gradients_are_those_of_finite_differences(loaded):
    evaluator = with_fitness(loaded, "expert_kl")
    fitness = jax.jit(evaluator.relaxed_fitness())
    inputs, scoring = evaluator.inputs("search"), evaluator.scoring("search")
    weights = jnp.full((2, 2), 0.7)
    value = lambda w: fitness(w, inputs, scoring, jnp.float32(0.5))  # noqa: E731
    gradient = np.asarray(jax.grad(value)(weights))
    for i in np.ndindex(2, 2):
        step = np.zeros((2, 2), "f")
        step[i] = 1e-2
        difference = float(value(weights + step) - value(weights - step)) / 2e-2
        assert gradient[i] == pytest.approx(difference, rel=0.03, abs=2e-4)


def greedy(loaded, prompt, weights, most, end):
    """The likeliest next token again and again, by whole forward passes."""
    ids = list(prompt)
    while len(ids) - len(prompt) < most and ids[-1] != end:
        ids.append(int(full_logits(loaded, ids, weights)[-1].argmax()))
    return ids[len(prompt) :]


def test_generated_answers_are_the_greedy_ones(loaded, tmp_path):
    say, pick = loaded.run.tasks
    say = dataclasses.replace(say, metrics=("chrf", "contains"))
    run = dataclasses.replace(loaded.run, tasks=(say, pick))
    evaluator = Evaluator(dataclasses.replace(loaded, run=run))
    tokenizer = save_tokenizer(tmp_path)
    found = generated_scores(evaluator, "search", {"merged": (np.ones((2, 2), bool), 0.5)})
    assert set(found) == {"say"}
    examples = loaded.examples["search"][0]
    rows = [next(iter(sequences(examples, row))) for row in range(len(examples.labels))]
    wanted = [tokenizer.decode(ids[start:], skip_special_tokens=True) for ids, start in rows]
    end, most = tokenizer.eos_token_id, max(len(ids) - start for ids, start in rows)
    for name, weights in (("merged", (0.5, 0.5)), ("reference", (1.0, 0.0))):
        made = [greedy(loaded, ids[:start], weights, most, end) for ids, start in rows]
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in made]
        for metric in ("chrf", "contains"):
            assert found["say"][metric][name] == pytest.approx(METRICS[metric](texts, wanted), abs=1e-6)
