"""Batches of completions that are about as long, so that little of what is computed is padding.

Every step draws one part of the examples, sorted by their length, the same part for all tasks: all shapes are
static, and what a task sees does not depend on the tasks beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from enmp_jax.data import Examples
from enmp_jax.data.layout import TARGET_INPUTS, TOKEN_INPUTS

PARTS = 8
"""Parts of a task's examples."""
MULTIPLE = 8
"""Lengths are rounded up to this, so that parts of about the same length share a compiled step."""

Lengths = tuple[int, int]
"""Tokens and targets of a row, padding included."""


class LengthBuckets(NamedTuple):
    """Where the parts lie, and how long their rows are.

    Attributes:
        first: row at which a part of a task begins, its examples sorted by length.
        stop: the row behind its last; a part has at least one row.
        shape: which of ``lengths`` the rows of a part have.
        lengths: the lengths that occur.
    """

    first: Int[np.ndarray, "part task"]
    stop: Int[np.ndarray, "part task"]
    shape: Int[np.ndarray, " part"]
    lengths: tuple[Lengths, ...]


def sort_by_length(examples: Sequence[Examples]) -> tuple[list[Examples], LengthBuckets]:
    """The examples of every task in order of their tokens, and the parts to draw from."""
    orders = [np.argsort(_tokens(e), kind="stable") for e in examples]
    ordered = [
        e._replace(
            inputs={name: np.asarray(a)[order] for name, a in e.inputs.items()},
            labels=np.asarray(e.labels)[order],
            keys=np.asarray(e.keys)[order],
        )
        for e, order in zip(examples, orders, strict=True)
    ]
    sizes = np.asarray([len(e.labels) for e in examples])
    edges = sizes * np.arange(PARTS + 1)[:, None] // PARTS
    first = np.minimum(edges[:-1], sizes - 1)
    stop = np.maximum(edges[1:], first + 1)
    of_part = [_lengths(ordered, first[part], stop[part]) for part in range(PARTS)]
    lengths = tuple(dict.fromkeys(of_part))
    return ordered, LengthBuckets(first, stop, np.asarray([lengths.index(x) for x in of_part]), lengths)


def cut(inputs: dict[str, Any], lengths: Lengths) -> dict[str, Any]:
    """Rows ``[row, ...]`` of a part without the padding that none of its rows needs."""
    size = dict.fromkeys(TOKEN_INPUTS, lengths[0]) | dict.fromkeys(TARGET_INPUTS, lengths[1])
    return {name: a[:, : size[name]] if name in size else a for name, a in inputs.items()}


def _lengths(ordered: Sequence[Examples], first: np.ndarray, stop: np.ndarray) -> Lengths:
    rows = [(e, slice(a, b)) for e, a, b in zip(ordered, first, stop, strict=True)]
    tokens = max(_tokens(e)[own].max() for e, own in rows)
    targets = max(_targets(e)[own].max() for e, own in rows)
    return -(-int(tokens) // MULTIPLE) * MULTIPLE, -(-int(targets) // MULTIPLE) * MULTIPLE


def _tokens(examples: Examples) -> np.ndarray:
    return np.asarray(examples.inputs["attention_mask"]).sum(axis=1)


def _targets(examples: Examples) -> np.ndarray:
    return (np.asarray(examples.inputs["target_branch"]) > 0).sum(axis=1)
