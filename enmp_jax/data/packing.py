"""Prompts with their answers as rows of tokens, so that a prompt is computed once for all its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

Row = dict[str, list[int]]


def pack(prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> Row:
    """One row: the prompt, then its answers one after the other.

    Tokens of answer c are branch c + 1 and see the prompt (branch 0) and their own answer alone. The last
    token of an answer predicts nothing: it is a target, but no input.

    Args:
        prompt: at least one token.
        answers: at least one token each.

    Returns:
        ``input_ids``, ``attention_mask``, ``position`` and ``branch`` of every token; ``target_ids``,
        ``target_from`` (the index of the token before) and ``target_branch`` of every answer's tokens.
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


def stack(rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Int[np.ndarray, "row _"]]:
    """Rows as arrays, padded with zeros on the right to the longest."""
    arrays = {}
    for name in rows[0]:
        lists = [row[name] for row in rows]
        arrays[name] = np.zeros((len(rows), max(map(len, lists))), np.int32)
        for array, values in zip(arrays[name], lists, strict=True):
            array[: len(values)] = values
    return arrays
