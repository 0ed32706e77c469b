"""Data files of strangers: what would exhaust the machine, or is of no shape, is refused in one line."""

import io
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest

from enmp_jax.config.sections import DataConfig
from enmp_jax.data import images
from enmp_jax.data.files import NpzSource, existing
from enmp_jax.data.labels import number_labels
from enmp_jax.errors import UserError


def png(width, height):
    """A PNG whose header claims a size; compressed, its pixels are next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(13000, 13000), (10**6, 10**6), (100_000_000, 1)])
def test_small_files_of_large_images_are_not_decoded(size):
    with pytest.raises(images.BadImage, match="pixel"):
        images.decode(png(*size))


def test_images_without_pixels():
    for shape in ((0, 5), (5, 0, 3)):
        with pytest.raises(images.BadImage, match="no pixels"):
            images.decode(np.zeros(shape, np.uint8))


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        existing(tmp_path / "pipe", "data")
    with pytest.raises(images.BadImage, match="no such file"):
        images.decode(tmp_path / "pipe")


def npz(path, **arrays):
    np.savez(path, **arrays)
    return NpzSource(path, DataConfig(f"npz:{path}"))


IMAGES = np.zeros((4, 2, 2), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({"split": np.asarray([["a", "b"]] * 4)}, r"'split' has the shape \[4, 2\]"),
        ({"label": np.asarray(3)}, "one label an example"),
        ({"label": np.full(4, 2**64 - 1, np.uint64)}, "too large to number a class"),
        ({"label": np.arange(4), "class_names": np.asarray("x")}, "'class_names' has the shape"),
    ],
)
def test_arrays_of_no_shape(tmp_path, arrays, line):
    with pytest.raises(UserError, match=line):
        source = npz(tmp_path / "d.npz", image=IMAGES, **arrays)
        source.splits(), source.class_names()


def test_an_array_that_claims_a_terabyte(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("image.npy", header.getvalue())
    with pytest.raises(UserError, match="too short for the shape"):
        NpzSource(tmp_path / "d.npz", DataConfig("npz:d.npz")).splits()


def test_labels_of_many_digits():
    with pytest.raises(UserError, match="too large to number a class") as caught:
        number_labels([10**4000], DataConfig("x"))
    assert len(str(caught.value)) < 200
