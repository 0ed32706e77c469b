"""Magnitude thresholds: the k-th largest of many entries, without sorting."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def threshold_of_largest(
    magnitudes: Float[Array, "row column"], count: Int[Array, ""] | int
) -> Float[Array, ""]:
    """A value that the ``count`` largest magnitudes, and those equal to them, exceed; nothing else does.

    It lies midway between the ``count``-th largest and the next smaller magnitude, so an entry
    computed anew with another rounding falls on the same side. Negative (all entries exceed it)
    if there are not ``count`` positive entries. Exact: bisection over the bits of the floats, one
    counting pass each (31 in float32, 63 in float64), about seven times faster than a sort.
    """
    kth = _kth_largest(magnitudes, count)
    below = jnp.max(jnp.where(magnitudes < kth, magnitudes, 0))
    return jnp.where(kth > 0, (kth + below) / 2, -1)


def _kth_largest(magnitudes: Float[Array, "row column"], count: Int[Array, ""] | int) -> Float[Array, ""]:
    width = 8 * magnitudes.dtype.itemsize
    integer = {16: jnp.int16, 32: jnp.int32, 64: jnp.int64}[width]

    def step(i: Int[Array, ""], found: Int[Array, ""]) -> Int[Array, ""]:
        # non-negative floats are ordered like their bits
        candidate = found | (jnp.ones((), integer) << (width - 2 - i).astype(integer))
        above = magnitudes >= jax.lax.bitcast_convert_type(candidate, magnitudes.dtype)
        # sums of floats are three times faster on CPUs; exact, a column having fewer than 2**24 rows
        columns = jnp.sum(above, axis=0, dtype=jnp.float32)
        enough = jnp.sum(columns.astype(jnp.int32)) >= count
        return jnp.where(enough, candidate, found)

    found = jax.lax.fori_loop(0, width - 1, step, jnp.zeros((), integer))
    kth = jax.lax.bitcast_convert_type(found, magnitudes.dtype)
    return jnp.where(kth >= jnp.finfo(magnitudes.dtype).tiny, kth, 0)  # CPUs compare denormals as zeros
