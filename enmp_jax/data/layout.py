"""What a batch of a generative task holds: prompts, and answers whose tokens are scored.

One row is one example: a prompt followed by its answer (``completion``), or by all its choices one after
the other (``choice``), packed into one sequence so that the prompt is computed once:

    tokens    p0 p1 p2 | a0 a1 | b0          choices "a0 a1 a2" and "b0 b1": the last token of each
    position   0  1  2 |  3  4 |  3          predicts nothing, so it is a target but no input
    branch     0  0  0 |  1  1 |  2

    target_ids      a0 a1 a2 | b0 b1
    target_from      2  3  4 |  2  5         which token's hidden state predicts it
    target_branch    1  1  1 |  2  2         whose token it is; 0: padding

A token sees the tokens that are not after it and whose branch is 0 or its own. The names of the inputs of
``Batches`` and ``Examples``, all ``[row, ...]`` and zero where they are padding (padding is on the right):

    input_ids       int32 [row, token]
    attention_mask  int32 [row, token]       1: a token, 0: padding
    target_ids      int32 [row, target]      the tokens whose log-probabilities are the task's score
    target_from     int32 [row, target]
    target_branch   int32 [row, target]

and those of a choice task, whose branches a completion does not have (an ordinary causal sequence):

    position        int32 [row, token]       rotary or learned position, counted within prompt + own choice
    branch          int32 [row, token]       0: prompt, c + 1: choice c
    choice_length   float32 [row, choice]    what the log-likelihood of a choice is divided by: 1, its tokens
                                             or its characters; 0: the example has no such choice

``Batches.label`` is the right choice (-1: nobody knows; 0 in a completion task).

The answer of a completion ends with the end-of-sequence token, which is scored too: a model that does not
know where to stop has not learnt the task. Choices have none, as in lm-eval.

Batches of different kinds are different buckets, so that ``kind_of`` is known when a function is traced.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

Kind = Literal["classification", "choice", "completion"]

TOKEN_INPUTS: tuple[str, ...] = ("input_ids", "attention_mask", "token_type_ids", "position", "branch")
"""Inputs with an axis of tokens, padded to a common length."""
TARGET_INPUTS: tuple[str, ...] = ("target_ids", "target_from", "target_branch")
"""Inputs with an axis of targets."""


def kind_of(inputs: Collection[str]) -> Kind:
    """The kind of task whose inputs have these names."""
    if "target_ids" not in inputs:
        return "classification"
    return "choice" if "choice_length" in inputs else "completion"
