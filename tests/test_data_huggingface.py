"""``hf:`` sources: the mapping on a stub, and the real package where it is installed."""

import importlib.util
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage

from enmp_jax.config.sections import DataConfig
from enmp_jax.data import images, load_examples
from enmp_jax.data.huggingface import HuggingFaceSource
from enmp_jax.errors import UserError


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("ENMP_CACHE", str(tmp_path / "cache"))
    return tmp_path


class Value:
    def __init__(self, dtype):
        self.dtype = dtype


class ClassLabel(Value):
    def __init__(self, names):
        super().__init__("int64")
        self.names = names


class Image:
    pass


class Dataset:
    def __init__(self, features, columns):
        self.features, self.columns = features, columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def select(self, rows):
        return Dataset(self.features, {k: [v[i] for i in rows] for k, v in self.columns.items()})

    def __getitem__(self, key):
        return self.columns if isinstance(key, slice) else self.columns[key]


def source(root, features, columns, **config):
    called = []

    def load(*arguments):
        called.append(arguments)
        return {"train": Dataset(features, columns), "test": Dataset(features, columns)}

    made = HuggingFaceSource(
        "owner/name:part@abc", DataConfig("hf:owner/name:part@abc", **config), root, load
    )
    return made, called


def test_texts_and_named_labels(root):
    features = {"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(["yes", "no"])}
    columns = {"premise": list("abc"), "hypothesis": list("xyz"), "label": [1, 0, -1]}
    made, called = source(root, features, columns)
    assert made.identity() == "hf owner/name part abc" and not called  # a cache hit loads nothing
    assert made.splits() == {"train": 3, "test": 3} and made.class_names() == ("yes", "no")
    raw = made.read("test", [2, 0])
    assert (raw.modality, list(raw.values), raw.labels.tolist()) == (
        "text",
        [("c", "z"), ("a", "x")],
        [-1, 1],
    )
    assert list(raw.names) == ["test[2]", "test[0]"]
    assert called == [("owner/name", "part", "abc")]


def test_labels_that_are_strings(root):
    features = {"text": Value("string"), "label": Value("string")}
    made, _ = source(root, features, {"text": list("abc"), "label": ["no", "yes", None]})
    assert made.class_names() == ("no", "yes")
    assert made.read("train", [1, 2]).labels.tolist() == [1, -1]


def test_images(root):
    buffer = io.BytesIO()
    PillowImage.fromarray(np.zeros((2, 2), np.uint8)).save(buffer, "PNG")
    features = {"img": Image(), "label": Value("int64")}
    values = [{"bytes": buffer.getvalue(), "path": None}, {"bytes": None, "path": "/a.png"}]
    made, _ = source(root, features, {"img": values, "label": [3, 4]})
    raw = made.read("train", [0, 1])
    assert raw.modality == "image" and raw.values[0] == buffer.getvalue() and str(raw.values[1]) == "/a.png"
    assert made.class_names() == ()


@pytest.mark.parametrize(
    ("features", "label"), [({}, "label"), ({"label": Value("string")}, None)], ids=["none", "ignored"]
)
def test_without_labels(root, features, label):
    columns = {"text": list("abc")} | {name: list("xyz") for name in features}
    made, _ = source(root, {"text": Value("string")} | features, columns, label=label)
    raw = made.read("train", [1, 2])
    assert not made.labelled() and made.class_names() == ()
    assert list(raw.values) == [("b",), ("c",)] and raw.labels.tolist() == [-1, -1]


def test_several_labels_of_one_example(root):
    features = {"text": Value("string"), "label": ClassLabel(["yes", "no"])}
    made, _ = source(root, features, {"text": ["a"], "label": [[0, 1]]})
    with pytest.raises(UserError, match=r"the label \[0, 1\] is neither a whole number nor a class name"):
        made.read("train", [0])


def test_a_missing_image_does_not_decode(root):
    made, _ = source(root, {"img": Image(), "label": Value("int64")}, {"img": [None], "label": [0]})
    with pytest.raises(images.BadImage):
        images.decode(made.read("train", [0]).values[0])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"label": "y"}, "no label key 'y'; it has a, b, label"),
        ({"image": "x"}, "no image key 'x'"),
        ({"text": ("c",)}, "no text key 'c'; available: a, b"),
        ({}, "set text to the text keys, one or two of a, b"),
        ({"text": ("a",)}, r"'a' of train\[1\] is None, not a text"),
    ],
)
def test_bad_input(root, config: dict[str, Any], message):
    features = {"a": Value("string"), "b": Value("string"), "label": Value("int64")}
    made, _ = source(root, features, {"a": ["x", None], "b": ["x", "y"], "label": [0, 1]}, **config)
    with pytest.raises(UserError, match=message):
        made.read("train", [0, 1])


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is installed")
def test_package_missing(root):
    with pytest.raises(UserError, match=r"needs the datasets package: pip install 'enmp-jax\[hf\]'"):
        load_examples(DataConfig("hf:owner/name", test="test"), "test", root)


def test_saved_data_set(root):
    datasets = pytest.importorskip("datasets")
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    columns = {"image": [PillowImage.fromarray(i) for i in images], "label": [0, 1] * 3}
    made = datasets.DatasetDict({"test": datasets.Dataset.from_dict(columns, features=features)})
    made.save_to_disk(root / "saved")
    config = DataConfig("hf:./saved", test="test[1:4]")
    examples = load_examples(config, "test", root)
    np.testing.assert_array_equal(examples.inputs["image"], images[1:4])
    assert examples.labels.tolist() == [1, 0, 1] and examples.class_names == ("a", "b")
    with pytest.raises(UserError, match=r"hf:.*nothing cannot be loaded"):
        load_examples(DataConfig("hf:./nothing", test="test"), "test", root)
