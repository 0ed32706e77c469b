"""Writing files and directories so that none is ever half there, and comparing what is on disk."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from enmp_jax.errors import UserError, one_line, reason
from enmp_jax.io.files import flush_directory, remove_leftovers, temporary_name, write_atomically
from enmp_jax.io.reading import finite, open_tensors


def check_unused(path: str | Path) -> Path:
    """The absolute path, if a new directory can take it; commands call it before long work.

    Raises:
        UserError: it is there and not an empty directory, or cannot be read.
    """
    try:
        path = Path(path).expanduser()
        path = Path(os.path.abspath(path))  # "." and a trailing ".." have no name of their own
        used = path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir())))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home directory for "~"
        raise UserError(f"cannot make the directory {path}: {reason(error)}") from None
    if used:
        raise UserError(f"{path} is already there: give a new or empty directory")
    return path


@contextlib.contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """A temporary directory next to ``path`` that takes its name when the block ends without error.

    Raises:
        UserError: ``path`` is there and not an empty directory, or cannot be made.
    """
    path = check_unused(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        temporary = temporary_name(path)
        temporary.mkdir()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot make the directory {path}: {reason(error)}") from None
    try:
        yield temporary
        try:
            flush_directory(temporary)
            temporary.replace(path)
            flush_directory(path.parent)
        except OSError as error:
            raise UserError(f"cannot make the directory {path}: {reason(error)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after a success it is gone already


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """``files.write_atomically`` for files that the user asked for: what goes wrong is one line.

    Raises:
        UserError: the disk is full, the directory cannot be written, ...
    """
    try:
        write_atomically(path, write)
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from None
    except safetensors.SafetensorError as error:  # how safetensors reports a full disk
        raise UserError(f"cannot write {path}: {one_line(error)}") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, read it back and compare.

    Raises:
        UserError: the file cannot be written, or reads back different.
    """
    write_file(path, lambda temporary: temporary.write_bytes(text.encode()))
    if path.read_bytes() != text.encode():
        raise UserError(f"{path} does not read back as written: check the disk")


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, read it back and compare bit for bit.

    Raises:
        UserError: NaN or Inf in a tensor, or the file cannot be written, or reads back different.
    """
    for key, value in tensors.items():
        if not finite(np.asarray(value)):
            raise UserError(f"{path.name}: {one_line(key)} has NaN or Inf in it: not written")
    # safetensors 0.8.0 writes other layouts than C order wrongly without saying so (its issue 825)
    plain = {key: np.asarray(value, order="C") for key, value in tensors.items()}
    write_file(path, lambda temporary: safetensors.numpy.save_file(plain, temporary, dict(metadata)))
    with open_tensors(path) as handle:
        same = set(handle.keys()) == set(plain)
        same = same and all(same_bits(handle.get_tensor(key), value) for key, value in plain.items())
    if not same:
        raise UserError(f"{path} does not read back as written: check the disk")


def same_bits(x: np.ndarray, y: np.ndarray) -> bool:
    """Equal type, shape and bits (so that NaN equals itself and -0 differs from 0)."""
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    bits = np.dtype(f"u{x.dtype.itemsize}")
    return np.array_equal(np.ascontiguousarray(x).view(bits), np.ascontiguousarray(y).view(bits))
