"""Results on disk that are costly to make again: named arrays under a hash of what they depend on.

The cache lives in ``$ENMP_CACHE``, by default ``~/.cache/enmp-jax``; it may be deleted at any time.
A damaged entry counts as missing, and a cache that cannot be written is no error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from enmp_jax.io.files import write_atomically

VERSION = 2
"""Part of every key; raised when the meaning of cached entries changes."""


class Entry(NamedTuple):
    """Named arrays and a JSON object that describes them."""

    arrays: dict[str, np.ndarray]
    notes: dict[str, Any]


def directory() -> Path:
    """Where the cache lives."""
    given = os.environ.get("ENMP_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "enmp-jax"


def key(*parts: object) -> str:
    """Hash of everything an entry depends on, 40 hexadecimal digits."""
    text = json.dumps([VERSION, *parts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def read(folder: str, key: str) -> Entry | None:
    """The entry of a key, or None when there is none or its file is damaged."""
    try:
        with safe_open(_path(folder, key), framework="numpy") as file:
            header = json.loads((file.metadata() or {})["entry"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Entry(arrays, header["notes"]) if _checksums(arrays) == header["checksums"] else None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def write(folder: str, key: str, arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> None:
    """Store arrays and a JSON object under a key, whole or not at all."""
    # safetensors 0.8.0 writes other layouts than C order wrongly without saying so (its issue 825)
    plain = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    header = {"entry": json.dumps({"notes": notes, "checksums": _checksums(plain)})}
    path = _path(folder, key)
    with contextlib.suppress(OSError, SafetensorError):  # the latter is how safetensors reports a full disk
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: save_file(plain, temporary, header))


def read_array(folder: str, key: str) -> np.ndarray | None:
    """The one array of a key, or None when there is none or its file is damaged."""
    found = read(folder, key)
    return found.arrays.get("array") if found else None


def write_array(folder: str, key: str, array: np.ndarray) -> None:
    """Store one array under a key, whole or not at all."""
    write(folder, key, {"array": array}, {})


def _path(folder: str, key: str) -> Path:
    return directory() / folder / f"{key}.safetensors"


def _checksums(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    return {name: zlib.crc32(np.ascontiguousarray(value).tobytes()) for name, value in arrays.items()}
