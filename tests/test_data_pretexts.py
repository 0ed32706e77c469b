"""Labels computed from images."""

import numpy as np
import pytest

from enmp_jax.config.sections import DataConfig
from enmp_jax.data import load_examples
from enmp_jax.data.load import content_key
from enmp_jax.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("ENMP_CACHE", str(tmp_path / "cache"))
    np.savez(tmp_path / "a.npz", image=IMAGES, label=np.full(40, -1), split=np.repeat("train", 40))
    return tmp_path


def load(root, **more):
    return load_examples(DataConfig("npz:a.npz", train="train", **more), "train", root)


def test_rotation_turns_by_its_label_and_is_always_the_same(root):
    examples = load(root, pretext="rotation")
    assert set(examples.labels.tolist()) == {0, 1, 2, 3}
    for image, turned, turns in zip(IMAGES, examples.inputs["image"], examples.labels, strict=True):
        np.testing.assert_array_equal(turned, np.rot90(image, turns))
        assert turns == int(content_key(image)[:8], 16) % 4
    # what was seen is still known by its untouched content
    assert examples.keys.tolist() == [content_key(image) for image in IMAGES]


def test_ink_is_the_level_of_one_cell_before_transforms(root):
    plain = load(root, pretext="ink:1,3")
    cells = IMAGES[:, 2:4, 6:8].reshape(40, -1).mean(1)
    np.testing.assert_array_equal(plain.labels, cells.astype(int) * 4 // 256)
    np.testing.assert_array_equal(plain.inputs["image"], IMAGES)
    mirrored = load(root, pretext="ink:1,3", transforms=("mirror",))
    np.testing.assert_array_equal(mirrored.labels, plain.labels)
    np.testing.assert_array_equal(mirrored.inputs["image"], IMAGES[:, :, ::-1])


@pytest.mark.parametrize("name", ["turn", "ink", "ink:4,0", "ink:-1,0", "ink:a,b", "ink:1"])
def test_unknown_pretexts(root, name):
    with pytest.raises(UserError, match="write rotation, or ink:ROW,COLUMN"):
        load(root, pretext=name)


def test_a_label_map_has_nothing_to_map(root):
    with pytest.raises(UserError, match="a label map has nothing to map"):
        load(root, pretext="rotation", labels=(0, 1, 2, 3))


def test_texts_have_no_pretext(root):
    (root / "t.jsonl").write_text('{"text": "a", "label": 0, "split": "train"}\n')
    config = DataConfig("jsonl:t.jsonl", train="train", pretext="rotation", text=("text",))
    with pytest.raises(UserError, match=r"holds texts: pretexts \(rotation\) are for images"):
        load_examples(config, "train", root)
