"""Accuracies of the adapters alone, measured once and remembered on disk.

They cost a full pass over a split for every adapter and are the same for every merge method, scale
and mask. The files live in the cache (``$ENMP_CACHE``) and may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from enmp_jax.evaluation.loaded_run import LoadedRun, Split
from enmp_jax.evaluation.scoring import Counts
from enmp_jax.io import cache
from enmp_jax.io.files import write_bytes
from enmp_jax.models import checkpoint
from enmp_jax.version import code_digest


def remembered(key: str, tasks: int, measure: Callable[[], Counts]) -> Counts:
    """The counts of every adapter alone on a split: from the cache, else measured and written there.

    Several processes measure together, so they do not look: one with and one without the file would
    wait for each other forever.

    Args:
        key: see ``key``.
        tasks: number of tasks.
        measure: makes the counts [task].
    """
    if jax.process_count() > 1:
        return measure()
    path = cache.directory() / "experts" / f"{key}.json"
    found = _read(path, tasks)
    if found is None:
        found = Counts(*(np.asarray(x, np.float32) for x in measure()))
        _write(path, found)
    return found


def key(loaded: LoadedRun, split: Split) -> str:
    """Hash of what the counts depend on: code, base, adapters, heads, examples, compute type and backend.

    Contents are hashed, except of the base's weights: those count by file name, size and time.
    """
    digest = hashlib.blake2b(digest_size=20)
    parts = [code_digest(), loaded.tasks, loaded.run.base.dtype, jax.default_backend(), jax.__version__]
    digest.update(json.dumps([*parts, checkpoint.base_identity(loaded.base)]).encode())
    for tree in (loaded.stack, loaded.heads):
        for leaf_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            _update(digest, jax.tree_util.keystr(leaf_path), np.asarray(leaf))
    digest.update(f"normalise {loaded.heads.normalise}".encode())
    for task, examples in zip(loaded.tasks, loaded.examples[split], strict=True):
        for name in sorted(examples.inputs):
            _update(digest, f"{task} {name}", np.asarray(examples.inputs[name]))
        _update(digest, f"{task} labels", examples.labels)
    return digest.hexdigest()


def _update(digest: Any, name: str, array: np.ndarray) -> None:
    digest.update(f"{name} {array.dtype} {array.shape} ".encode())
    digest.update(np.ascontiguousarray(array).tobytes())


def _read(path: Path, tasks: int) -> Counts | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        counts = Counts(*(np.asarray(data[name], np.float32) for name in Counts._fields))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return counts if all(x.shape == (tasks,) for x in counts) else None


def _write(path: Path, counts: Counts) -> None:
    """Whole or not at all; a cache that cannot be written is no error."""
    text = json.dumps({name: np.asarray(x).tolist() for name, x in counts._asdict().items()})
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, text.encode())
