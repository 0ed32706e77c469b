"""Split hygiene: what one split has seen, no later split may hold.

The search fits the mask to the search split, the selection split decides between finalists, the test
split is reported. An example in two of them makes the reported number a lie, so it is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from enmp_jax.data.base import Examples
from enmp_jax.errors import UserError

ORDER = ("test", "selection", "search", "train")
"""Splits by how much they must be kept clean: repeated examples are dropped from the later ones."""


class Leak(NamedTuple):
    """Examples of a split that another split, which must be kept clean, holds too.

    Attributes:
        clean: (task, split) that must not have been seen.
        seen: (task, split) that has seen it.
        rows: rows of ``seen`` with the content of examples in ``clean``.
        spans: rows of the source that both split expressions name, such as ``train[0:100]``.
    """

    clean: tuple[str, str]
    seen: tuple[str, str]
    rows: np.ndarray
    spans: tuple[str, ...]


def leaks(tasks: Mapping[str, Mapping[str, Examples]]) -> list[Leak]:
    """All pairs of splits, of one task or of two, that share examples.

    Content is compared before transforms (``Examples.keys``), so an image of one task's search split
    that another task tests, turned or mirrored, is found; spans are compared within one source. The
    same split of two tasks may share examples: transforms and label maps make tasks out of one data set.

    Args:
        tasks: task -> split (``train``, ``search``, ``selection``, ``test``) -> its examples.
    """
    contents = {(t, s): frozenset(e.keys.tolist()) for t, splits in tasks.items() for s, e in splits.items()}
    found = []
    for i, clean in enumerate(ORDER):
        for seen in ORDER[i + 1 :]:
            for task, splits in tasks.items():
                for other, others in tasks.items():
                    if clean not in splits or seen not in others:
                        continue
                    a, b = splits[clean], others[seen]
                    rows = np.zeros(0, np.int64)
                    if not contents[task, clean].isdisjoint(contents[other, seen]):
                        rows = np.flatnonzero(np.isin(b.keys, a.keys))
                    spans = _common_spans(a, b)
                    if len(rows) or spans:
                        found.append(Leak((task, clean), (other, seen), rows, spans))
    return found


def check_splits(
    tasks: Mapping[str, Mapping[str, Examples]], drop: Collection[str] = ()
) -> dict[str, dict[str, Examples]]:
    """Refuse splits that share examples.

    Split expressions that name the same rows are always refused. Data sets may also hold the same
    content in several rows; the tasks in ``drop`` (``duplicates: drop`` in the run file) lose such
    examples from the split that may have them least: train, then search, then selection, never test.

    Args:
        tasks: task -> split -> its examples.
        drop: tasks whose repeated examples are left out instead of refused.

    Returns:
        The same splits, without repeated examples and with a note where some were left out.

    Raises:
        UserError: the first leak, or a split with nothing left.
    """
    found = leaks(tasks)
    bad: dict[tuple[str, str], list[np.ndarray]] = {}
    # the plainest cause first: the same rows named twice
    for leak in sorted(found, key=lambda leak: not leak.spans):
        if leak.spans or leak.seen[0] not in drop:
            raise UserError(_describe(leak, tasks))
        bad.setdefault(leak.seen, []).append(leak.rows)
    checked = {task: dict(splits) for task, splits in tasks.items()}
    for (task, split), rows in bad.items():
        examples = checked[task][split]
        keep = np.ones(len(examples.labels), bool)
        keep[np.concatenate(rows)] = False
        if not keep.any():
            raise UserError(
                f"tasks.{task}.data.{split}: every example recurs in a split that must be kept clean"
            )
        note = f"{int((~keep).sum())} examples of {split} recur in another split and were left out"
        checked[task][split] = examples.take(keep)._replace(notes=(*examples.notes, note))
    return checked


def redraw(
    tasks: Mapping[str, Mapping[str, Examples]], seed: int, limits: Mapping[str, int | None]
) -> dict[str, dict[str, Examples]]:
    """Draw the search and selection splits anew from what both hold, for intervals over splits.

    Where an example goes follows from the seed and its content alone: tasks that share images, and rows that
    repeat, cannot tear the two splits open. So their sizes are kept on average, not exactly. A smaller limit
    takes a part of what a larger one takes. All other splits stay as they are.

    Args:
        tasks: task -> split -> its examples, checked (``check_splits``); ``search`` and ``selection`` whole.
        seed: another draw for every number.
        limits: split -> most examples of a task; default: all.

    Raises:
        UserError: a split of a task with nothing in it.
    """
    total = {split: sum(len(s[split].labels) for s in tasks.values()) for split in ("search", "selection")}
    share = total["search"] / sum(total.values())
    drawn = {}
    for task, splits in tasks.items():
        pool = _joined(splits["search"], splits["selection"])
        place = np.asarray([_place(key, seed) for key in pool.keys])
        order = np.argsort(place, kind="stable")
        found = dict(splits)
        for split, chosen in (
            ("search", order[place[order] < share]), ("selection", order[place[order] >= share])
        ):  # fmt: skip
            if not len(chosen):
                raise UserError(
                    f"tasks.{task}.data.{split}: evaluation.seed {seed} draws no example for it: give the "
                    "task more data, or take another seed"
                )
            found[split] = pool.take(np.sort(chosen[: limits.get(split)]))
        drawn[task] = found
    return drawn


def _place(key: bytes, seed: int) -> float:
    """A number in 0..1 that a seed gives to an example's content."""
    digest = hashlib.blake2b(bytes(key), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "big") / 2**64


def _joined(a: Examples, b: Examples) -> Examples:
    """The examples of both; texts padded on the right to the longer one (their attention mask is 0 there)."""

    def join(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if x.ndim == 2 and x.shape[1] != y.shape[1]:
            longest = max(x.shape[1], y.shape[1])
            x, y = (np.pad(z, ((0, 0), (0, longest - z.shape[1]))) for z in (x, y))
        return np.concatenate([x, y])

    inputs = {name: join(value, b.inputs[name]) for name, value in a.inputs.items()}
    keys, labels = np.concatenate([a.keys, b.keys]), np.concatenate([a.labels, b.labels])
    return a._replace(inputs=inputs, labels=labels, keys=keys, spans=(*a.spans, *b.spans))


def _common_spans(a: Examples, b: Examples) -> tuple[str, ...]:
    if not a.source or a.source != b.source:
        return ()
    return tuple(
        f"{x.split}[{max(x.start, y.start)}:{min(x.stop, y.stop)}]"
        for x in a.spans
        for y in b.spans
        if x.split == y.split and max(x.start, y.start) < min(x.stop, y.stop)
    )


def _describe(leak: Leak, tasks: Mapping[str, Mapping[str, Examples]]) -> str:
    (task, clean), (other, seen) = leak.clean, leak.seen
    pair = (
        f"{clean} and {seen} of {task!r}" if task == other else f"{clean} of {task!r} and {seen} of {other!r}"
    )
    if leak.spans:
        return f"{pair} both hold {_some(leak.spans)}: give them rows of their own"
    total = len(tasks[other][seen].labels)
    count = f"{len(leak.rows)} of the {total} in {seen}, the first at row {leak.rows[0]}"
    return (
        f"{pair} share examples ({count}): split the data so that none recurs, or set duplicates: drop in "
        f"the data of {other!r} to leave them out"
    )


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (" ..." if len(items) > 3 else "")
