"""Fixed-shape padded batches on the device, shared by all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from enmp_jax.data.base import Examples
from enmp_jax.errors import UserError

LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
"""Sequence lengths that batches of text are padded to."""


class Batches(NamedTuple):
    """Batches of one shape, ready for ``lax.scan`` over the first axis.

    Attributes:
        inputs: name -> ``[batches, batch, ...]``.
        label: class of each example.
        task: index of the task each example belongs to.
        mask: False where a row is padding (a copy of the last example).
        expert: log-probabilities that each example's own unmerged adapter gives, where somebody asks.
    """

    inputs: dict[str, Array]
    label: Int[Array, "batches batch"]
    task: Int[Array, "batches batch"]
    mask: Bool[Array, "batches batch"]
    expert: Float[Array, "batches batch class"] | None = None


def batch(
    examples_per_task: Sequence[Examples],
    batch_size: int,
    device: Any = None,
    lengths: Sequence[int] = LENGTHS,
    expert: Sequence[Float[np.ndarray, "_ class"]] | None = None,
    order: Literal["given", "stratified"] = "given",
) -> tuple[Batches, ...]:
    """Put the examples of all tasks on the device in batches; every example appears exactly once.

    Images give one ``Batches``. Texts are sorted into buckets by their length in tokens, each bucket one
    ``Batches`` padded to the smallest of ``lengths`` that holds it; a bucket with less than one batch of
    examples joins the next longer one, so that few shapes are compiled.

    Args:
        examples_per_task: one per task, in the order of the tasks.
        batch_size: rows of a batch.
        device: a device or sharding for ``jax.device_put``; default: JAX's default device.
        lengths: possible lengths of text batches, rising.
        expert: for ``Batches.expert``, one array per task.
        order: of the examples of a bucket: as they come, task by task; or so that its first batches, however
            many, are a random sample of every task in proportion (the same sample in every call).

    Raises:
        UserError: no examples, or tasks whose inputs differ in name or shape.
    """
    if not examples_per_task or not sum(len(e.labels) for e in examples_per_task):
        raise UserError("no examples to put into batches")
    label = np.concatenate([e.labels for e in examples_per_task]).astype(np.int32)
    task = np.repeat(
        np.arange(len(examples_per_task), dtype=np.int32), [len(e.labels) for e in examples_per_task]
    )
    inputs = _join(examples_per_task)
    made = []
    for rows, length in _buckets(inputs, batch_size, lengths):
        if order == "stratified":
            rows = _stratified(rows, task)
        chosen = {name: _to_length(value[rows], length) for name, value in inputs.items()}
        shaped = jax.tree.map(lambda a: _fold(a, batch_size), (chosen, label[rows], task[rows]))
        mask = np.arange(shaped[1].size).reshape(shaped[1].shape) < len(rows)
        answers = None if expert is None else _fold(np.concatenate(expert)[rows], batch_size)
        made.append(Batches(*jax.device_put((*shaped, mask, answers), device)))
    return tuple(made)


def _join(examples: Sequence[Examples]) -> dict[str, np.ndarray]:
    """Concatenate the tasks' inputs; sequences are padded with zeros to the longest."""
    names = set(examples[0].inputs)
    text = "attention_mask" in names
    joined = {}
    for i, e in enumerate(examples):
        if set(e.inputs) != names:
            raise UserError(f"tasks 0 and {i} have different inputs: {sorted(names)} and {sorted(e.inputs)}")
    for name in sorted(names):
        arrays = [e.inputs[name] for e in examples]
        if text:
            longest = max(a.shape[1] for a in arrays)
            arrays = [np.pad(a, ((0, 0), (0, longest - a.shape[1]))) for a in arrays]
        for i, a in enumerate(arrays):
            if a.shape[1:] != arrays[0].shape[1:]:
                sizes = f"{arrays[0].shape[1:]} and {a.shape[1:]}"
                raise UserError(f"tasks 0 and {i} have {name}s of different sizes: {sizes}")
        joined[name] = np.concatenate(arrays)
    return joined


def _buckets(
    inputs: dict[str, np.ndarray], batch_size: int, lengths: Sequence[int]
) -> list[tuple[np.ndarray, int | None]]:
    """Rows of each bucket, in their original order, and its sequence length (None for images)."""
    if "attention_mask" not in inputs:
        return [(np.arange(len(next(iter(inputs.values())))), None)]
    used = inputs["attention_mask"].sum(axis=1)
    limits = [length for length in lengths if length < used.max()]
    limits.append(next((length for length in lengths if length >= used.max()), int(used.max())))
    place = np.searchsorted(limits, used)
    buckets: list[tuple[np.ndarray, int | None]] = []
    waiting = np.zeros(0, np.int64)
    for i, length in enumerate(limits):
        waiting = np.sort(np.concatenate([waiting, np.flatnonzero(place == i)]))
        last = i == len(limits) - 1
        if len(waiting) and (last or len(waiting) >= batch_size):
            buckets.append((waiting, length))
            waiting = waiting[:0]
    return buckets


def _stratified(rows: np.ndarray, task: np.ndarray) -> np.ndarray:
    """Rows in an order whose every beginning has the same share of each task, drawn at random within it."""
    random, place = np.random.default_rng(0), np.zeros(len(rows))
    for i in np.unique(task[rows]):
        own = task[rows] == i
        place[own] = (random.permutation(own.sum()) + 0.5) / own.sum()
    return rows[np.argsort(place, kind="stable")]


def _to_length(array: np.ndarray, length: int | None) -> np.ndarray:
    """Cut off or add padding tokens (masked zeros) to give sequences a length."""
    if length is None:
        return array
    return np.pad(array, ((0, 0), (0, max(0, length - array.shape[1]))))[:, :length]


def _fold(array: np.ndarray, batch_size: int) -> np.ndarray:
    """[n, ...] -> [batches, batch, ...], the last row repeated (zeros would be texts without tokens)."""
    missing = -len(array) % batch_size
    padded = np.pad(array, ((0, missing), *[(0, 0)] * (array.ndim - 1)), mode="edge")
    return padded.reshape(-1, batch_size, *array.shape[1:])
