"""Preprocessed examples on disk, so that a second start reads one file.

The cache lives in ``$ENMP_CACHE``, by default ``~/.cache/enmp-jax``; it may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zlib
from pathlib import Path

import numpy as np

from enmp_jax.data.base import Examples, Span
from enmp_jax.io.files import write_bytes

VERSION = 1
"""Part of every key; raised when the meaning of cached entries changes."""


def directory() -> Path:
    """Where the cache lives."""
    given = os.environ.get("ENMP_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "enmp-jax"


def key(*parts: object) -> str:
    """Hash of everything an entry depends on."""
    text = json.dumps([VERSION, *parts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def read(entry: str) -> Examples | None:
    """The cached examples, or None when there are none or the file is damaged."""
    from safetensors import SafetensorError, safe_open

    path = directory() / "examples" / f"{entry}.safetensors"
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = json.loads((file.metadata() or {})["examples"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _checksums(arrays) != metadata["checksums"]:
            return None
        return Examples(
            inputs={
                name.removeprefix("inputs."): a for name, a in arrays.items() if name.startswith("inputs.")
            },
            labels=arrays["labels"],
            class_names=tuple(metadata["class_names"]),
            keys=np.ascontiguousarray(arrays["keys"]).view("S32").reshape(-1),
            source=metadata["source"],
            spans=tuple(Span(*span) for span in metadata["spans"]),
            notes=tuple(metadata["notes"]),
        )
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def write(entry: str, examples: Examples) -> None:
    """Store examples under a key, whole or not at all. A cache that cannot be written is no error."""
    from safetensors.numpy import save_file

    arrays = {f"inputs.{name}": value for name, value in examples.inputs.items()}
    arrays["labels"] = examples.labels
    arrays["keys"] = examples.keys.astype("S32").view(np.uint8).reshape(-1, 32)
    # safetensors writes non-contiguous arrays wrongly
    arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    metadata = {
        "class_names": examples.class_names, "source": examples.source, "spans": examples.spans,
        "notes": examples.notes, "checksums": _checksums(arrays),
    }  # fmt: skip
    folder = directory() / "examples"
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".part")
        os.close(handle)
        save_file(arrays, temporary, {"examples": json.dumps(metadata)})
        os.replace(temporary, folder / f"{entry}.safetensors")
    except OSError:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def read_array(kind: str, entry: str) -> np.ndarray | None:
    """A cached array, or None when there is none or the file is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        array = load_file(directory() / kind / f"{entry}.safetensors")["array"]
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return array if np.isfinite(array).all() else None


def write_array(kind: str, entry: str, array: np.ndarray) -> None:
    """Store an array under a key, whole or not at all. A cache that cannot be written is no error."""
    from safetensors.numpy import save

    content = save({"array": np.asarray(array, order="C")})
    with contextlib.suppress(OSError):
        folder = directory() / kind
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / f"{entry}.safetensors", content)


def _checksums(arrays: dict[str, np.ndarray]) -> dict[str, int]:
    return {name: zlib.crc32(np.ascontiguousarray(value).data.cast("B")) for name, value in arrays.items()}
