"""Preprocessed examples in the cache on disk, so that a second start reads one file."""

from __future__ import annotations

import numpy as np

from enmp_jax.data.base import Examples, Span
from enmp_jax.io import cache

_FOLDER = "examples"
_INPUT = "inputs."
"""What the names of input arrays start with in the file."""


def read(key: str) -> Examples | None:
    """The cached examples, or None when there are none or the file is damaged.

    Args:
        key: from ``io.cache.key``.
    """
    entry = cache.read(_FOLDER, key)
    if entry is None:
        return None
    arrays, notes = entry
    try:
        return Examples(
            inputs={name.removeprefix(_INPUT): a for name, a in arrays.items() if name.startswith(_INPUT)},
            labels=arrays["labels"],
            class_names=tuple(notes["class_names"]),
            keys=np.ascontiguousarray(arrays["keys"]).view("S32").reshape(-1),
            source=notes["source"],
            spans=tuple(Span(*span) for span in notes["spans"]),
            notes=tuple(notes["notes"]),
        )
    except (KeyError, ValueError, TypeError):
        return None


def write(key: str, examples: Examples) -> None:
    """Store examples under a key, whole or not at all. A cache that cannot be written is no error.

    Args:
        key: from ``io.cache.key``.
        examples: their inputs must be numbers (texts without a preprocess are strings).
    """
    arrays = {f"{_INPUT}{name}": value for name, value in examples.inputs.items()}
    arrays["labels"] = examples.labels
    arrays["keys"] = np.ascontiguousarray(examples.keys.astype("S32")).view(np.uint8).reshape(-1, 32)
    described = ("class_names", "source", "spans", "notes")
    cache.write(_FOLDER, key, arrays, {name: getattr(examples, name) for name in described})
