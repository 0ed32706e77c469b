"""Split expressions, image transforms, CLIP's prompts."""

import numpy as np
import pytest

from enmp_jax.data import prompts, transforms
from enmp_jax.data.base import Span
from enmp_jax.data.slices import resolve
from enmp_jax.errors import UserError

SPLITS = {"train": 1000, "validation": 300, "test-clean": 7}


@pytest.mark.parametrize(
    ("expression", "spans"),
    [
        ("train", [("train", 0, 1000)]),
        ("train[:80%]", [("train", 0, 800)]),
        ("train[80%:]", [("train", 800, 1000)]),
        ("validation[100:200]", [("validation", 100, 200)]),
        ("validation[-50:]", [("validation", 250, 300)]),
        ("validation[:-10%]", [("validation", 0, 270)]),
        ("train[10%:]+validation", [("train", 100, 1000), ("validation", 0, 300)]),
        (" train[ :10 ] + train[ 990: ]", [("train", 0, 10), ("train", 990, 1000)]),
        ("test-clean[:50%]", [("test-clean", 0, 4)]),  # 3.5, rounded to the closest even
        ("validation[33.4%:1_00]", [("validation", 100, 100)]),
    ],
)
def test_expressions(expression, spans):
    if spans[0][1] == spans[0][2]:
        with pytest.raises(UserError, match="is empty"):
            resolve(expression, SPLITS, "data")
    else:
        assert list(resolve(expression, SPLITS, "data")) == [Span(*s) for s in spans]


def test_percentages_cover_every_row_once():
    for size in (1, 7, 100, 333, 1001):
        parts = [f"s[{p}%:{p + 10}%]" for p in range(0, 100, 10)]
        rows = []
        for part in parts:
            try:
                span = resolve(part, {"s": size}, "data")[0]
            except UserError as error:
                assert "is empty" in str(error)
                continue
            rows += range(span.start, span.stop)
        assert rows == list(range(size))


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("dev", "no split 'dev'; available: train, validation, test-clean"),
        ("train[:", "cannot read the split"),
        ("", "cannot read the split"),
        ("train[100]", "cannot read the split"),
        ("train[:ten]", "neither a row number nor a %"),
        ("train[_:]", "neither a row number nor a %"),
        ("train[:1__0]", "neither a row number nor a %"),
        ("train[:_10%]", "neither a row number nor a %"),
        ("train[:2000]", "out of range"),
        ("train[:101%]", "out of range"),
        ("train[-2000:]", "out of range"),
        ("train[200:100]", "is empty"),
        ("train[:50%]+train[40%:]", "twice"),
    ],
)
def test_bad_expressions(expression, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")) as error:
        resolve(expression, SPLITS, "data")
    assert "\n" not in str(error.value)


IMAGE = np.arange(2 * 3 * 2, dtype=np.uint8).reshape(2, 3, 2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rotate90", lambda y, x: (x, 2 - y)),  # (row, column) of the result -> of the source
        ("rotate180", lambda y, x: (1 - y, 2 - x)),
        ("rotate270", lambda y, x: (1 - x, y)),
        ("mirror", lambda y, x: (y, 2 - x)),
        ("flip", lambda y, x: (1 - y, x)),
    ],
)
def test_geometric_transforms(name, expected):
    result = transforms.parse([name])(IMAGE)
    assert result.shape == ((3, 2, 2) if "90" in name or "270" in name else (2, 3, 2))
    assert result.flags.c_contiguous
    for y in range(result.shape[0]):
        for x in range(result.shape[1]):
            np.testing.assert_array_equal(result[y, x], IMAGE[expected(y, x)])


def test_invert_and_occlude():
    np.testing.assert_array_equal(transforms.parse(["invert"])(IMAGE), 255 - IMAGE.astype(int))
    white = np.full((8, 8, 1), 255, np.uint8)
    hidden = transforms.parse(["occlude"])(white)[..., 0]
    assert (hidden[2:6, 2:6] == 0).all() and (hidden == 0).sum() == 16
    corner = transforms.parse(["occlude:0,0.5,0.25,1"])(white)[..., 0]
    assert (corner[:2, 4:] == 0).all() and (corner == 0).sum() == 8
    assert (white == 255).all()  # the source is left alone
    stacked = transforms.parse(["occlude"])(np.stack([white, white]))
    np.testing.assert_array_equal(stacked[1, ..., 0], hidden)


def test_transforms_apply_from_left_to_right():
    both = transforms.parse(["rotate90", "mirror"])(IMAGE)
    np.testing.assert_array_equal(both, transforms.mirror(transforms.rotate90(IMAGE)))
    assert not np.array_equal(both, transforms.parse(["mirror", "rotate90"])(IMAGE))


@pytest.mark.parametrize(
    ("name", "message"),
    [("rotate_90", "did you mean 'rotate90'"), ("zzz", "known: rotate90"), ("occlude:1,2", "TOP,LEFT")],
)
def test_unknown_transforms(name, message):
    with pytest.raises(UserError, match=message):
        transforms.parse([name])


def test_prompts():
    sizes = {
        n: len(prompts(n).class_names)
        for n in ("stanford_cars", "dtd", "gtsrb", "sun397", "resisc45", "svhn")
    }
    assert sizes == {"stanford_cars": 196, "dtd": 47, "gtsrb": 43, "sun397": 397, "resisc45": 45, "svhn": 10}
    # the order of TFDS's labels: AnnualCrop, Forest, HerbaceousVegetation, .. SeaLake
    assert prompts("eurosat").class_names[0] == "annual crop land"
    assert prompts("eurosat").class_names[-1] == "lake or sea"
    for name in (*sizes, "mnist", "eurosat"):
        found = prompts(name)
        assert len(set(found.class_names)) == len(found.class_names)
        assert all(t.count("{}") == 1 for t in found.templates)
    with pytest.raises(UserError, match="no prompts are packaged for 'imagenet'"):
        prompts("imagenet")
