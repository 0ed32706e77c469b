"""Completions are trained in parts of about the same length."""

import numpy as np

from enmp_jax.data import Examples
from enmp_jax.training.length_buckets import MULTIPLE, PARTS, cut, sort_by_length


def made(lengths, width):
    """Completions whose tokens and targets count up; half of the tokens, rounded up, are targets."""
    place, lengths = np.arange(width), np.asarray(lengths)
    ids = np.where(place < lengths[:, None], place + 1 + 1000 * lengths[:, None], 0)
    target = place < (lengths[:, None] + 1) // 2
    inputs = {
        "input_ids": ids, "attention_mask": (ids > 0).astype(np.int32),
        "target_ids": np.where(target, ids, 0), "target_branch": target.astype(np.int32),
    }  # fmt: skip
    return Examples(inputs, lengths, (), lengths.astype("S32"))


def test_every_example_is_in_one_part_and_keeps_its_tokens():
    random = np.random.default_rng(0)
    tasks = [made(random.integers(3, 120, 50), 128), made(random.integers(3, 40, 33), 40)]
    ordered, buckets = sort_by_length(tasks)
    assert len(buckets.lengths) > 4
    for i, (before, after) in enumerate(zip(tasks, ordered, strict=True)):
        rows = [np.arange(a, b) for a, b in zip(buckets.first[:, i], buckets.stop[:, i], strict=True)]
        np.testing.assert_array_equal(np.concatenate(rows), np.arange(len(before.labels)))
        assert np.ptp([len(x) for x in rows]) <= 1  # so that all examples are about as likely
        assert sorted(before.labels) == list(after.labels)
        assert [int(key) for key in after.keys] == list(after.labels)
        for part, own in enumerate(rows):
            lengths = buckets.lengths[buckets.shape[part]]
            shorter = cut({name: a[own] for name, a in after.inputs.items()}, lengths)
            assert lengths[0] % MULTIPLE == lengths[1] % MULTIPLE == 0
            assert shorter["input_ids"].shape[1] <= lengths[0]
            for name, a in shorter.items():  # only padding is cut off
                assert a.sum() == after.inputs[name][own].sum()
            np.testing.assert_array_equal(shorter["input_ids"].max(axis=1) // 1000, after.labels[own])


def test_tasks_of_few_examples_and_of_one_length():
    _, buckets = sort_by_length([made([5, 9, 7], 16), made([16] * 40, 16)])
    assert buckets.lengths == ((16, 8),)  # one compiled step
    assert buckets.first.shape == (PARTS, 2)
    assert (buckets.stop > buckets.first).all() and buckets.stop[:, 0].max() == 3
    assert set(buckets.first[:, 0]) == {0, 1, 2}


def test_the_parts_of_a_task_do_not_depend_on_the_others():
    task, other = made([5, 9, 7, 30, 12, 8, 4, 3, 6], 32), made([60] * 21, 64)
    alone, beside = sort_by_length([task])[1], sort_by_length([other, task])[1]
    np.testing.assert_array_equal(alone.first[:, 0], beside.first[:, 1])
    np.testing.assert_array_equal(alone.stop[:, 0], beside.stop[:, 1])
