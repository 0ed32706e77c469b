"""TFDS directories, read without tensorflow: one made here, and the shared real ones where they exist."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from enmp_jax.config.sections import DataConfig
from enmp_jax.data import check_splits, load_examples
from enmp_jax.data.base import Split
from enmp_jax.errors import UserError

SHARED = Path(__file__).parents[2] / "shared" / "data" / "tfds"
FEATURES = "tensorflow_datasets.core.features."
IMAGE = {
    "pythonClassName": FEATURES + "image_feature.Image",
    "image": {"dtype": "uint8", "shape": {"dimensions": ["4", "5", "3"]}},
}
TEXT = {"pythonClassName": FEATURES + "text_feature.Text", "text": {}}


def label(classes):
    return {
        "pythonClassName": FEATURES + "class_label_feature.ClassLabel",
        "classLabel": {"numClasses": str(classes)},
    }


CLASSES = label(3)


def prepare(directory, splits, features, names=()):
    """Write a TFDS directory: split -> list of examples (bytes, str or int)."""
    directory.mkdir(parents=True)
    name = directory.parent.name
    for split, examples in splits.items():
        writer = ArrayRecordWriter(
            str(directory / f"{name}-{split}.array_record-00000-of-00001"), "group_size:1"
        )
        for example in examples:
            record = tf_example_pb2.Example()  # pyright: ignore[reportAttributeAccessIssue]
            for key, value in example.items():
                feature = record.features.feature[key]
                if isinstance(value, int):
                    feature.int64_list.value.append(value)
                else:
                    feature.bytes_list.value.append(value.encode() if isinstance(value, str) else value)
            writer.write(record.SerializeToString())
        writer.close()
    infos = [
        {
            "name": split,
            "shardLengths": [str(len(examples))],
            "numBytes": "1",
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        }
        for split, examples in splits.items()
    ]
    info = {"name": name, "version": directory.name, "fileFormat": "array_record", "splits": infos}
    (directory / "dataset_info.json").write_text(json.dumps(info))
    top = {"pythonClassName": FEATURES + "features_dict.FeaturesDict", "featuresDict": {"features": features}}
    (directory / "features.json").write_text(json.dumps(top))
    if names:
        (directory / "label.labels.txt").write_text("\n".join(names))


def pixels(i):
    return np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8)


def png(i):
    buffer = io.BytesIO()
    Image.fromarray(pixels(i)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("ENMP_CACHE", str(tmp_path / "cache"))
    data = {
        "train": [{"image": png(i), "label": i % 3} for i in range(20)],
        "test": [{"image": png(20 + i), "label": i % 3} for i in range(5)],
    }
    features = {"image": IMAGE, "label": label(3)}
    prepare(tmp_path / "tfds" / "shapes" / "1.9.0", data, features, ["ring", "bar", "dot"])
    newer = {"test": [{"image": png(9), "label": 2}, {"image": b"no image", "label": 0}]}
    prepare(tmp_path / "tfds" / "shapes" / "1.10.0", newer, features, ["ring", "bar", "dot"])
    pairs = [{"question": f"q {i}", "sentence": f"s é {i}", "label": -(i % 2)} for i in range(6)]
    features = {"question": TEXT, "sentence": TEXT, "label": label(2)}
    prepare(tmp_path / "tfds" / "pairs" / "tiny" / "2.0.0", {"train": pairs}, features)
    return tmp_path


def config(name, **more):
    return DataConfig("tfds:" + name, data_dir="./tfds", **more)


def test_images(root):
    examples = load_examples(config("shapes:1.9.0", test="test+train[:2]"), "test", root)
    expected = [pixels(i) for i in (20, 21, 22, 23, 24, 0, 1)]
    np.testing.assert_array_equal(examples.inputs["image"], expected)
    assert examples.labels.tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert examples.class_names == ("ring", "bar", "dot")
    assert "tensorflow" not in sys.modules


def test_newest_version_and_bad_images(root):
    with pytest.raises(UserError, match=r"tfds:shapes test: test\[1\] does not decode"):
        load_examples(config("shapes", test="test"), "test", root)
    examples = load_examples(config("shapes", test="test", skip_bad=True), "test", root)
    np.testing.assert_array_equal(examples.inputs["image"], [pixels(9)])
    assert examples.notes == ("1 images did not decode and were left out: test[1]",)


def test_text_pairs_of_a_configuration(root):
    made = config("pairs", test="train", text=("sentence", "question"))
    examples = load_examples(made, "test", root)
    assert examples.inputs["text"].tolist() == [[f"s é {i}", f"q {i}"] for i in (0, 2, 4)]
    assert examples.labels.tolist() == [0, 0, 0]
    assert examples.notes == ("3 examples have no label (-1) and were left out",)


@pytest.mark.parametrize("label", ["label", None])
def test_without_labels(root, label):
    questions = [{"question": f"q {i}"} | ({} if label else {"label": i}) for i in range(3)]
    features = {"question": TEXT} | ({} if label else {"label": CLASSES})
    prepare(root / "tfds" / "bare" / "1.0.0", {"test": questions}, features)
    examples = load_examples(config("bare", test="test", label=label), "test", root, limit=2)
    assert examples.labels.tolist() == [-1, -1] and examples.class_names == ()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (config("shapes:1.9.0", test="dev"), "no split 'dev'; available: train, test"),
        (config("shapes:9.9.9", test="test"), "has version 1.10.0, 1.9.0 of shapes"),
        (config("shapes:1.9.0", test="test", label="y"), "no label key 'y'; it has image, label"),
        (config("shapes:1.9.0", test="test", image="x"), "no image key 'x'; it has image, label"),
        (config("shapes:1.9.0", test="test", text=("x",)), "no text key 'x'; available: none"),
        (config("pairs", test="train"), "set text to the text keys, one or two of"),
        (
            config("nothing", test="test"),
            "TFDS has no data set of this name, and .* holds pairs/tiny, shapes; hf:",
        ),
        (
            config("glue/cola", test="test"),
            "prepare it: pip install tensorflow && tfds build glue/cola --file_format=array_record --data",
        ),
        (config("eurosat", test="test"), "tfds build eurosat --file_format=array_record"),
    ],
)
def test_bad_input(root, made, message):
    with pytest.raises(UserError, match=message) as error:
        load_examples(made, "test", root)
    assert "\n" not in str(error.value)


def test_sets_stored_otherwise_or_broken(root):
    info = root / "tfds" / "shapes" / "1.9.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(
        UserError, match=r"1.9.0 is not array_record; prepare it again: pip install tensorflow && tfds"
    ):
        load_examples(config("shapes:1.9.0", test="test"), "test", root)
    info.write_text("{")
    with pytest.raises(UserError, match="is not a readable TFDS data set"):
        load_examples(config("shapes:1.9.0", test="test"), "test", root)


def test_default_directory(root, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(root / "tfds"))
    assert len(load_examples(DataConfig("tfds:shapes:1.9.0", test="test"), "test", root).labels) == 5


shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
SPLITS: dict[Split, str] = {"search": "validation[:50%]", "selection": "validation[50%:]", "test": "test"}


def load_shared(name, **more: Any):
    made = DataConfig("tfds:" + name, data_dir=str(SHARED), **{str(k): v for k, v in SPLITS.items()}, **more)
    return {which: load_examples(made, which, SHARED, limit=200) for which in SPLITS}


@shared
@pytest.mark.parametrize(
    ("name", "classes"),
    [("mnist", 10), ("fashion_mnist", 10), ("gtsrb", 43), ("ahcd", 28), ("cifar10_gray", 10)],
)
def test_shared_images(name, classes):
    splits = load_shared(name)
    check_splits({name: splits})
    for examples in splits.values():
        assert examples.inputs["image"].shape == (200, 28, 28, 1)
        assert len(examples.class_names) == classes
        assert examples.inputs["image"].std() > 20 and len(set(examples.labels.tolist())) >= classes * 0.7
    if name == "fashion_mnist":  # names from TFDS's own code: the directory has none
        assert splits["test"].class_names[-1] == "Ankle boot"


@shared
@pytest.mark.parametrize(
    ("name", "text"),
    [("snli", ()), ("glue/mnli", ()), ("glue/qnli", ("sentence", "question")), ("sci_tail", ())],
)  # fmt: skip
def test_shared_texts(name, text):
    splits = load_shared(name, text=text)
    check_splits({name: splits})
    for examples in splits.values():
        assert examples.inputs["text"].shape[1] == 2 and len(examples.class_names) in (2, 3)
        assert all(isinstance(part, str) and part for pair in examples.inputs["text"] for part in pair)
