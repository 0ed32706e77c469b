"""What every adapter answers alone, unmerged, on its own task's examples: computed once, kept on disk.

The reference scores follow from it, and the targets of every fitness that asks what the expert
would answer. It costs one pass over a split and is the same for every merge method, scale and mask. The
files live in the cache (``$ENMP_CACHE``) and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from enmp_jax import merges
from enmp_jax.data import Batches, Examples, batch, kind_of
from enmp_jax.data.batches import LikeliestTokens
from enmp_jax.deltas import Deltas
from enmp_jax.devices.distributed import put
from enmp_jax.devices.mesh import replicate
from enmp_jax.evaluation.fitness import FITNESS, TEMPERATURES, Fitness, task_values
from enmp_jax.evaluation.kinds import (
    at_targets,
    likeliest,
    option_log_probabilities,
    pooled_states,
    read_tokens,
)
from enmp_jax.evaluation.loaded_run import LoadedRun, Split
from enmp_jax.io import cache
from enmp_jax.models import checkpoint
from enmp_jax.models.base import Backbone
from enmp_jax.version import code_digest

OptionAnswers = Float[np.ndarray, "_ option"]
"""Log-probabilities of classes or choices, -inf for those that the task or example does not have."""


class TokenAnswers(NamedTuple):
    """What an expert says at the targets of its completions.

    Attributes:
        log_probability: of each target, nats.
        values: name of a fitness -> its value at each target.
        likeliest: what the expert expects there, [example, target] as the examples have them.
    """

    log_probability: Float[np.ndarray, " target"]
    values: dict[str, Float[np.ndarray, "target *temperature"]]
    likeliest: LikeliestTokens


Answers = OptionAnswers | TokenAnswers


def answers(loaded: LoadedRun, split: Split) -> list[Answers]:
    """What every task's own adapter answers on its examples, from the cache or computed.

    Several processes compute together, so they do not look: one with and one without the file would
    wait for each other forever.
    """
    examples = loaded.examples[split]
    if jax.process_count() > 1:
        return _unpacked(loaded, split, _compute(loaded, split))
    entry, names = key(loaded, split), [str(i) for i in range(len(examples))]
    cached = cache.read("experts", entry)
    found = [cached.arrays.get(name) for name in names] if cached else []
    rows = [len(e.labels) for e in examples]
    if [None if a is None else len(a) for a in found] != rows:
        # -inf is no number that the cache takes
        found = [np.maximum(a, np.finfo(np.float32).min) for a in _compute(loaded, split)]
        cache.write("experts", entry, dict(zip(names, found, strict=True)), {})
    restored = [np.where(a <= np.finfo(np.float32).min, -np.inf, a) for a in found if a is not None]
    return _unpacked(loaded, split, restored)


def hidden_states(loaded: LoadedRun, split: Split) -> list[Float[np.ndarray, "_ layer width"]]:
    """Pooled hidden states of every task's own adapter on its examples (``kinds.pooled_states``), from the
    cache or computed as ``answers`` are."""

    if jax.process_count() > 1:
        return _compute(loaded, split, _read_states)
    entry, names = key(loaded, split) + "-states", [str(i) for i in range(len(loaded.tasks))]
    cached = cache.read("experts", entry)
    if cached is None:
        cached = cache.Entry(dict(zip(names, _compute(loaded, split, _read_states), strict=True)), {})
        cache.write("experts", entry, cached.arrays, {})
    return [cached.arrays[name] for name in names]


def _unpacked(loaded: LoadedRun, split: Split, found: Sequence[np.ndarray]) -> list[Answers]:
    examples = loaded.examples[split]
    return [
        _token_answers(a, e.inputs["target_branch"] > 0) if kind == "completion" else a
        for a, e, kind in zip(found, examples, loaded.kinds, strict=True)
    ]


def _token_answers(
    packed: Float[np.ndarray, "example target column"], real: Bool[np.ndarray, "example target"]
) -> TokenAnswers:
    """The inverse of ``_packed_tokens``, for the targets that there are."""
    widths = [len(TEMPERATURES) if f.name == "calibrated" else 1 for f in FITNESS.values()]
    found, *parts = np.split(packed, np.cumsum([1, *widths]), axis=-1)
    values = {
        name: part[real] if name == "calibrated" else part[real][:, 0]
        for name, part in zip(FITNESS, parts, strict=False)
    }
    ids, expected = np.split(parts[-1], 2, axis=-1)
    return TokenAnswers(found[real][:, 0], values, LikeliestTokens(ids.astype(np.int32), expected))


def _packed_tokens(logits: Array, target: Array, _: None) -> Float[Array, "token column"]:
    """All of ``TokenAnswers`` as columns: float32 holds the numbers of 16 million tokens."""
    expected = likeliest(jax.nn.log_softmax(logits, axis=1))
    read = [read_tokens(logits, target, expected, kind) for kind in FITNESS.values()]
    values = [value.reshape(len(target), -1) for _, _, value in read]
    columns = [read[0][1][:, None], *values, expected.ids.astype(jnp.float32), expected.log_probability]
    return jnp.concatenate(columns, axis=1)


Read = Callable[[Backbone, Any, Any, Batches, Deltas], Array]
"""``read(backbone, params, heads, batch, deltas) -> [row, ...]``"""


def _read_answers(backbone: Backbone, params: Any, heads: Any, batch: Batches, deltas: Deltas) -> Array:
    """[row, option], or [row, target, column] (see ``_packed_tokens``)."""
    if kind_of(batch.inputs) == "completion":
        return at_targets(backbone, params, batch, deltas, _packed_tokens)
    return option_log_probabilities(backbone, params, heads, batch, deltas)


def _read_states(backbone: Backbone, params: Any, heads: Any, batch: Batches, deltas: Deltas) -> Array:
    return pooled_states(backbone, params, batch, deltas)


def _compute(loaded: LoadedRun, split: Split, read: Read = _read_answers) -> list[np.ndarray]:
    """What is read of every task's own examples."""
    merge, stack = merges.make("sum"), loaded.stack  # the sum of one adapter is that adapter
    backbone = loaded.backbone  # the program below outlives this split's examples
    ingredients = replicate(merge.prepare(stack), loaded.mesh)
    heads = replicate(loaded.heads, loaded.mesh)
    whole, divided = (NamedSharding(loaded.mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))

    def of_one(params: Any, ingredients: Any, heads: Any, keep: Any, batch: Batches) -> jax.Array:
        return read(backbone, params, heads, batch, merge.merge(ingredients, keep, 1.0))

    # compiled once for all splits
    answer = loaded.programs.setdefault(read.__name__, jax.jit(of_one, out_shardings=whole))
    found: list[np.ndarray] = []
    for i, examples in enumerate(loaded.examples[split]):
        keep = put(np.eye(stack.n_tasks, dtype=np.float32)[[i] * stack.n_layers], whole)
        rows: list[np.ndarray] = []
        order: list[np.ndarray] = []
        numbered = examples._replace(labels=np.arange(len(examples.labels), dtype=np.int32))
        for bucket in batch([numbered], loaded.run.evaluation.batch_size, devices=loaded.mesh.shape["data"]):
            for b in range(bucket.label.shape[0]):
                one = jax.tree.map(lambda x, b=b: np.asarray(x[b]), bucket)
                given = put(one._replace(task=np.full_like(one.task, i)), divided)
                found_here = answer(loaded.params, ingredients, heads, keep, given)
                rows.append(np.asarray(found_here)[one.mask])
                order.append(one.label[one.mask])
        if loaded.kinds[i] == "completion":  # buckets have different numbers of places for targets
            places = examples.inputs["target_ids"].shape[1]
            rows = [np.pad(r, ((0, 0), (0, max(0, places - r.shape[1])), (0, 0)))[:, :places] for r in rows]
        found.append(np.concatenate(rows)[np.argsort(np.concatenate(order))])
    return found


def key(loaded: LoadedRun, split: Split) -> str:
    """Hash of what the answers depend on: code, base, adapters, heads, examples, compute type and backend.

    Contents are hashed, except of the base's weights: those count by file name, size and time.
    """
    digest = hashlib.blake2b(digest_size=20)
    types = [loaded.run.base.dtype, loaded.run.base.quantization]
    parts = [code_digest(), loaded.tasks, *types, jax.default_backend(), jax.__version__]
    digest.update(json.dumps([*parts, checkpoint.base_identity(loaded.base)]).encode())
    for tree in (loaded.stack, loaded.heads):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            _update(digest, jax.tree_util.keystr(path), np.asarray(leaf))
    digest.update(f"normalise {loaded.heads.normalise}".encode())
    for task, examples in zip(loaded.tasks, loaded.examples[split], strict=True):
        for name in sorted(examples.inputs):
            _update(digest, f"{task} {name}", np.asarray(examples.inputs[name]))
    return digest.hexdigest()


def scores(answers: Sequence[Answers], examples: Sequence[Examples]) -> Float[np.ndarray, " task"]:
    """Shares of examples whose label is the expert's first choice; of completions exp(-loss)."""
    return np.asarray([_score(a, e) for a, e in zip(answers, examples, strict=True)], np.float32)


def _score(answers: Answers, examples: Examples) -> np.floating:
    if isinstance(answers, TokenAnswers):
        return np.exp(answers.log_probability.mean())
    return np.mean(answers.argmax(axis=1) == examples.labels)


def values(answers: Sequence[Answers], examples: Sequence[Examples], kind: Fitness) -> list[Float[Array, ""]]:
    """Mean values of a fitness of the experts."""
    found = []
    for own, e in zip(answers, examples, strict=True):
        if isinstance(own, TokenAnswers):
            each = jnp.asarray(own.values[kind.name])
        else:
            rows = jnp.asarray(own)
            each = kind.value(rows, jnp.asarray(e.labels), rows)
        found.append(task_values(each.sum(axis=0)[None], jnp.asarray([float(len(each))]), kind)[0])
    return found


def _update(digest: Any, name: str, array: np.ndarray) -> None:
    digest.update(f"{name} {array.dtype} {array.shape} ".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
