"""Methods that treat entries of the task matrices one by one: TIES, DARE, Model Breadcrumbs.

Each is a choice of what survives of a task's matrix (a random drop, then a band of magnitudes)
and of how the survivors are combined. In full space nothing of these choices depends on the
mask, so the bands are found once; the matrices ``B_i A_i`` are formed on the fly, a block of
rows at a time, and no [task, out, in] array is ever kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from enmp_jax.deltas import Dense
from enmp_jax.merges.base import LayerInputs, LayerMethod

Tasks = Float[Array, "task row column"]
_BLOCK = 2**20  # entries formed at a time


class Band(NamedTuple):
    """Which magnitudes survive: ``low < |x| <= high``."""

    low: Float[Array, "*task"]
    high: Float[Array, "*task"]


class Combine(NamedTuple):
    """How tasks are combined. ``vote`` is summed over all blocks before ``combine`` sees it."""

    vote: Callable[[Tasks, Float[Array, " task"]], Float[Array, ""]]
    combine: Callable[[Tasks, Float[Array, " task"], Float[Array, ""]], Float[Array, "row column"]]


class Entrywise(NamedTuple):
    """An entrywise method.

    ``drop(x, key, first_row)`` rescales and zeroes entries at random; ``band(magnitudes, size)``
    finds what survives of one task's matrix with ``size`` entries.
    """

    combine: Combine
    band: Callable[[Float[Array, "row column"], Int[Array, ""] | int], Band] | None = None
    drop: Callable[[Tasks, Key[Array, " task"], Int[Array, ""] | int], Tasks] | None = None


class _Full(NamedTuple):
    a: Float[Array, "task rank in"]
    b: Float[Array, "block task row rank"]
    key: Key[Array, " task"]
    band: Band | None


def survivors(x: Tasks, band: Band | None) -> Tasks:
    """The entries within each task's band; zero elsewhere."""
    if band is None:
        return x
    magnitude = jnp.abs(x)
    low, high = band.low[:, None, None], band.high[:, None, None]
    return jnp.where((magnitude > low) & (magnitude <= high), x, 0)


def in_full_space(method: Entrywise) -> LayerMethod:
    """The method on the entries of the deltas themselves."""

    def entries(a: Array, b: Array, key: Array, first_row: Int[Array, ""] | int) -> Tasks:
        x = jnp.matmul(b, a)
        return x if method.drop is None else method.drop(x, key, first_row)

    def prepare(inputs: LayerInputs) -> _Full:
        tasks, out, rank = inputs.b.shape
        inner = inputs.a.shape[-1]
        band = None
        if method.band is not None:
            find = method.band

            def band_of(task: tuple[Array, Array, Array]) -> Band:
                a, b, key = task
                x = entries(a[None], b[None], key[None], 0)[0]
                return find(jnp.abs(x), out * inner)

            band = jax.lax.map(band_of, (inputs.a, inputs.b, inputs.key))
        blocks = -(-tasks * out * inner // _BLOCK)
        rows = -(-out // blocks)
        b = jnp.pad(inputs.b, ((0, 0), (0, blocks * rows - out), (0, 0)))
        b = jnp.moveaxis(b.reshape(tasks, blocks, rows, rank), 1, 0)
        return _Full(inputs.a, b[:, :, :, :], inputs.key, band)

    def merge(x: _Full, weights: Float[Array, " task"]) -> Dense:
        blocks, _, rows, _ = x.b.shape
        first_rows = jnp.arange(blocks) * rows

        def block(b: Array, first_row: Array) -> Tasks:
            return survivors(entries(x.a, b, x.key, first_row), x.band)

        def vote(carry: Array, xs: tuple[Array, Array]) -> tuple[Array, None]:
            return carry + method.combine.vote(block(*xs), weights), None

        majority, _ = jax.lax.scan(vote, jnp.zeros((), weights.dtype), (x.b, first_rows))
        merged = jax.lax.map(
            lambda xs: method.combine.combine(block(*xs), weights, majority), (x.b, first_rows)
        )
        return Dense(merged.reshape(blocks * rows, -1))

    return LayerMethod(prepare, merge, sequential=True)
