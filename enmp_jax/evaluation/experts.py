"""What every adapter answers alone, unmerged, on its own task's examples: computed once, kept on disk.

The reference accuracies follow from it, and the targets of every fitness that asks what the expert
would answer. It costs one pass over a split and is the same for every merge method, scale and mask. The
files live in the cache (``$ENMP_CACHE``) and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float

from enmp_jax import merges
from enmp_jax.data import Examples, batch
from enmp_jax.devices.distributed import put
from enmp_jax.devices.mesh import replicate
from enmp_jax.evaluation.loaded_run import LoadedRun, Split
from enmp_jax.evaluation.scoring import class_log_probabilities
from enmp_jax.io import cache
from enmp_jax.models import checkpoint
from enmp_jax.version import code_digest

LogProbabilities = list[Float[np.ndarray, "_ class"]]
"""One array per task, -inf for classes that the task does not have."""


def log_probabilities(loaded: LoadedRun, split: Split) -> LogProbabilities:
    """Class log-probabilities of every task's examples under its own adapter, from the cache or computed.

    Several processes compute together, so they do not look: one with and one without the file would
    wait for each other forever.
    """
    if jax.process_count() > 1:
        return _compute(loaded, split)
    entry = key(loaded, split)
    examples, rows = loaded.examples[split], sum(map(int, loaded.sizes(split)))
    found = cache.read_array("experts", entry)
    if found is None or found.shape != (rows, loaded.heads.allowed.shape[1]):
        # -inf is no number that the cache takes
        found = np.maximum(np.concatenate(_compute(loaded, split)), np.finfo(np.float32).min)
        cache.write_array("experts", entry, found)
    found = np.where(found <= np.finfo(np.float32).min, -np.inf, found)
    return np.split(found, np.cumsum([len(e.labels) for e in examples])[:-1])


def _compute(loaded: LoadedRun, split: Split) -> LogProbabilities:
    merge, stack = merges.make("sum"), loaded.stack  # the sum of one adapter is that adapter
    ingredients = replicate(merge.prepare(stack), loaded.mesh)
    heads = replicate(loaded.heads, loaded.mesh)

    whole, divided = (NamedSharding(loaded.mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))

    @partial(jax.jit, out_shardings=whole)
    def answers(params: Any, ingredients: Any, heads: Any, keep: Any, inputs: Any, task: Any) -> jax.Array:
        deltas = merge.merge(ingredients, keep, 1.0)
        return class_log_probabilities(heads, loaded.backbone.features(params, inputs, deltas), task)

    found: LogProbabilities = []
    for i, examples in enumerate(loaded.examples[split]):
        keep = put(np.eye(stack.n_tasks, dtype=np.float32)[[i] * stack.n_layers], whole)
        rows: list[np.ndarray] = []
        order: list[np.ndarray] = []
        numbered = examples._replace(labels=np.arange(len(examples.labels), dtype=np.int32))
        for bucket in batch([numbered], loaded.run.evaluation.batch_size):
            for b in range(bucket.label.shape[0]):
                inputs, numbers, task, mask = jax.tree.map(lambda x, b=b: np.asarray(x[b]), tuple(bucket[:4]))
                inputs, task = put((inputs, np.full_like(task, i)), divided)
                found_here = answers(loaded.params, ingredients, heads, keep, inputs, task)
                rows.append(np.asarray(found_here)[mask])
                order.append(numbers[mask])
        found.append(np.concatenate(rows)[np.argsort(np.concatenate(order))])
    return found


def key(loaded: LoadedRun, split: Split) -> str:
    """Hash of what the answers depend on: code, base, adapters, heads, examples, compute type and backend.

    Contents are hashed, except of the base's weights: those count by file name, size and time.
    """
    digest = hashlib.blake2b(digest_size=20)
    parts = [code_digest(), loaded.tasks, loaded.run.base.dtype, jax.default_backend(), jax.__version__]
    digest.update(json.dumps([*parts, checkpoint.base_identity(loaded.base)]).encode())
    for tree in (loaded.stack, loaded.heads):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            _update(digest, jax.tree_util.keystr(path), np.asarray(leaf))
    digest.update(f"normalise {loaded.heads.normalise}".encode())
    for task, examples in zip(loaded.tasks, loaded.examples[split], strict=True):
        for name in sorted(examples.inputs):
            _update(digest, f"{task} {name}", np.asarray(examples.inputs[name]))
    return digest.hexdigest()


def accuracies(answers: LogProbabilities, examples: Sequence[Examples]) -> Float[np.ndarray, " task"]:
    """Shares of examples whose label is the expert's first choice."""
    return np.asarray(
        [np.mean(a.argmax(axis=1) == e.labels) for a, e in zip(answers, examples, strict=True)], np.float32
    )


def _update(digest: Any, name: str, array: np.ndarray) -> None:
    digest.update(f"{name} {array.dtype} {array.shape} ".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
