"""Writing files: whole or not at all, on the disk before they take their name, readable by others."""

import os
import stat

import numpy as np
import pytest

from enmp_jax.errors import UserError
from enmp_jax.io import cache, writing
from enmp_jax.io.files import write_atomically, write_bytes


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_bytes(path, b"old")

    def fail(temporary):
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, fail)
    with pytest.raises(UserError, match="cannot write .*a.json: No space left on device"):
        writing.write_file(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_contents_are_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    events = []

    def on_fsync(file):
        found = os.fstat(file)
        if stat.S_ISREG(found.st_mode):  # directories are flushed too, after the rename
            events.append(found.st_size)

    monkeypatch.setattr(os, "fsync", on_fsync)
    path = tmp_path / "a"
    for write in (
        lambda: write_bytes(path, b"12345"),
        lambda: writing.write_text(path, "12345"),
        lambda: cache.write_array("kind", "key", np.ones(3)),
    ):
        monkeypatch.setenv("ENMP_CACHE", str(tmp_path / "cache"))
        write()
    assert events[:2] == [5, 5] and len(events) == 3


def test_permissions_are_those_of_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        writing.write_tensors(tmp_path / "a", {"x": np.ones(3, np.float32)}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


def test_a_damaged_cache_entry_counts_as_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("ENMP_CACHE", str(tmp_path))
    array = np.arange(6.0).reshape(2, 3).T  # not in C order
    cache.write("kind", "key", {"x": array, "empty": np.zeros((0, 2))}, {"a": [1]})
    found = cache.read("kind", "key")
    assert found is not None and found.notes == {"a": [1]}
    np.testing.assert_array_equal(found.arrays["x"], array)
    path = tmp_path / "kind" / "key.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert cache.read("kind", "key") is None and cache.read("kind", "none") is None
