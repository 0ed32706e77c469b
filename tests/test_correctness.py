"""Scores of single examples: the population's sums are theirs."""

import jax
import jax.numpy as jnp
import numpy as np

from enmp_jax import merges
from enmp_jax.evaluation.correctness import Correctness
from enmp_jax.runs.finalists import Finalist
from enmp_jax.runs.refine import merged_deltas


def test_single_examples_add_up_to_what_the_population_counts(demo_evaluator):
    evaluator, loaded = demo_evaluator, demo_evaluator.loaded
    correctness = Correctness(evaluator, "test")
    keep = np.random.default_rng(0).random((5, *loaded.mask_spec.shape)) > 0.2
    counts = evaluator.score(evaluator.inputs("test"), keep, np.full(5, 0.5, np.float32))
    found = correctness.of_masks(keep, 0.5)
    assert found.shape == (5, 54) and set(np.unique(found)) == {0.0, 1.0}
    assert (np.bincount(correctness.task) == 9).all()
    scoring = evaluator.scoring("test")
    np.testing.assert_allclose(correctness.accuracy(found), scoring.accuracy(counts), rtol=1e-6)
    np.testing.assert_allclose(correctness.normalised(found), scoring.normalised(counts), rtol=1e-6)
    one = correctness.of_deltas(merged_deltas(evaluator, Finalist(0, keep[1], 0.5, None)))
    np.testing.assert_array_equal(one, found[1])


def test_examples_stay_in_their_order(demo_evaluator):
    """Each task's rows as the data have them: what is compared is the same example everywhere."""
    correctness, loaded = Correctness(demo_evaluator, "test"), demo_evaluator.loaded
    nothing = ~loaded.mask_spec.all_kept()[None]
    found = correctness.of_masks(nothing, 1.0)[0]
    heads = jax.tree.map(np.asarray, loaded.heads)
    for i, examples in enumerate(loaded.examples["test"]):
        features = loaded.backbone.features(
            loaded.params, jax.tree.map(jnp.asarray, dict(examples.inputs)), {}
        )
        logits = np.asarray(features) @ heads.weight[i].T + heads.bias[i]
        right = np.where(heads.allowed[i], logits, -np.inf).argmax(1) == examples.labels
        np.testing.assert_array_equal(found[correctness.task == i], right)


def test_another_method_scores_as_its_own_evaluation(demo_evaluator):
    evaluator, merge = demo_evaluator, merges.make("sum")
    ingredients = merge.prepare(evaluator.loaded.stack)
    keep = evaluator.loaded.mask_spec.all_kept()[None]
    inputs = evaluator.inputs("test", ingredients)
    counts = evaluator.score(inputs, keep, np.full(1, 0.3, np.float32), evaluator.plan(inputs, merge))
    correctness = Correctness(evaluator, "test")
    found = correctness.of_masks(keep, 0.3, merge, ingredients)
    np.testing.assert_allclose(correctness.normalised(found), evaluator.scoring("test").normalised(counts))


def test_several_buckets_come_back_task_by_task(demo_evaluator, monkeypatch):
    """Texts are batched by length, and every length has examples of all tasks."""
    inputs = demo_evaluator.inputs("test")
    (batches,) = inputs.batches
    buckets = tuple(jax.tree.map(lambda x, part=part: x[part], batches) for part in (slice(1, 2), slice(1)))
    keep = demo_evaluator.loaded.mask_spec.all_kept()[None]
    whole = Correctness(demo_evaluator, "test")
    monkeypatch.setattr(demo_evaluator, "inputs", lambda split: inputs._replace(batches=buckets))
    parted = Correctness(demo_evaluator, "test")
    assert (np.diff(parted.task) >= 0).all()
    np.testing.assert_allclose(
        parted.accuracy(parted.of_masks(keep, 0.5)), whole.accuracy(whole.of_masks(keep, 0.5))
    )
