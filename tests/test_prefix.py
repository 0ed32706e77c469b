"""Masks scored from their parent's hidden states: the same scores, for fewer layers run."""

import dataclasses

import jax
import numpy as np
import pytest
from device_problem import BATCH, TASKS, VIT, make_inputs, random_stack

from enmp_jax import merges, models
from enmp_jax.data import batch
from enmp_jax.data.base import Examples
from enmp_jax.deltas import Dense
from enmp_jax.evaluation import budget, delta_format, prefix
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.population import EvalInputs, make_evaluate
from enmp_jax.evaluation.prefix import first_changed, make_evaluate_from
from enmp_jax.evaluation.scoring import stack_heads
from enmp_jax.models import layers

LAYERS = 4
BERT = {
    "model_type": "bert", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": LAYERS, "num_attention_heads": 2, "max_position_embeddings": 24,
    "type_vocab_size": 1,
}  # fmt: skip


def variations(shape, members=7, seed=0):
    """A parent with pruned modules, and masks that differ from it from random layers on (one nowhere)."""
    random = np.random.default_rng(seed)
    parent = random.random(shape) > 0.3
    keep = np.repeat(parent[None], members, axis=0)
    for i, first in enumerate(random.permutation(members) % (shape[0] + 1)):
        keep[i, first:] = random.random((shape[0] - first, *shape[1:])) > 0.5
        if first < shape[0]:
            keep[i, first].flat[0] = ~parent[first].flat[0]
    return parent, keep


def without_one(parent):
    """Every kept module left out alone."""
    kept = np.flatnonzero(parent)
    keep = np.repeat(parent[None], len(kept), axis=0)
    keep.reshape(len(kept), -1)[np.arange(len(kept)), kept] = False
    return keep


def assert_same(counts, expected, exactly=False):
    np.testing.assert_array_equal(counts.correct, expected.correct)
    for ours, theirs in ((counts.log_likelihood, expected.log_likelihood), (counts.value, expected.value)):
        np.testing.assert_allclose(ours, theirs, rtol=0 if exactly else 1e-6)


def both(backbone, merge, inputs, parent, keep, chunk, scale=0.5):
    """(from the parent, from the inputs)"""
    options = {"member_chunk": chunk}
    start = jax.jit(make_evaluate_from(backbone, merge, len(TASKS), **options))
    whole = jax.jit(make_evaluate(backbone, merge, len(TASKS), **options))
    scales = np.full(len(keep), scale, np.float32)
    return start(inputs, parent, scale, keep), whole(inputs, keep, scales)


@pytest.fixture(scope="module")
def problem():
    return make_inputs("mean", config=VIT | {"num_hidden_layers": LAYERS})


def test_the_first_changed_layer():
    parent = np.ones((3, 2), bool)
    keep = np.repeat(parent[None], 4, axis=0)
    keep[1, 2, 1] = keep[2, 0, 0] = keep[2, 1, 1] = keep[3, 1] = False
    np.testing.assert_array_equal(first_changed(parent, keep), [3, 2, 0, 1])
    fine = np.repeat(keep[:, :, None], 5, axis=2)
    np.testing.assert_array_equal(first_changed(fine[0], fine), [3, 2, 0, 1])
    np.testing.assert_array_equal(first_changed(keep[1].astype("f"), keep * 1.0), [2, 3, 0, 1])


@pytest.mark.parametrize("shape", [(LAYERS, 3), (LAYERS, 2, 3)], ids=["layer", "projection"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_scores_are_those_of_the_whole_model(problem, shape, chunk):
    backbone, merge, _, inputs = problem
    counts, expected = both(backbone, merge, inputs, *variations(shape), chunk)
    assert_same(counts, expected)
    assert np.ptp(np.asarray(expected.log_likelihood), axis=0).min() > 0.1  # the masks matter


@pytest.mark.parametrize(("method", "space"), [("ties", "full"), ("ties", "knots"), ("tsv", "core")])
def test_every_format_of_deltas(problem, method, space):
    backbone, _, stack, inputs = problem
    merge = merges.make(method, space)
    inputs = inputs._replace(ingredients=merge.prepare(stack))
    assert_same(*both(backbone, merge, inputs, *variations((LAYERS, 3)), 2))


def test_full_matrices_and_weights_between_0_and_1(problem):
    backbone, merge, stack, inputs = problem
    parent, keep = (x * np.float32(0.7) for x in variations((LAYERS, 3)))
    full = delta_format.with_full(merge, list(stack.pairs))
    assert_same(*both(backbone, full, inputs, parent, keep, 2))


def test_texts_in_buckets():
    backbone, merge = models.build(BERT), merges.make("mean")
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(backbone.init, jax.random.key(0))
    params = jax.tree.map(
        lambda x: random.normal(size=x.shape, scale=0.3).astype("f") if x.ndim > 2 else np.ones(x.shape, "f"),
        shapes,
    )
    lengths = random.integers(3, 20, (len(TASKS), 9))
    data = [
        Examples(
            {
                "input_ids": random.integers(1, 40, (9, 20)).astype(np.int32),
                "attention_mask": (np.arange(20) < length[:, None]).astype(np.int32),
            },
            random.integers(0, 4, 9).astype(np.int32), (), np.zeros(9, "S32"),
        )
        for length in lengths
    ]  # fmt: skip
    heads = stack_heads([(random.normal(size=(4, backbone.width)).astype("f"), None) for _ in TASKS])
    batches = batch(data, BATCH, lengths=(10, 20))
    assert len(batches) == 2
    ingredients = merge.prepare(random_stack(backbone))
    inputs = EvalInputs(jax.device_put(params), ingredients, heads, batches)
    assert_same(*both(backbone, merge, inputs, *variations((LAYERS, 3)), 3))


def counting_layers(monkeypatch):
    """Layers run by every member, the parent included; those of one token only count too."""
    ran, apply_layer = [], layers.apply_layer

    def counted(spec, params, stream, deltas):
        hidden, own = apply_layer(spec, params, stream, deltas)
        # under vmap the callback is called for each member
        jax.debug.callback(lambda _: ran.append(1), hidden.sum())
        return hidden, own

    monkeypatch.setattr(layers, "apply_layer", counted)
    return ran


def test_leave_one_out_runs_half_of_the_layers(problem, monkeypatch):
    backbone, merge, _, inputs = problem
    parent = np.ones((LAYERS, 3), bool)
    keep = without_one(parent)
    ran = counting_layers(monkeypatch)
    evaluate = jax.jit(make_evaluate_from(backbone, merge, len(TASKS), member_chunk=3))
    jax.block_until_ready(evaluate(inputs, parent, 0.5, keep))
    jax.effects_barrier()
    batches = sum(len(bucket.label) for bucket in inputs.batches)
    assert len(ran) == batches * (LAYERS + 3 * (4 + 3 + 2 + 1))
    assert len(ran) < 0.75 * batches * LAYERS * len(keep)


@pytest.fixture
def demo(demo_loaded):
    """An evaluator with chunks of 4, and leave-one-out of a parent that is pruned itself."""
    run = demo_loaded.run
    run = dataclasses.replace(run, search=dataclasses.replace(run.search, population=16))
    evaluator = Evaluator(dataclasses.replace(demo_loaded, run=run))
    parent = evaluator.loaded.mask_spec.all_kept()
    parent[1, 2] = parent[2, 0] = False
    return evaluator, parent, without_one(parent)[np.random.default_rng(0).permutation(parent.sum())]


def room_for(monkeypatch, evaluator, inputs, members):
    """Memory for the deltas of so many members beside all else."""
    merge, chunk = evaluator.plan(inputs)
    loaded = evaluator.loaded
    shapes = delta_format.delta_shapes(merge, inputs.ingredients, loaded.mask_spec.shape).values()
    weights = [delta.weight for delta in shapes if isinstance(delta, Dense)]
    assert len(weights) == len(shapes)
    working, _ = budget.delta_bytes(merge, inputs.ingredients, loaded.mask_spec.shape)
    working = chunk * (working + budget.largest_activations(loaded.backbone, inputs.batches))
    taken = working + budget.largest_states(loaded.backbone, inputs.batches)
    free = int(taken + (members + 0.5) * budget.n_bytes(weights))
    monkeypatch.setattr(budget, "free_bytes", lambda _: free)


@pytest.mark.parametrize("members", [None, 9, 0])
def test_an_evaluator_scores_them_in_the_order_given(demo, monkeypatch, members):
    """All at once, in calls of 9 as memory has no room for more, and, without room for one, plainly."""
    evaluator, parent, keep = demo
    inputs = evaluator.inputs("search")
    if members is not None:
        room_for(monkeypatch, evaluator, inputs, members)
    expected = evaluator.score(inputs, keep, np.full(len(keep), 0.5, np.float32))
    assert_same(evaluator.score_from(inputs, parent, keep, 0.5), expected)
    sizes = [c._cache_size() for c in evaluator._compiled_from.values()]
    assert sizes == ([] if members == 0 else [1])


def test_masks_that_share_no_layer_are_scored_plainly(demo):
    evaluator, parent, _ = demo
    inputs = evaluator.inputs("search")
    keep = ~parent[None]
    expected = evaluator.score(inputs, keep, np.full(1, 0.5, np.float32))
    assert_same(evaluator.score_from(inputs, parent, keep, 0.5), expected, exactly=True)
    assert not evaluator._compiled_from


def test_a_few_more_or_fewer_masks_compile_nothing_new(demo):
    evaluator, parent, keep = demo
    inputs = evaluator.inputs("search")
    late = keep[np.argsort(-first_changed(parent, keep))]
    for members in (9, 12, 16):
        evaluator.score_from(inputs, parent, late[:members], 0.4)
    assert [c._cache_size() for c in evaluator._compiled_from.values()] == [1]


@pytest.mark.parametrize(
    ("first", "most", "pays"),
    [
        ([0, 0, 1, 1, 2, 2, 3, 3], 8, True),  # 4 + 2 (4 + 3 + 2 + 1) layers instead of 32
        ([0, 0, 0, 0, 1, 1, 1, 1], 8, False),  # 4 + 2 (4 + 4 + 3 + 3): as many
        ([0, 0, 1, 1, 2, 2, 3, 3], 4, True),  # the parent twice
        ([0, 0, 1, 1, 2, 2, 3, 3], 2, False),  # 4 times: more than is saved
        ([0, 0, 1, 1, 2, 2, 3, 3], 0, False),
        ([3], 8, False),  # one member alone: the parent costs what it saves
        ([4], 8, False),
    ],
)
def test_when_it_pays(first, most, pays):
    assert prefix.pays(np.asarray(first), 4, most, shards=1, chunk=2) is pays


def test_it_pays_less_on_many_devices():
    first = np.repeat(np.arange(4), 4)
    assert prefix.pays(first, 4, 16, shards=1, chunk=2)
    assert prefix.pays(first, 4, 16, shards=4, chunk=1)  # 4 + 10 layers instead of 16
    assert not prefix.pays(first, 4, 16, shards=8, chunk=1)  # 4 + 4 + 2 instead of 8
    assert not prefix.pays(first, 4, 16, shards=16, chunk=1)
