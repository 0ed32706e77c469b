"""File sources, label maps, bad input and the cache."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from enmp_jax.config.sections import DataConfig
from enmp_jax.data import load_examples, open_source, require_class_names
from enmp_jax.data.files import NpzSource
from enmp_jax.errors import UserError
from enmp_jax.io import cache


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ENMP_CACHE", str(tmp_path / "cache"))
    return tmp_path


def images(n=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 6, 4), dtype=np.uint8)


def save_npz(root, n=30, **more):
    arrays = {"image": images(n), "label": np.arange(n) % 3} | more
    np.savez(root / "a.npz", **{k: v for k, v in arrays.items() if v is not None})
    return DataConfig("npz:a.npz", train="all[:20]", search="all[20:25]", selection="all[25:]", test="all")


def test_npz(root):
    config = save_npz(root)
    examples = load_examples(config, "search", root)
    np.testing.assert_array_equal(examples.inputs["image"], images()[20:25, :, :, None])
    np.testing.assert_array_equal(examples.labels, np.arange(20, 25) % 3)
    assert examples.inputs["image"].dtype == np.uint8 and examples.labels.dtype == np.int32
    assert examples.spans == (("all", 20, 25),) and examples.class_names == () and examples.notes == ()
    assert len(set(examples.keys.tolist())) == 5


def test_npz_with_splits_names_and_transforms(root):
    split = np.asarray(["b", "a", "b", "a", "a"])
    save_npz(root, 5, split=split, label=np.asarray(["x", "y", "x", "z", "y"]))
    config = DataConfig("npz:a.npz", test="a", transforms=("rotate90", "invert"))
    assert open_source(config, root).splits() == {"b": 2, "a": 3}
    examples = load_examples(config, "test", root)
    assert examples.class_names == ("x", "y", "z") and examples.labels.tolist() == [1, 2, 1]
    expected = [255 - np.rot90(images(5)[i]) for i in (1, 3, 4)]
    np.testing.assert_array_equal(examples.inputs["image"][..., 0], expected)
    plain = load_examples(DataConfig("npz:a.npz", test="a"), "test", root)
    np.testing.assert_array_equal(plain.keys, examples.keys)  # content is identified before transforms


@pytest.mark.parametrize("nested", [True, False])
def test_folder(root, nested):
    for split in ("train", "test") if nested else ("",):
        for label, name in enumerate(("cat", "dog")):
            (root / "d" / split / name).mkdir(parents=True)
            for i in range(10):
                pixels = np.full((4, 5, 3), 100 * label + 10 * (split == "test") + i, np.uint8)
                Image.fromarray(pixels).save(root / "d" / split / name / f"{i}.png")
    config = DataConfig("folder:d", test="test" if nested else "all")
    examples = load_examples(config, "test", root)
    assert examples.class_names == ("cat", "dog")
    assert examples.inputs["image"].shape == (20, 4, 5, 3)
    values = examples.inputs["image"][:, 0, 0, 0]
    assert sorted(values.tolist()) == [
        *range(10 * nested, 10 * nested + 10),
        *range(100 + 10 * nested, 110 + 10 * nested),
    ]
    np.testing.assert_array_equal(examples.labels, values >= 100)
    # a slice holds both classes, because files are not in class order
    part = load_examples(DataConfig("folder:d", test=f"{config.test}[:50%]"), "test", root)
    assert set(part.labels.tolist()) == {0, 1}


def test_jsonl_texts_and_images(root):
    lines = [{"premise": "a b", "hypothesis": f"c {i}", "label": ["no", "yes"][i % 2]} for i in range(4)]
    lines[3]["split"] = "test"
    (root / "t.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    config = DataConfig("jsonl:t.jsonl", train="all", test="test", class_names=("yes", "no"))
    examples = load_examples(config, "train", root)
    assert examples.inputs["text"].tolist() == [["a b", "c 0"], ["a b", "c 1"], ["a b", "c 2"]]
    assert examples.labels.tolist() == [1, 0, 1]  # in the order of the run file's class_names
    assert load_examples(config, "test", root).labels.tolist() == [0]
    Image.fromarray(images()[0]).save(root / "i.png")
    (root / "i.jsonl").write_text('{"image": "i.png", "label": 3}')
    one = load_examples(DataConfig("jsonl:i.jsonl", test="all"), "test", root)
    np.testing.assert_array_equal(one.inputs["image"][0, ..., 0], images()[0])
    assert one.labels.tolist() == [3]


def test_label_map_leaves_out_and_renames(root):
    save_npz(root, 6, class_names=np.asarray(["a", "b", "c"]))
    examples = load_examples(DataConfig("npz:a.npz", test="all", labels=(1, -1, 0)), "test", root)
    assert examples.labels.tolist() == [1, 0, 1, 0] and examples.class_names == ("c", "a")
    np.testing.assert_array_equal(examples.inputs["image"][..., 0], images(6)[[0, 2, 3, 5]])
    assert examples.notes == ("2 examples were left out by the label map",)


def test_unlabelled_examples_are_left_out(root):
    save_npz(root, 6, label=np.asarray([0, -1, 1, 2, -1, 0]))
    examples = load_examples(DataConfig("npz:a.npz", test="all", labels=(0, 1, 1)), "test", root)
    assert examples.labels.tolist() == [0, 1, 1, 0]
    assert examples.notes == ("2 examples have no label (-1) and were left out",)


def save_folder(path):
    for i, name in enumerate("abc"):
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images()[i]).save(path / f"{name}.png")


UNLABELLED = {
    "npz, no array": DataConfig("npz:bare.npz", test="all"),
    "npz, all -1": DataConfig("npz:none.npz", test="all", labels=(0, 1)),
    "npz, ignored": DataConfig("npz:a.npz", test="all", label=None),
    "npz, texts": DataConfig("npz:texts.npz", test="all"),
    "npz, texts, ignored": DataConfig("npz:texts-named.npz", test="all", label=None),
    "jsonl, no key": DataConfig("jsonl:bare.jsonl", test="all"),
    "jsonl, null": DataConfig("jsonl:null.jsonl", test="all"),
    "jsonl, ignored": DataConfig("jsonl:named.jsonl", test="all", label=None),
    "folder, flat": DataConfig("folder:flat", test="all"),
    "folder, ignored": DataConfig("folder:deep", test="all", label=None),
}


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("case", UNLABELLED)
def test_a_split_without_any_label_is_loaded(root, case, limit):
    save_npz(root, 3)
    np.savez(root / "bare.npz", image=images(3))
    np.savez(root / "none.npz", image=images(3), label=np.full(3, -1))
    np.savez(root / "texts.npz", text=np.asarray(list("xyz")))
    np.savez(root / "texts-named.npz", text=np.asarray(list("xyz")), label=np.asarray(list("no!")))
    for name, more in {"bare": {}, "null": {"label": None}, "named": {"label": "no"}}.items():
        lines = [json.dumps({"text": text} | more) for text in "xyz"]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    save_folder(root / "flat")
    save_folder(root / "deep" / "x")
    examples = load_examples(UNLABELLED[case], "test", root, limit=limit)
    assert examples.labels.tolist() == [-1] * (limit or 3) and examples.labels.dtype == np.int32
    assert not examples.labelled and examples.notes == ("no example has a label",)
    assert all(len(value) == len(examples.labels) for value in examples.inputs.values())
    if limit is None:
        content = next(iter(examples.inputs.values()))
        expected = images(3)[..., None] if content.dtype == np.uint8 else [["x"], ["y"], ["z"]]
        assert sorted(map(str, content.tolist())) == sorted(map(str, np.asarray(expected).tolist()))
    with pytest.raises(UserError, match="no example has a label, and training needs them"):
        config = dataclasses.replace(UNLABELLED[case], train="all")  # the same rows, from the cache or not
        load_examples(config, "train", root, limit=limit)


def test_ignored_labels_have_a_cache_entry_of_their_own(root):
    config = save_npz(root, 6)
    ignored = dataclasses.replace(config, label=None)
    for _ in range(2):
        assert load_examples(config, "test", root).labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert load_examples(ignored, "test", root).labels.tolist() == [-1] * 6
    assert len(list(root.glob("cache/examples/*"))) == 2


def test_lines_without_a_label_beside_others_are_left_out(root):
    (root / "a.jsonl").write_text('{"text": "a"}\n{"text": "b", "label": 1}')
    examples = load_examples(DataConfig("jsonl:a.jsonl", test="all"), "test", root)
    assert examples.labels.tolist() == [1] and examples.labelled
    assert examples.notes == ("1 examples have no label (-1) and were left out",)


def test_a_pretext_needs_no_labels(root):
    np.savez(root / "bare.npz", image=images(3))
    config = DataConfig("npz:bare.npz", train="all", pretext="ink:0,0")
    examples = load_examples(config, "train", root)
    assert examples.labelled and set(examples.labels.tolist()) <= {0, 1, 2, 3} and not examples.notes


def test_limit_is_a_fixed_choice_that_grows(root):
    config = save_npz(root, 300, label=np.arange(300) // 100)
    few, more = (load_examples(config, "test", root, limit=n) for n in (20, 60))
    assert len(few.labels) == 20 and len(more.labels) == 60
    assert np.isin(few.keys, more.keys).all()
    assert set(few.labels.tolist()) == {0, 1, 2}  # a file sorted by class still gives all classes
    everything = load_examples(config, "test", root)
    rows = np.flatnonzero(np.isin(everything.keys, few.keys))
    np.testing.assert_array_equal(everything.keys[rows], few.keys)  # in the order of the source
    assert len(load_examples(config, "test", root, limit=1000).labels) == 300
    mapped = DataConfig("npz:a.npz", test="all", labels=(0, -1, 1))
    replaced = load_examples(mapped, "test", root, limit=150)
    assert len(replaced.labels) == 150  # left-out ones are replaced
    rows = np.flatnonzero(np.isin(everything.keys, replaced.keys))
    np.testing.assert_array_equal(everything.keys[rows], replaced.keys)
    np.testing.assert_array_equal(everything.labels[rows], replaced.labels * 2)
    np.testing.assert_array_equal(everything.inputs["image"][rows], replaced.inputs["image"])


def test_progress_counts_up(root):
    calls = []
    load_examples(save_npz(root, 600), "test", root, progress=lambda *a: calls.append(a))
    assert calls == [(256, 600), (512, 600), (600, 600)]


BAD = {
    "kind": (DataConfig("zip:a", test="all"), "write KIND:NAME with KIND one of npz, folder"),
    "no split": (DataConfig("npz:a.npz"), "names no test split; add `test:`"),
    "gone": (DataConfig("npz:b.npz", test="all"), "does not exist"),
    "label key": (DataConfig("npz:a.npz", test="all", label="y"), "no label key 'y'; it has image, label"),
    "image key": (DataConfig("npz:a.npz", test="all", image="x"), "no array 'x'; the file has image, label"),
    "map": (
        DataConfig("npz:a.npz", test="all", labels=(0, 1)),
        r"label 2 of a.npz\[2\] is out of range: 2 entries",
    ),
    "names": (DataConfig("npz:a.npz", test="all", class_names=("a", "b")), "label 2 of .* 2 class names"),
    "map to nothing": (DataConfig("npz:a.npz", test="all", labels=(-1, -1, -1)), "must hold class numbers"),
    "map beyond names": (
        DataConfig("npz:a.npz", test="all", labels=(0, 1, 2), class_names=("a", "b")),
        "points to class 2",
    ),
    "nothing left": (
        DataConfig("npz:a.npz", test="all[:1]", labels=(-1, 0, 1)),
        "no examples are left .1 examples",
    ),
    "transform": (DataConfig("npz:a.npz", test="all", transforms=("turn",)), "unknown transform 'turn'"),
    "text transform": (DataConfig("jsonl:t.jsonl", test="all", transforms=("flip",)), "are for images"),
    "text key": (
        DataConfig("jsonl:t.jsonl", test="all", text=("body",)),
        "no text key 'body'; available: text",
    ),
    "json": (DataConfig("jsonl:bad.jsonl", test="all"), "bad.jsonl:2: not valid JSON"),
    "json label": (DataConfig("jsonl:t.jsonl", test="all", label="y"), "t.jsonl:1: no label key 'y'"),
    "nothing to train on": (
        DataConfig("jsonl:null.jsonl", test="all", train="all"),
        "null.jsonl all: no example has a label, and training needs them",
    ),
    "no npz": (DataConfig("npz:t.jsonl", test="all"), "not a readable npz file"),
    "no images": (DataConfig("folder:empty", test="all"), "found no images"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(root, case):
    save_npz(root)
    (root / "t.jsonl").write_text('{"text": "a", "label": 0}')
    (root / "bad.jsonl").write_text('{"text": "a", "label": 0}\n{"text')
    (root / "null.jsonl").write_text('{"text": "a", "label": null}')
    (root / "empty").mkdir()
    config, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        load_examples(config, "train" if config.train else "test", root)
    assert "\n" not in str(error.value)
    assert not list(root.glob("cache/examples/*"))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": images().astype(np.float32) / 255}, r"float32 \[30, 6, 4\]; expected uint8"),
        ({"label": np.asarray(["a", "b"] * 14 + ["c"])}, "30 rows of 'image' but 29 of 'label'"),
        ({"label": np.linspace(0, 2, 30)}, "neither a whole number nor a class name"),
        ({"label": np.arange(29)}, "30 rows of 'image' but 29 of 'label'"),
        ({"label": None, "split": np.asarray(["a"] * 29)}, "29 rows of 'split' but 30 of 'image'"),
        ({"image": np.asarray([object()] * 30)}, "not a readable npz file of plain arrays"),
        ({"label": np.full(30, -2)}, "label -2 of a.npz.0. is out of range"),
    ],
)
def test_bad_arrays(root, arrays, message):
    config = save_npz(root, **arrays)
    with pytest.raises(UserError, match=message):
        load_examples(config, "test", root)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"label": ' * 100_000, "a.jsonl:1: not valid JSON"),
        ('{"text": "a", "label": ' + "9" * 5000 + "}", "a.jsonl:1: not valid JSON"),
        ('{"text": "a", "label": 99999999999999999999}', "label 99999999999999999999 is too large"),
    ],
    ids=["nested", "endless number", "large label"],
)
def test_jsonl_that_python_cannot_take(root, lines, message):
    (root / "a.jsonl").write_text(lines)
    with pytest.raises(UserError, match=message):
        load_examples(DataConfig("jsonl:a.jsonl", test="all"), "test", root)


def test_a_single_array_is_no_npz(root):
    with open(root / "a.npz", "wb") as file:
        np.save(file, images())
    with pytest.raises(UserError, match="not a readable npz file"):
        load_examples(DataConfig("npz:a.npz", test="all"), "test", root)


def test_a_label_array_has_one_label_an_example(root):
    config = save_npz(root, label=np.asarray(3))
    with pytest.raises(UserError, match=r"'label' is int64 \[\]; expected"):
        load_examples(config, "test", root)


@pytest.mark.parametrize("kind", ["npz", "folder", "jsonl"])
def test_names_longer_than_the_system_takes(root, kind):
    with pytest.raises(UserError, match="[Nn]ame too long"):
        load_examples(DataConfig(f"{kind}:{'x' * 5000}", test="all"), "test", root)


def test_whatever_an_image_decoder_raises_names_the_image(root, monkeypatch):
    (root / "d" / "x").mkdir(parents=True)
    Image.fromarray(images()[0]).save(root / "d" / "x" / "a.png")

    def fail(*_):
        raise IndexError("table\nindex")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UserError, match=r"x/a.png does not decode \(table index\)"):
        load_examples(DataConfig("folder:d", test="all"), "test", root)


def test_missing_class_names():
    assert require_class_names(("a", "b"), "task") == ("a", "b")
    with pytest.raises(UserError, match="task: no class names, and a zero-shot head"):
        require_class_names((), "task")
    with pytest.raises(UserError, match="no name for class 1"):
        require_class_names(("a", "", "c"), "task")


def test_images_that_do_not_decode(root):
    (root / "d" / "x").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(images()[i]).save(root / "d" / "x" / f"{i}.png")
    (root / "d" / "x" / "1.png").write_bytes((root / "d" / "x" / "1.png").read_bytes()[:50])
    (root / "d" / "x" / "2.png").write_text("no image")
    config = DataConfig("folder:d", test="all")
    with pytest.raises(UserError, match=r"x/[12].png does not decode .*--skip-bad .skip_bad: true"):
        load_examples(config, "test", root)
    examples = load_examples(DataConfig("folder:d", test="all", skip_bad=True), "test", root)
    assert len(examples.labels) == 2
    assert examples.notes[0].startswith("2 images did not decode and were left out: ")
    assert "x/1.png" in examples.notes[0] and "x/2.png" in examples.notes[0]
    for i in (0, 3):
        (root / "d" / "x" / f"{i}.png").write_text("no image")
    with pytest.raises(UserError, match=r"no examples are left .4 images did not decode"):
        load_examples(DataConfig("folder:d", test="all", skip_bad=True), "test", root)


def test_deep_pixels_do_not_decode(root):
    (root / "d" / "x").mkdir(parents=True)
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(root / "d" / "x" / "a.png")
    with pytest.raises(UserError, match=r"x/a.png does not decode .* is not 8-bit"):
        load_examples(DataConfig("folder:d", test="all"), "test", root)


def test_images_of_several_sizes_need_preprocessing(root):
    (root / "d" / "x").mkdir(parents=True)
    for i in (4, 5):
        Image.fromarray(np.zeros((i, 4), np.uint8)).save(root / "d" / "x" / f"{i}.png")
    with pytest.raises(
        UserError, match=r"x/[45].png is [45]x4x1, x/[45].png [45]x4x1: the base model has no"
    ):
        load_examples(DataConfig("folder:d", test="all"), "test", root)


def equal(a, b):
    assert (
        a.class_names == b.class_names and a.spans == b.spans and a.notes == b.notes and a.source == b.source
    )
    np.testing.assert_array_equal(a.keys, b.keys)
    np.testing.assert_array_equal(a.labels, b.labels)
    assert a.inputs.keys() == b.inputs.keys()
    for name in a.inputs:
        np.testing.assert_array_equal(a.inputs[name], b.inputs[name])
        assert a.inputs[name].dtype == b.inputs[name].dtype


def test_second_call_does_not_touch_the_source(root, monkeypatch):
    config = save_npz(root, class_names=np.asarray(["a", "b", "c"]), label=np.asarray([-1, *range(29)]) % 3)
    first = load_examples(config, "test", root)

    def touched(self, *_):
        raise AssertionError("the source was read")

    with monkeypatch.context() as patch:
        patch.setattr(NpzSource, "read", touched)
        patch.setattr(NpzSource, "splits", touched)
        equal(load_examples(config, "test", root), first)
        for other in (
            DataConfig("npz:a.npz", test="all", transforms=("flip",)),
            DataConfig("npz:a.npz", test="all[1:]"),
            DataConfig("npz:a.npz", test="all", labels=(0, 0, 1)),
        ):
            with pytest.raises(AssertionError, match="was read"):
                load_examples(other, "test", root)
        with pytest.raises(AssertionError, match="was read"):
            load_examples(config, "test", root, limit=3)
        os.utime(root / "a.npz", ns=(1, 1))  # another file, for all the cache knows
        with pytest.raises(AssertionError, match="was read"):
            load_examples(config, "test", root)
    equal(load_examples(config, "test", root)._replace(source=first.source), first)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "no metadata"])
def test_damaged_cache_is_rebuilt(root, damage):
    config = save_npz(root)
    first = load_examples(config, "test", root)
    (path,) = (root / "cache" / "examples").iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    elif damage == "no metadata":
        content[8:] = content[8:].replace(b'"entry"', b'"entrX"')
    else:
        del content[{"cut": -10, "empty": 0}[damage] :]
    path.write_bytes(bytes(content))
    equal(load_examples(config, "test", root), first)
    assert path.read_bytes() != bytes(content)


def test_unwritable_cache_is_no_error(root, monkeypatch):
    (root / "file").write_text("")
    monkeypatch.setenv("ENMP_CACHE", str(root / "file" / "below"))
    assert len(load_examples(save_npz(root), "test", root).labels) == 30
    monkeypatch.delenv("ENMP_CACHE")
    monkeypatch.setenv("HOME", str(root / "home"))
    assert cache.directory() == root / "home" / ".cache" / "enmp-jax"
