"""Prompts with their answers as rows of tokens, so that a prompt is computed once for all its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Shaped

Row = dict[str, list[int]]


def pack(prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> Row:
    """One row of ``data.layout``: the prompt, then its answers one after the other.

    Args:
        prompt: at least one token.
        answers: at least one token each.

    Returns:
        All of its inputs but ``choice_length``.
    """
    n = len(prompt)
    row: Row = {"input_ids": list(prompt), "position": list(range(n)), "branch": [0] * n}
    row |= {"target_ids": [], "target_from": [], "target_branch": []}
    for branch, answer in enumerate(answers, 1):
        start, inner = len(row["input_ids"]), len(answer) - 1
        row["target_from"] += [n - 1, *range(start, start + inner)]
        row["target_ids"] += answer
        row["target_branch"] += [branch] * len(answer)
        row["input_ids"] += answer[:-1]
        row["position"] += range(n, n + inner)
        row["branch"] += [branch] * inner
    return row | {"attention_mask": [1] * len(row["input_ids"])}


def stack(rows: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, Shaped[np.ndarray, "row _"]]:
    """Rows as arrays, int32 or, of fractions, float32; padded with zeros on the right to the longest."""
    arrays = {}
    for name in rows[0]:
        lists = [row[name] for row in rows]
        kind = np.float32 if isinstance(lists[0][0], float) else np.int32
        arrays[name] = np.zeros((len(rows), max(map(len, lists))), kind)
        for array, values in zip(arrays[name], lists, strict=True):
            array[: len(values)] = values
    return arrays
