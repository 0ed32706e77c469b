"""A memo of scored masks inside the compiled search: no mask is paid for twice.

Looking a mask up compares its bits with all scored so far, exactly: a few million word comparisons,
nothing next to a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

Score = Callable[..., Float[Array, " member"]]
"""``score(keep [member, ...], scale [member], *operands) -> fitness [member]``."""


class DeviceMemo(NamedTuple):
    """Masks scored so far, part of the search's carry. The first ``used`` rows are meant.

    ``fitness`` keeps what was measured, NaN included.
    """

    key: UInt32[Array, "row word"]
    fitness: Float[Array, " row"]
    used: Int[Array, ""]


class Remembered(NamedTuple):
    """Fitness of a generation, and which members were really evaluated for it."""

    fitness: Float[Array, " member"]
    evaluated: Bool[Array, " member"]


def keys(keep: Shaped[Array, "member ..."], scale: Float[Array, " member"]) -> UInt32[Array, "member word"]:
    """The bits of a mask and those of its scale, as words: equal if and only if both are."""
    bits = (keep != 0).reshape(keep.shape[0], -1)
    bits = jnp.pad(bits, ((0, 0), (0, -bits.shape[1] % 32))).reshape(bits.shape[0], -1, 32)
    words = jnp.sum(bits.astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32), -1, dtype=jnp.uint32)
    number = jax.lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.uint32)
    return jnp.concatenate([words, number[:, None]], axis=1)


def start(
    capacity: int,
    shape: tuple[int, ...],
    keep: Bool[np.ndarray, "mask ..."] | None = None,
    scale: Float[np.ndarray, " mask"] | None = None,
    fitness: Float[np.ndarray, " mask"] | None = None,
) -> DeviceMemo:
    """A memo for ``capacity`` masks of a shape, with those scored already; repeats count once."""
    words = -(-int(np.prod(shape)) // 32) + 1
    key, value = np.zeros((capacity, words), np.uint32), np.zeros(capacity, np.float32)
    used = 0
    if keep is not None and len(keep):
        known = np.asarray(keys(jnp.asarray(keep), jnp.asarray(scale)))
        _, first = np.unique(known, axis=0, return_index=True)
        first = np.sort(first)
        used = len(first)
        key[:used], value[:used] = known[first], np.asarray(fitness)[first]
    return DeviceMemo(jnp.asarray(key), jnp.asarray(value), jnp.asarray(used, jnp.int32))


def remembering(score: Score, chunk: int) -> Callable[..., tuple[Remembered, DeviceMemo]]:
    """``(memo, keep, scale, *operands) -> (Remembered, memo)``: evaluates only masks not seen before.

    Unknown members come first, and a loop evaluates them ``chunk`` at a time until none is left; the last
    chunk is filled up with known members, whose second result is dropped.

    Args:
        score: evaluates ``chunk`` masks; a mask's fitness must not depend on its companions.
        chunk: members of one call of ``score``; a multiple of the mesh axis ``population`` wastes none.
    """

    def remembered(
        memo: DeviceMemo,
        keep: Shaped[Array | np.ndarray, "member ..."],
        scale: Float[Array | np.ndarray, " member"],
        *operands: Any,
    ) -> tuple[Remembered, DeviceMemo]:
        keep, scale = jnp.asarray(keep), jnp.asarray(scale)
        size, capacity = keep.shape[0], memo.key.shape[0]
        key = keys(keep, scale)
        same = _equal(key, memo.key) & (jnp.arange(capacity) < memo.used)
        known, row = same.any(1), same.argmax(1)
        first = _equal(key, key).argmax(1)  # the earliest member with this mask
        unknown = ~known & (first == jnp.arange(size))
        count = unknown.sum()
        order = jnp.argsort(~unknown, stable=True)
        order = jnp.concatenate([order, jnp.repeat(order[-1:], -size % chunk)])

        def body(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            done, found = carry
            members = jax.lax.dynamic_slice_in_dim(order, done, chunk)
            values = score(keep[members], scale[members], *operands)
            return done + chunk, jax.lax.dynamic_update_slice_in_dim(found, values, done, 0)

        empty = jnp.zeros(order.shape, jnp.float32)
        _, found = jax.lax.while_loop(lambda carry: carry[0] < count, body, (jnp.zeros_like(count), empty))
        own = jnp.zeros(size, jnp.float32).at[order[:size]].set(found[:size])
        fitness = jnp.where(known, memo.fitness[row], own[first])
        # rows of members that are no news lie beyond the end, where a scatter drops them
        place = jnp.where(unknown, memo.used + jnp.cumsum(unknown) - 1, capacity)
        memo = DeviceMemo(
            memo.key.at[place].set(key, mode="drop"),
            memo.fitness.at[place].set(fitness, mode="drop"),
            memo.used + count.astype(memo.used.dtype),
        )
        return Remembered(fitness, unknown), memo

    return remembered


def _equal(a: UInt32[Array, "row word"], b: UInt32[Array, "column word"]) -> Bool[Array, "row column"]:
    return (a[:, None] == b[None]).all(-1)
