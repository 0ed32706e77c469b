"""Methods that treat entries of the task matrices one by one: TIES, DARE, Model Breadcrumbs.

Each is a choice of what survives of a task's matrix (a random drop, then a band of magnitudes)
and of how the survivors are combined. In full space nothing of these choices depends on the
mask, so the bands are found once; the matrices ``B_i A_i`` are formed on the fly, a block of
rows at a time, and no [task, out, in] array is ever kept. In the KnOTS and core spaces bases,
bands and the number of entries depend on the mask; the matrices are small there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from enmp_jax.deltas import Dense, LowRank
from enmp_jax.merges.base import LayerInputs, LayerMethod
from enmp_jax.merges.batching import one_by_one, one_by_one_differentiable
from enmp_jax.merges.spaces import QrFactors, Size, core_bases, knots, qr_factors
from enmp_jax.merges.thresholds import threshold_of_largest

Tasks = Float[Array, "task row column"]
_BLOCK = 2**20  # entries formed at a time in full space


class Combine(NamedTuple):
    """How tasks are combined: ``combine(survivors, weights, votes)``.

    ``vote(survivors, weights)``, a number or one for each task, is summed over all blocks of the matrices
    first.
    """

    vote: Callable[[Tasks, Float[Array, " task"]], Array] | None
    combine: Callable[[Tasks, Float[Array, " task"], Array], Float[Array, "row column"]]


class Entrywise(NamedTuple):
    """An entrywise method.

    ``drop(x, keys, first_row)`` rescales and zeroes entries at random. ``counts(size)`` gives
    (top, last): of ``size`` entries the top + 1-th to the last-th largest survive. ``varying``: the share of
    entries that survive in all tasks, those with the largest variance over the tasks.
    """

    combine: Combine
    counts: Callable[[int], tuple[int, int]] | None = None
    drop: Callable[[Tasks, Key[Array, " task"], Int[Array, ""] | int], Tasks] | None = None
    varying: float | None = None

    def dropped(self, x: Tasks, key: Key[Array, " task"], first_row: Int[Array, ""] | int = 0) -> Tasks:
        """After the random drop."""
        return x if self.drop is None else self.drop(x, key, first_row)


def entrywise_in_space(space: str, method: Entrywise) -> LayerMethod:
    """The method on the entries of the tasks' matrices in a space."""
    if space == "full":
        return _full_space(method)

    def prepare(inputs: LayerInputs) -> tuple[QrFactors, Key[Array, " task"]]:
        return qr_factors(inputs), inputs.key

    def merge(ingredients: tuple[QrFactors, Key[Array, " task"]], weights: Float[Array, " task"]) -> LowRank:
        # two times faster on CPUs than a batch of members, whose temporaries fall out of the cache
        arrays, structure = jax.tree.flatten((ingredients, weights))
        factors = ingredients[0]
        core = one_by_one_differentiable(lambda *xs: merge_core(*jax.tree.unflatten(structure, xs)))(*arrays)
        return LowRank(factors.q_b, core, None if space == "knots" else factors.q_a.T)

    def merge_core(
        ingredients: tuple[QrFactors, Key[Array, " task"]], weights: Float[Array, " task"]
    ) -> Float[Array, "p q"]:
        factors, key = ingredients
        if space == "knots":
            basis, coordinates, size = knots(factors, weights, precise=False)
            x = jnp.matmul(coordinates.left, jnp.swapaxes(factors.own_a, 1, 2))
            return basis @ _merge(method, x, key, weights, size)
        left, right, size = core_bases(factors, weights)
        x = jnp.matmul(left.T @ factors.r_b, jnp.swapaxes(right.T @ factors.r_a, 1, 2))
        return left @ _merge(method, x, key, weights, size) @ right.T

    return LayerMethod(prepare, merge, sequential=True)


def _merge(
    method: Entrywise, x: Tasks, key: Key[Array, " task"], weights: Float[Array, " task"], size: Size
) -> Float[Array, "row column"]:
    x = method.dropped(x, key)
    if method.counts is not None:
        counts = method.counts
        top = size.lookup(lambda rows, columns: counts(rows * columns)[0])
        last = size.lookup(lambda rows, columns: counts(rows * columns)[1])
        low, high = _limits_of_tasks(jax.lax.stop_gradient(jnp.abs(x)), top, last)
        x = _survivors(x, low, high)
    if method.varying is not None:
        share, spread = method.varying, _variance(x, weights)
        limit = threshold_of_largest(spread, size.lookup(lambda rows, columns: _count(share, rows * columns)))
        x = jnp.where(spread > limit, x, 0)
    votes = method.combine.vote(x, weights) if method.combine.vote else jnp.zeros((), x.dtype)
    return method.combine.combine(x, weights, votes)


def _limits(
    magnitudes: Float[Array, "row column"], top: Int[Array, ""] | int, last: Int[Array, ""] | int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Those magnitudes survive that are above the first and not above the second limit."""
    high = jnp.asarray(jnp.inf, magnitudes.dtype)
    if not (isinstance(top, int) and top == 0):
        high = jnp.where(top > 0, threshold_of_largest(magnitudes, jnp.maximum(top, 1)), high)
    return threshold_of_largest(magnitudes, last), high


_limits_of_tasks = one_by_one(jax.vmap(_limits, (0, None, None)))


def _survivors(x: Tasks, low: Float[Array, " task"], high: Float[Array, " task"]) -> Tasks:
    magnitude = jnp.abs(x)
    return jnp.where((magnitude > low[:, None, None]) & (magnitude <= high[:, None, None]), x, 0)


def _variance(x: Tasks, weights: Float[Array, " task"]) -> Float[Array, "row column"]:
    """Variance over the tasks, of each entry; no derivative passes."""
    x, weights = jax.lax.stop_gradient((x, weights))
    count = jnp.sum(weights)
    share = weights / jnp.where(count > 0, count, 1)
    mean = total(x, share)
    return total((x - mean) ** 2, share)


def _count(share: float, size: int) -> int:
    return max(int(size * share), 1)


def total(x: Tasks, weights: Float[Array, " task"]) -> Float[Array, "row column"]:
    """The weighted sum over tasks; written out, it fuses (50 times faster on CPUs than ``jnp.sum``)."""
    return sum((x[i] * weights[i] for i in range(1, x.shape[0])), start=x[0] * weights[0])


class _Full(NamedTuple):
    a: Float[Array, "task rank in"]
    b: Float[Array, "block task row rank"]
    key: Key[Array, " task"]
    limits: tuple[Float[Array, " task"], Float[Array, " task"]] | None


def _full_space(method: Entrywise) -> LayerMethod:
    def prepare(inputs: LayerInputs) -> _Full:
        tasks, out, rank = inputs.b.shape
        size = out * inputs.a.shape[-1]
        limits = None
        if method.counts is not None:
            top, last = method.counts(size)

            def limits_of(task: LayerInputs) -> tuple[Array, Array]:
                x = method.dropped((task.b @ task.a)[None], task.key[None])[0]
                return _limits(jnp.abs(x), top, last)

            limits = jax.lax.map(limits_of, inputs)
        blocks = -(-tasks * size // _BLOCK)
        rows = -(-out // blocks)
        b = jnp.pad(inputs.b, ((0, 0), (0, blocks * rows - out), (0, 0)))
        b = jnp.moveaxis(b.reshape(tasks, blocks, rows, rank), 1, 0)
        return _Full(inputs.a, b, inputs.key, limits)

    def merge(x: _Full, weights: Float[Array, " task"], n_rows: int) -> Dense:
        blocks, _, rows, _ = x.b.shape
        xs = (x.b, jnp.arange(blocks) * rows)

        def entries(b: Float[Array, "task row rank"], first_row: Int[Array, ""]) -> Tasks:
            found = method.dropped(jnp.matmul(b, x.a), x.key, first_row)
            return found if x.limits is None else _survivors(found, *x.limits)

        block = entries
        if method.varying is not None:
            spread = jax.lax.map(lambda block_of: _variance(entries(*block_of), weights), xs)
            count = _count(method.varying, n_rows * x.a.shape[-1])
            limit = threshold_of_largest(spread.reshape(-1, spread.shape[-1]), count)

            def block(b: Float[Array, "task row rank"], first_row: Int[Array, ""]) -> Tasks:
                found = entries(b, first_row)
                return jnp.where(_variance(found, weights) > limit, found, 0)

        votes = jnp.zeros((), weights.dtype)
        if method.combine.vote is not None:
            vote = method.combine.vote
            votes = jnp.sum(jax.lax.map(lambda block_of: vote(block(*block_of), weights), xs), axis=0)
        merged = jax.lax.map(lambda block_of: method.combine.combine(block(*block_of), weights, votes), xs)
        return Dense(merged.reshape(blocks * rows, -1))

    def cropped(inputs: LayerInputs) -> tuple[_Full, Float[Array, "out 0"]]:
        # an array without entries tells merge how many rows are real
        return prepare(inputs), jnp.zeros((inputs.b.shape[1], 0), inputs.b.dtype)

    def merge_cropped(
        ingredients: tuple[_Full, Float[Array, "out 0"]], weights: Float[Array, " task"]
    ) -> Dense:
        full, rows = ingredients
        return Dense(merge(full, weights, rows.shape[0]).weight[: rows.shape[0]])

    return LayerMethod(cropped, merge_cropped, sequential=True)
