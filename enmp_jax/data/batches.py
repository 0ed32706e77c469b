"""Fixed-shape padded batches on the device, shared by all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from enmp_jax.data.base import Examples
from enmp_jax.data.layout import TARGET_INPUTS, TOKEN_INPUTS, kind_of
from enmp_jax.errors import UserError

LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
"""Sequence lengths that batches of text are padded to."""
TARGETS = 8
"""Places for the targets of a row come in multiples of this, so that few shapes are compiled."""
ROWS = 8
"""Rows of a batch come in multiples of this, where they are fewer than the batch size."""


Order = Literal["given", "stratified"]


class LikeliestTokens(NamedTuple):
    """The likeliest tokens at every target of a completion, in falling order."""

    ids: Int[Array | np.ndarray, "*row target likeliest"]
    log_probability: Float[Array | np.ndarray, "*row target likeliest"]


class Batches(NamedTuple):
    """Batches of one shape and one kind of task, ready for ``lax.scan`` over the first axis.

    Attributes:
        inputs: name -> ``[batches, batch, ...]``; those of generative tasks are in ``data.layout``.
        label: class of each example, or number of the right choice.
        task: index of the task each example belongs to.
        mask: False where a row is padding (a copy of the last example).
        expert: log-probabilities that each example's own unmerged adapter gives to classes or choices, or
            the likeliest tokens that it expects at every target of a completion; where somebody asks.
        states: its pooled hidden states; where somebody asks.
    """

    inputs: dict[str, Array]
    label: Int[Array, "batches batch"]
    task: Int[Array, "batches batch"]
    mask: Bool[Array, "batches batch"]
    expert: Float[Array, "batches batch class"] | LikeliestTokens | None = None
    states: Float[Array, "batches batch layer width"] | None = None


def batch(
    examples_per_task: Sequence[Examples],
    batch_size: int,
    device: Any = None,
    lengths: Sequence[int] = LENGTHS,
    expert: Sequence[Float[np.ndarray, "_ class"] | LikeliestTokens] | None = None,
    order: Order = "given",
    states: Sequence[Float[np.ndarray, "_ layer width"]] | None = None,
    devices: int = 1,
) -> tuple[Batches, ...]:
    """Put the examples of all tasks on the device in batches; every example appears exactly once.

    Images give one ``Batches``. Texts are sorted into buckets by their length in tokens, each bucket one
    ``Batches`` padded to the smallest of ``lengths`` that holds it; a bucket with less than one batch of
    examples joins the next longer one, so that few shapes are compiled. Tasks of different kinds have
    buckets of their own. The batches of a bucket have as few rows as their number allows: 70 examples at a
    batch size of 64 are twice 40 rows, not twice 64.

    Args:
        examples_per_task: one per task, in the order of the tasks.
        batch_size: most rows of a batch.
        device: a device or sharding for ``jax.device_put``; default: JAX's default device.
        lengths: possible lengths of text batches, rising.
        expert: for ``Batches.expert``, one array per task.
        order: of the examples of a bucket: as they come, task by task; or so that its first batches, however
            many, are a random sample of every task in proportion (the same sample in every call).
        states: for ``Batches.states``, one array per task.
        devices: rows are a multiple of this (if ``batch_size`` is), so that they divide over as many devices.

    Raises:
        UserError: no examples, or tasks whose inputs differ in name or shape.
    """
    if not examples_per_task or not sum(len(e.labels) for e in examples_per_task):
        raise UserError("no examples to put into batches")
    made: list[Batches] = []
    for tasks in _by_kind(examples_per_task):
        examples = [examples_per_task[i] for i in tasks]
        label = np.concatenate([e.labels for e in examples]).astype(np.int32)
        task = _tasks(examples, tasks)
        inputs = _join(examples, tasks)
        answers = None if expert is None else _join_answers([expert[i] for i in tasks])
        hidden = None if states is None else np.concatenate([states[i] for i in tasks])
        for rows, length in _buckets(examples, task, batch_size, lengths, order):
            own, expected = jax.tree.map(lambda a, rows=rows: a[rows], (inputs, answers))
            fitted = _fit(own, expected, length)
            targets = None if hidden is None else hidden[rows]
            size = batch_rows(len(rows), batch_size, devices)
            shaped = jax.tree.map(
                lambda a, size=size: _fold(a, size), (*fitted, label[rows], task[rows], targets)
            )
            mask = np.arange(shaped[2].size).reshape(shaped[2].shape) < len(rows)
            fields = shaped[0], *shaped[2:4], mask, shaped[1], shaped[4]
            made.append(Batches(*jax.device_put(fields, device)))
    return tuple(made)


def arrangement(
    examples_per_task: Sequence[Examples],
    batch_size: int,
    lengths: Sequence[int] = LENGTHS,
    order: Order = "given",
) -> Int[np.ndarray, " example"]:
    """Which example is in which row of what ``batch`` makes of the same arguments.

    Returns:
        Numbers of examples, counted through all tasks, in the order of the rows, padding left out.
    """
    first = np.cumsum([0, *(len(e.labels) for e in examples_per_task)])
    found: list[np.ndarray] = []
    for tasks in _by_kind(examples_per_task):
        examples = [examples_per_task[i] for i in tasks]
        number = np.concatenate([np.arange(first[i], first[i + 1]) for i in tasks])
        buckets = _buckets(examples, _tasks(examples, tasks), batch_size, lengths, order)
        found += [number[rows] for rows, _ in buckets]
    return np.concatenate(found)


def batch_rows(examples: int, batch_size: int, devices: int = 1) -> int:
    """Rows of each of the batches that hold so many examples: as few as their number allows.

    Args:
        examples: how many there are.
        batch_size: most rows of a batch.
        devices: over how many they are divided: the rows are a multiple of it if ``batch_size`` is.
    """
    step = devices * -(-ROWS // devices)
    batches = -(-examples // batch_size)
    return min(batch_size, -(-examples // (batches * step)) * step)


def _join(examples: Sequence[Examples], tasks: Sequence[int]) -> dict[str, np.ndarray]:
    """Concatenate the inputs of tasks (given with their numbers); sequences are padded with zeros."""
    names = set(examples[0].inputs)
    text = "attention_mask" in names
    joined = {}
    for i, e in zip(tasks, examples, strict=True):
        if set(e.inputs) != names:
            both = f"{sorted(names)} and {sorted(e.inputs)}"
            raise UserError(f"tasks {tasks[0]} and {i} have different inputs: {both}")
    for name in sorted(names):
        arrays = [e.inputs[name] for e in examples]
        if text:
            arrays = _to_longest(arrays)
        for i, a in zip(tasks, arrays, strict=True):
            if a.shape[1:] != arrays[0].shape[1:]:
                sizes = f"{arrays[0].shape[1:]} and {a.shape[1:]}"
                raise UserError(f"tasks {tasks[0]} and {i} have {name}s of different sizes: {sizes}")
        joined[name] = np.concatenate(arrays)
    return joined


def _by_kind(examples_per_task: Sequence[Examples]) -> list[list[int]]:
    """The tasks of every kind."""
    kinds = [kind_of(e.inputs) for e in examples_per_task]
    return [[i for i, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)]


def _tasks(examples: Sequence[Examples], tasks: Sequence[int]) -> Int[np.ndarray, " example"]:
    """The task of each example."""
    return np.repeat(np.asarray(tasks, np.int32), [len(e.labels) for e in examples])


def _buckets(
    examples: Sequence[Examples],
    task: Int[np.ndarray, " example"],
    batch_size: int,
    lengths: Sequence[int],
    order: Order,
) -> list[tuple[np.ndarray, int | None]]:
    """Rows of each bucket, in the order asked for, and its sequence length (None for images)."""
    found = _by_length(examples, len(task), batch_size, lengths)
    return [(_stratified(rows, task) if order == "stratified" else rows, length) for rows, length in found]


def _by_length(
    examples: Sequence[Examples], n: int, batch_size: int, lengths: Sequence[int]
) -> list[tuple[np.ndarray, int | None]]:
    """Rows of each bucket, in their original order."""
    if "attention_mask" not in examples[0].inputs:
        return [(np.arange(n), None)]
    used = np.concatenate([e.inputs["attention_mask"].sum(axis=1) for e in examples])
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


def _fit(
    inputs: dict[str, np.ndarray], answers: Any, length: int | None
) -> tuple[dict[str, np.ndarray], Any]:
    """Cut off or add padding to give sequences a length, and targets as many places as some row needs."""
    if length is None:
        return inputs, answers
    size: dict[str, int] = dict.fromkeys(TOKEN_INPUTS, length)
    if "target_branch" in inputs:
        most = int((inputs["target_branch"] > 0).sum(axis=1).max())
        size |= dict.fromkeys(TARGET_INPUTS, -(-most // TARGETS) * TARGETS)
    fitted = {name: _to_length(a, size[name]) if name in size else a for name, a in inputs.items()}
    if isinstance(answers, LikeliestTokens):
        answers = jax.tree.map(lambda a: _to_length(a, size["target_ids"]), answers)
    return fitted, answers


def _join_answers(answers: Sequence[Any]) -> Any:
    """Concatenate what the experts of tasks answer; choices that a task does not have are impossible."""
    fill = 0 if isinstance(answers[0], LikeliestTokens) else -np.inf
    return jax.tree.map(lambda *arrays: np.concatenate(_to_longest(arrays, fill)), *answers)


def _to_longest(arrays: Sequence[np.ndarray], fill: float = 0) -> list[np.ndarray]:
    """Pad the second axis to that of the longest."""
    longest = max(a.shape[1] for a in arrays)
    return [_to_length(a, longest, fill) for a in arrays]


def _to_length(array: np.ndarray, length: int, fill: float = 0) -> np.ndarray:
    """Cut off the second axis or pad it."""
    missing = max(0, length - array.shape[1])
    widths = ((0, 0), (0, missing), *[(0, 0)] * (array.ndim - 2))
    return np.pad(array, widths, constant_values=fill)[:, :length]


def _fold(array: np.ndarray, batch_size: int) -> np.ndarray:
    """[n, ...] -> [batches, batch, ...], the last row repeated (zeros would be texts without tokens)."""
    missing = -len(array) % batch_size
    padded = np.pad(array, ((0, missing), *[(0, 0)] * (array.ndim - 1)), mode="edge")
    return padded.reshape(-1, batch_size, *array.shape[1:])
