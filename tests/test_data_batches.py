"""Batches and split hygiene."""

from typing import Any, get_args

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enmp_jax.config.sections import DataConfig
from enmp_jax.data import Examples, batch, check_splits, leaks, load_examples
from enmp_jax.data.base import Split
from enmp_jax.errors import UserError


def image_examples(n, first=0, classes=5):
    """Images whose pixels are a serial number."""
    serial = np.arange(first, first + n, dtype=np.uint32)
    pixels = serial.view(np.uint8).reshape(n, 2, 2, 1)
    return Examples({"image": pixels}, (serial % classes).astype(np.int32), (), serial.astype("S32"))


def text_examples(lengths, first=1):
    """Texts whose tokens are all a serial number."""
    lengths = np.asarray(lengths)
    mask = np.arange(max(lengths)) < lengths[:, None]
    serial = np.arange(first, first + len(lengths))
    ids = np.where(mask, serial[:, None], 0)
    inputs = {"input_ids": ids.astype(np.int32), "attention_mask": mask.astype(np.int32)}
    return Examples(inputs, (serial % 3).astype(np.int32), (), serial.astype("S32"))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any), st.integers(1, 9))
def test_every_image_appears_exactly_once(sizes, batch_size):
    starts = np.cumsum([0, *sizes])
    (made,) = batch([image_examples(n, s) for n, s in zip(sizes, starts)], batch_size)
    count = -(-sum(sizes) // batch_size)
    rows = made.label.shape[1]
    assert rows <= batch_size
    assert made.inputs["image"].shape == (count, rows, 2, 2, 1) and made.inputs["image"].dtype == np.uint8
    assert made.label.shape == made.task.shape == made.mask.shape == (count, rows)
    mask = np.asarray(made.mask)
    serial = np.ascontiguousarray(made.inputs["image"]).reshape(count, rows, 4).view(np.uint32)[..., 0]
    np.testing.assert_array_equal(serial[mask], np.arange(sum(sizes)))
    np.testing.assert_array_equal(np.asarray(made.label)[mask], np.arange(sum(sizes)) % 5)
    np.testing.assert_array_equal(np.asarray(made.task)[mask], np.repeat(np.arange(len(sizes)), sizes))
    assert made.label.dtype == made.task.dtype == np.int32 and made.mask.dtype == bool


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 40))
def test_every_text_appears_exactly_once_in_a_bucket_that_holds_it(lengths, batch_size, cut):
    parts = [part for part in (lengths[:cut], lengths[cut:]) if part]
    examples = [text_examples(part, 1 + sum(map(len, parts[:i]))) for i, part in enumerate(parts)]
    made = batch(examples, batch_size)
    seen = []
    for bucket in made:
        ids, attention, mask = (
            np.asarray(x) for x in (bucket.inputs["input_ids"], bucket.inputs["attention_mask"], bucket.mask)
        )
        assert ids.shape == attention.shape and ids.shape[:2] == mask.shape
        assert ids.shape[2] in (16, 32, 48, 64, 96)
        assert (attention.sum(-1) > 0).all()  # padding rows hold a text too: no softmax over nothing
        for i in zip(*np.nonzero(mask)):
            serial = int(ids[i][0])
            assert (attention[i] == (np.arange(ids.shape[2]) < lengths[serial - 1])).all()
            assert (ids[i] == serial * attention[i]).all()
            assert bucket.label[i] == serial % 3
            assert bucket.task[i] == (0 if serial <= len(parts[0]) else 1)
            seen.append(serial)
    assert sorted(seen) == list(range(1, len(lengths) + 1))
    widths = [bucket.inputs["input_ids"].shape[2] for bucket in made]
    assert widths == sorted(set(widths))


def test_small_buckets_join_the_next_longer_one():
    made = batch([text_examples([3] * 4 + [20] * 8 + [40] * 2)], batch_size=8)
    assert [b.inputs["input_ids"].shape for b in made] == [(2, 8, 32), (1, 8, 48)]
    assert [int(b.mask.sum()) for b in made] == [12, 2]


@pytest.mark.parametrize(
    ("examples", "batch_size", "devices", "count", "rows"),
    [
        (70, 64, 1, 2, 40), (26, 64, 1, 1, 32), (64, 64, 1, 1, 64), (65, 64, 1, 2, 40), (350, 64, 1, 6, 64),
        (5, 64, 1, 1, 8), (5, 4, 1, 2, 4), (9, 9, 1, 1, 9), (26, 60, 12, 1, 36), (26, 64, 16, 1, 32),
        (70, 64, 32, 2, 64), (21, 20, 4, 2, 16), (1, 1, 8, 1, 1),
    ],
)  # fmt: skip
def test_batches_have_no_more_rows_than_their_number_needs(examples, batch_size, devices, count, rows):
    (made,) = batch([image_examples(examples)], batch_size, devices=devices)
    assert made.label.shape == (count, rows) and int(made.mask.sum()) == examples
    assert rows == batch_size or rows % devices == 0


def test_own_lengths_and_longer_texts():
    made = batch([text_examples([3] * 4 + [20] * 4)], 4, lengths=(5, 10))
    assert [b.inputs["input_ids"].shape[2] for b in made] == [5, 20]


def test_batches_are_a_pytree_to_scan_over():
    (made,) = batch([image_examples(5), image_examples(4, 5)], 4)

    @jax.jit
    def count(batches):
        return jax.lax.scan(lambda total, b: (total + (b.mask * b.label).sum(), None), 0, batches)[0]

    assert count(made) == (np.arange(9) % 5).sum()


def test_bad_batches():
    small = image_examples(2)
    other = small._replace(inputs={"image": np.zeros((2, 3, 2, 1), np.uint8)})
    with pytest.raises(
        UserError, match=r"tasks 0 and 1 have images of different sizes: \(2, 2, 1\) and \(3, 2, 1\)"
    ):
        batch([small, other], 4)
    with pytest.raises(UserError, match="tasks 0 and 1 have different inputs"):
        batch([small, text_examples([1, 2])], 4)
    with pytest.raises(UserError, match="no examples"):
        batch([], 4)


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """100 images, of which 80..84 repeat 0..4."""
    monkeypatch.setenv("ENMP_CACHE", str(tmp_path / "cache"))
    images = np.random.default_rng(0).integers(0, 256, (100, 4, 4), dtype=np.uint8)
    images[80:85] = images[:5]
    np.savez(tmp_path / "a.npz", image=images, label=np.arange(100) % 2)

    def load(transforms=(), **splits: Any):
        config = DataConfig("npz:a.npz", transforms=transforms, **splits)
        return {which: load_examples(config, which, tmp_path) for which in get_args(Split) if which in splits}

    return load


def test_disjoint_splits_pass(digits):
    tasks = {
        "a": digits(train="all[:40]", search="all[40:50]", selection="all[50:60]", test="all[60:80]"),
        "b": digits(
            ("flip",), train="all[:40]", search="all[40:50]", selection="all[50:60]", test="all[60:80]"
        ),
    }
    assert leaks(tasks) == []
    checked = check_splits(tasks)
    assert all(checked[t][s] is tasks[t][s] for t in tasks for s in tasks[t])


@pytest.mark.parametrize(
    "pair", ["train test", "search test", "selection test", "search selection", "train search"]
)
def test_overlapping_rows_are_refused(digits, pair):
    first, second = pair.split()
    splits = {first: "all[10:30]", second: "all[25:50]"}
    with pytest.raises(
        UserError, match=rf"{second} and {first} of 'a' both hold all\[25:30\]|{first} and {second}"
    ):
        check_splits({"a": digits(**splits)})
    with pytest.raises(UserError, match=r"both hold all\[25:30\]"):
        check_splits({"a": digits(**splits)}, drop=["a"])  # rows named twice are never dropped silently


def test_rows_of_another_task_are_refused_under_any_transform(digits):
    tasks = {"a": digits(search="all[20:40]"), "b": digits(("rotate90",), test="all[39:60]")}
    with pytest.raises(UserError, match=r"test of 'b' and search of 'a' both hold all\[39:40\]"):
        check_splits(tasks)


def test_repeated_content_is_refused_or_dropped(digits):
    tasks = {
        "a": digits(search="all[2:20]", selection="all[20:40]", test="all[60:]"),
        "b": digits(train="all[:2]"),
    }
    (mine, other) = leaks(tasks)
    assert (mine.clean, mine.seen, mine.rows.tolist(), mine.spans) == (
        ("a", "test"), ("a", "search"), [0, 1, 2], (),
    )  # fmt: skip
    assert (other.clean, other.seen, other.rows.tolist()) == (("a", "test"), ("b", "train"), [0, 1])
    with pytest.raises(
        UserError, match=r"test and search of 'a' share examples \(3 of the 18 in search, the first at"
    ):
        check_splits({"a": tasks["a"]})
    with pytest.raises(
        UserError, match=r"test of 'a' and train of 'b' share .* duplicates: drop in the data of 'b'"
    ):
        check_splits({"a": {"test": tasks["a"]["test"]}, "b": tasks["b"]})
    checked = check_splits({"a": tasks["a"]}, drop=["a"])["a"]
    assert checked["test"] is tasks["a"]["test"] and checked["selection"] is tasks["a"]["selection"]
    np.testing.assert_array_equal(checked["search"].keys, tasks["a"]["search"].keys[3:])
    assert len(checked["search"].labels) == len(checked["search"].inputs["image"]) == 15
    assert checked["search"].notes == ("3 examples of search recur in another split and were left out",)
    assert leaks({"a": checked}) == []
    assert check_splits({"a": checked})["a"]["search"] is checked["search"]
    with pytest.raises(UserError, match=r"tasks.a.data.search: every example recurs"):
        check_splits({"a": digits(search="all[:5]", test="all[60:]")}, drop=["a"])


def test_same_rows_of_another_source_are_no_overlap(digits, tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (100, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "b.npz", image=images, label=np.arange(100) % 2)
    other = load_examples(DataConfig("npz:b.npz", test="all"), "test", tmp_path)
    check_splits({"a": digits(search="all[:50]"), "b": {"test": other}})


def test_a_split_may_leak_from_two_others(digits):
    splits = digits(search="all[:5]+all[50:60]", selection="all[83:85]", test="all[80:83]")
    kept = check_splits({"a": splits}, drop=["a"])["a"]["search"]
    np.testing.assert_array_equal(kept.keys, splits["search"].keys[5:])


def test_same_rows_of_another_split_are_no_overlap(tmp_path, monkeypatch):
    monkeypatch.setenv("ENMP_CACHE", str(tmp_path / "cache"))
    images = np.random.default_rng(2).integers(0, 256, (20, 4, 4), dtype=np.uint8)
    split = np.asarray(["validation", "test"] * 10)
    np.savez(tmp_path / "c.npz", image=images, label=np.arange(20) % 2, split=split)
    config = DataConfig("npz:c.npz", search="validation", test="test")
    check_splits({"a": {w: load_examples(config, w, tmp_path) for w in ("search", "test")}})
