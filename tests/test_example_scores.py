"""Scores of single examples: the population's sums are theirs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from generative_files import loaded_run, save_all

from enmp_jax import merges
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.example_scores import ExampleScores
from enmp_jax.evaluation.experts import TokenAnswers
from enmp_jax.evaluation.loaded_run import load
from enmp_jax.io.progress import SILENT
from enmp_jax.runs.finalists import Finalist
from enmp_jax.runs.refine import merged_deltas


def test_single_examples_add_up_to_what_the_population_counts(demo_evaluator):
    evaluator, loaded = demo_evaluator, demo_evaluator.loaded
    single = ExampleScores(evaluator, "test")
    keep = np.random.default_rng(0).random((5, *loaded.mask_spec.shape)) > 0.2
    counts = evaluator.score(evaluator.inputs("test"), keep, np.full(5, 0.5, np.float32))
    found = single.of_masks(keep, 0.5)
    assert found.shape == (5, 54) and set(np.unique(found)) == {0.0, 1.0}
    assert (np.bincount(single.sample.task) == 9).all()
    scoring = evaluator.scoring("test")
    np.testing.assert_allclose(single.sample.scores(found), scoring.accuracy(counts), rtol=1e-6)
    np.testing.assert_allclose(single.sample.mean(found), scoring.normalised(counts), rtol=1e-6)
    one = single.of_deltas(merged_deltas(evaluator, Finalist(0, keep[1], 0.5, None)))
    np.testing.assert_array_equal(one, found[1])
    assert_same_sums(single.sums(single.count_masks(keep, 0.5)), counts)


def assert_same_sums(found, counted):
    """Sums over single examples, and the sums that the population counts."""
    for own, other in zip(found, counted, strict=True):
        np.testing.assert_allclose(own, other, rtol=2e-5, atol=1e-5)
    assert np.ptp(counted.value, axis=0).min() > 1e-3  # the masks differ


def test_values_of_every_temperature_add_up_too(demo_loaded):
    search = dataclasses.replace(demo_loaded.run.search, fitness="calibrated")
    run = dataclasses.replace(demo_loaded.run, search=search)
    evaluator = Evaluator(dataclasses.replace(demo_loaded, run=run))
    single = ExampleScores(evaluator, "test")
    keep = np.random.default_rng(0).random((2, *demo_loaded.mask_spec.shape)) > 0.2
    counts = evaluator.score(evaluator.inputs("test"), keep, np.full(2, 0.5, np.float32))
    assert counts.value.ndim == 3
    assert_same_sums(single.sums(single.count_masks(keep, 0.5)), counts)


def test_completions_and_choices_add_up_too(tmp_path):
    """Log-likelihoods of answers by their tokens are the likelihood that the population counts."""
    evaluator = Evaluator(load(loaded_run(save_all(tmp_path)), reporter=SILENT))
    single = ExampleScores(evaluator, "test")
    keep = np.random.default_rng(0).random((3, *evaluator.loaded.mask_spec.shape)) > 0.3
    counts = evaluator.score(evaluator.inputs("test"), keep, np.full(3, 0.5, np.float32))
    found, scoring = single.of_masks(keep, 0.5), evaluator.scoring("test")
    assert single.sample.likelihood is not None and single.sample.likelihood.tolist() == [True, False]
    assert (single.sample.task == np.repeat([0, 1], 7)).all()
    np.testing.assert_allclose(single.sample.scores(found), scoring.scores(counts), rtol=2e-5)
    np.testing.assert_allclose(single.sample.mean(found), scoring.normalised(counts), rtol=2e-5)
    assert_same_sums(single.sums(single.count_masks(keep, 0.5)), counts)
    for i, kept in enumerate(evaluator.loaded.examples["test"][0].inputs["target_branch"]):
        assert single.sample.units_of(0)[i] == (kept > 0).sum()
    answers = evaluator.expert_answers("test")[0]
    assert isinstance(answers, TokenAnswers)
    alone = np.zeros((1, *evaluator.loaded.mask_spec.shape), np.float32)
    alone[..., 0] = 1  # the first adapter by itself
    (own,) = single.of_masks(alone, 1.0)
    tokens = single.sample.units_of(0).astype(int)
    known = [part.sum() for part in np.split(answers.log_probability, np.cumsum(tokens)[:-1])]
    np.testing.assert_allclose(own[:7], known, rtol=1e-4)


def test_examples_stay_in_their_order(demo_evaluator):
    """Each task's rows as the data have them: what is compared is the same example everywhere."""
    single, loaded = ExampleScores(demo_evaluator, "test"), demo_evaluator.loaded
    nothing = ~loaded.mask_spec.all_kept()[None]
    found = single.of_masks(nothing, 1.0)[0]
    heads = jax.tree.map(np.asarray, loaded.heads)
    for i, examples in enumerate(loaded.examples["test"]):
        features = loaded.backbone.features(
            loaded.params, jax.tree.map(jnp.asarray, dict(examples.inputs)), {}
        )
        logits = np.asarray(features) @ heads.weight[i].T + heads.bias[i]
        right = np.where(heads.allowed[i], logits, -np.inf).argmax(1) == examples.labels
        np.testing.assert_array_equal(found[single.sample.task == i], right)


def test_another_method_scores_as_its_own_evaluation(demo_evaluator):
    evaluator, merge = demo_evaluator, merges.make("sum")
    ingredients = merge.prepare(evaluator.loaded.stack)
    keep = evaluator.loaded.mask_spec.all_kept()[None]
    inputs = evaluator.inputs("test", ingredients)
    counts = evaluator.score(inputs, keep, np.full(1, 0.3, np.float32), evaluator.plan(inputs, merge))
    single = ExampleScores(evaluator, "test")
    found = single.of_masks(keep, 0.3, merge, ingredients)
    np.testing.assert_allclose(single.sample.mean(found), evaluator.scoring("test").normalised(counts))


def test_texts_come_back_in_the_order_of_the_data(tmp_path):
    """Whatever the batches: two runs on the same data are compared example by example."""
    run = loaded_run(save_all(tmp_path))
    found, arranged = [], []
    for size in (2, 7):
        evaluation = dataclasses.replace(run.evaluation, batch_size=size)
        evaluator = Evaluator(load(dataclasses.replace(run, evaluation=evaluation), reporter=SILENT))
        single = ExampleScores(evaluator, "test")
        found.append(single.of_masks(evaluator.loaded.mask_spec.all_kept()[None], 0.5)[0])
        arranged.append(evaluator.arrangement("test").tolist())
    assert arranged[0] != arranged[1] and sorted(arranged[0]) == sorted(arranged[1]) == list(range(14))
    np.testing.assert_allclose(*found, rtol=1e-4)
