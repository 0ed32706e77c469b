"""The format of merged deltas in the forward pass: factors, or full matrices where those are cheaper.

Factors cost ``in j + j k + k out`` multiply-adds for every token. A full matrix is formed once per mask and
added to the base weight once per batch, but every member then has its own. On ViT-B/32 with 8 adapters of
rank 16 that pays from about 400 tokens a mask on.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from enmp_jax.deltas import Deltas, Dense, LowRank
from enmp_jax.merges.base import Ingredients, Keep, Merge

ADD_COST = 8
"""What adding an entry of a delta to the base weight costs, in multiply-adds of a matrix product: it
is bound by memory."""
LEAST_MEMBERS = 4
"""So many members must fit on a device with full matrices (or all that there are)."""


def choose(
    merge: Merge,
    ingredients: Ingredients,
    keep_shape: tuple[int, ...],
    *,
    tokens: int,
    batches: int,
    free_bytes: int,
) -> Merge:
    """The merge method with those low-rank deltas as full matrices for which that is cheaper.

    Args:
        merge: a method.
        ingredients: what its ``prepare`` returned, arrays or shapes.
        keep_shape: shape of a mask.
        tokens: tokens that one member sees on a device, of all batches together.
        batches: number of batches.
        free_bytes: memory for the full matrices of one member; if they need more, all deltas stay factored.
    """
    chosen, taken = [], 0
    for name, delta in sorted(delta_shapes(merge, ingredients, keep_shape).items()):
        if isinstance(delta, LowRank) and _full_is_cheaper(delta, tokens, batches):
            chosen.append(name)
            taken += delta.left.shape[0] * math.prod(full_shape(delta)) * 4
    return with_full(merge, chosen) if chosen and taken <= free_bytes else merge


def with_full(merge: Merge, names: list[str]) -> Merge:
    """The method with the deltas of these modules as full matrices."""

    def merged(ingredients: Ingredients, keep: Keep, scale: Any) -> Deltas:
        deltas = merge.merge(ingredients, keep, scale)
        return {
            name: Dense(delta.materialise()) if name in names else delta for name, delta in deltas.items()
        }

    return Merge(merge.prepare, merged)


def full_shape(delta: LowRank) -> tuple[int, int]:
    """(out, in) of a delta."""
    inner = delta.core if delta.right is None else delta.right
    return delta.left.shape[-2], inner.shape[-1]


def delta_shapes(merge: Merge, ingredients: Ingredients, keep_shape: tuple[int, ...]) -> Deltas:
    """The deltas that a method makes, as shapes; nothing is computed."""
    keep, scale = jax.ShapeDtypeStruct(keep_shape, jnp.bool_), jax.ShapeDtypeStruct((), jnp.float32)
    return jax.eval_shape(merge.merge, ingredients, keep, scale)


def _full_is_cheaper(delta: LowRank, tokens: int, batches: int) -> bool:
    out, inner = full_shape(delta)
    k, j = delta.core.shape[-2:]
    per_token = k * j + out * k + (0 if delta.right is None else j * inner)
    forming = out * k * inner + (0 if delta.right is None else k * j * inner)
    return forming + ADD_COST * batches * out * inner < tokens * per_token
