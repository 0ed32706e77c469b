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


class Scored(NamedTuple):
    """What an evaluation says of masks."""

    fitness: Float[Array, " member"]
    final: Bool[Array, " member"]
    """False where the fitness is an estimate, which is not remembered."""
    details: Any = ()
    """A pytree of what else is known of them, [member, ...]."""


class New(NamedTuple):
    """Which members of a generation an evaluation is asked for."""

    wanted: Bool[Array, " member"]
    """Not remembered."""
    first: Int[Array, " member"]
    """The earliest member with the same mask: only that one need be run."""


Evaluate = Callable[..., Scored]
"""``evaluate(new, keep [member, ...], scale [member], *operands) -> Scored``; rows not wanted are ignored."""


class DeviceMemo(NamedTuple):
    """Masks scored so far, part of the search's carry. The first ``used`` rows are meant.

    ``fitness`` keeps what was measured, NaN included.
    """

    key: UInt32[Array, "row word"]
    fitness: Float[Array, " row"]
    used: Int[Array, ""]


class Remembered(NamedTuple):
    """What is known of a generation, and which members were really run for it."""

    fitness: Float[Array, " member"]
    final: Bool[Array, " member"]
    evaluated: Bool[Array, " member"]
    details: Any
    """As evaluated; of no meaning where a mask was remembered."""


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


def remembering(evaluate: Evaluate) -> Callable[..., tuple[Remembered, DeviceMemo]]:
    """``(memo, keep, scale, *operands) -> (Remembered, memo)``: evaluates only masks not seen before.

    Args:
        evaluate: a mask's final fitness must not depend on its companions.
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
        first = _equal(key, key).argmax(1)
        scored = evaluate(New(~known, first), keep, scale, *operands)
        fitness, final = jnp.where(known, memo.fitness[row], scored.fitness), known | scored.final
        run = ~known & (first == jnp.arange(size))
        learnt = run & final
        # rows of members that are no news lie beyond the end, where a scatter drops them
        place = jnp.where(learnt, memo.used + jnp.cumsum(learnt) - 1, capacity)
        memo = DeviceMemo(
            memo.key.at[place].set(key, mode="drop"),
            memo.fitness.at[place].set(fitness, mode="drop"),
            memo.used + learnt.sum().astype(memo.used.dtype),
        )
        return Remembered(fitness, final, run, scored.details), memo

    return remembered


def once(score: Callable[..., Scored], chunk: int) -> Evaluate:
    """An evaluation that runs every new mask once, ``chunk`` at a time.

    Args:
        score: ``score(keep [chunk, ...], scale [chunk], *operands)``.
        chunk: members of one call of ``score``; a multiple of the mesh axis ``population`` wastes none.
    """
    traced_once = jax.jit(score)  # though its output shapes are asked for below

    def evaluate(new: New, keep: Array, scale: Array, *operands: Any) -> Scored:
        def call(members: Array) -> Scored:
            return traced_once(keep[members], scale[members], *operands)

        run = new.wanted & (new.first == jnp.arange(len(keep)))
        # members taken from an array of the search: of the same mesh, or the score were traced again
        shapes = jax.eval_shape(lambda: call(new.first[jnp.zeros(chunk, jnp.int32)]))
        empty = jax.tree.map(lambda x: jnp.zeros((len(keep), *x.shape[1:]), x.dtype), shapes)
        found = in_chunks(lambda rows, scored: _put(scored, rows, call(rows.members)), run, chunk, empty)
        return jax.tree.map(lambda x: x[new.first], found)

    return evaluate


class Rows(NamedTuple):
    """A chunk of members: who they are, and where what is found for them goes (filler goes nowhere)."""

    members: Int[Array, " chunk"]
    place: Int[Array, " chunk"]


def in_chunks(
    step: Callable[[Rows, Any], Any], wanted: Bool[Array, " member"], chunk: int, carry: Any
) -> Any:
    """``carry = step(rows, carry)`` over the wanted members, ``chunk`` at a time until none is left.

    The last chunk is filled up with other members.
    """
    size = wanted.shape[0]
    order = jnp.argsort(~wanted, stable=True)
    order = jnp.concatenate([order, jnp.repeat(order[-1:], -size % chunk)])
    count = wanted.sum()

    def body(carried: tuple[Array, Any]) -> tuple[Array, Any]:
        done, carry = carried
        members = jax.lax.dynamic_slice_in_dim(order, done, chunk)
        place = jnp.where(done + jnp.arange(chunk) < count, members, size)
        return done + chunk, step(Rows(members, place), carry)

    return jax.lax.while_loop(lambda carried: carried[0] < count, body, (jnp.zeros_like(count), carry))[1]


def _put(tree: Any, rows: Rows, values: Any) -> Any:
    return jax.tree.map(lambda x, new: x.at[rows.place].set(new, mode="drop"), tree, values)


def _equal(a: UInt32[Array, "row word"], b: UInt32[Array, "column word"]) -> Bool[Array, "row column"]:
    return (a[:, None] == b[None]).all(-1)
