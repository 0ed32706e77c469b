"""What models write to the prompts of a completion task, and how well it matches the answers."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from enmp_jax.data.base import Examples
from enmp_jax.data.packing import stack
from enmp_jax.deltas import Deltas
from enmp_jax.evaluation.decoding import generate
from enmp_jax.evaluation.text_metrics import METRICS
from enmp_jax.models.base import Backbone, Params


def generated_texts(
    backbone: Backbone,
    params: Params,
    deltas: Deltas | None,
    tokenizer: Any,
    examples: Examples,
    batch_size: int,
) -> tuple[list[list[str]], list[str]]:
    """Greedy continuations of every prompt by every member, and the answers that are wanted.

    Texts end with the tokenizer's end of sequence, or after twice as many tokens as the longest answer has.

    Args:
        backbone: a causal model.
        params: its parameters.
        deltas: of the members, see ``decoding.generate``.
        tokenizer: transformers' tokenizer.
        examples: of one completion task (see ``data.layout``).
        batch_size: rows of a batch.
    """
    inputs = examples.inputs
    lengths = inputs["target_from"][:, 0] + 1
    answers = [ids[real > 0] for ids, real in zip(inputs["target_ids"], inputs["target_branch"], strict=True)]
    prompts = [row[:n].tolist() for row, n in zip(inputs["input_ids"], lengths, strict=True)]
    tokens = stack([{"tokens": prompt} for prompt in prompts])["tokens"]
    end = -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    run = jax.jit(partial(generate, backbone, max_new_tokens=2 * max(map(len, answers)), eos=(end,)))
    parts = []
    for first in range(0, len(tokens), batch_size):
        rows = np.minimum(np.arange(first, first + batch_size), len(tokens) - 1)  # the last one fills up
        made = run(params, deltas, jnp.asarray(tokens[rows]), jnp.asarray(lengths[rows], jnp.int32))
        parts.append(np.asarray(made)[:, : len(tokens) - first])

    def text(ids: np.ndarray) -> str:
        return tokenizer.decode(ids[ids >= 0], skip_special_tokens=True)

    members = np.concatenate(parts, axis=1)
    return [[text(row) for row in member] for member in members], [text(ids) for ids in answers]


def generated_scores(
    backbone: Backbone,
    params: Params,
    deltas: Deltas | None,
    tokenizer: Any,
    examples: Examples,
    batch_size: int,
) -> list[dict[str, float]]:
    """``exact_match``, ``contains`` and ``chrf`` of every member, 0..1; see ``generated_texts``."""
    members, wanted = generated_texts(backbone, params, deltas, tokenizer, examples, batch_size)
    return [{name: metric(texts, wanted) for name, metric in METRICS.items()} for texts in members]
