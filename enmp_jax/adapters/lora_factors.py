"""Deltas -> LoRA factors of one rank: exact, or truncated as far as an error bears."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from enmp_jax.adapters.peft_files import Modules
from enmp_jax.deltas import Delta, Deltas, LowRank
from enmp_jax.errors import UserError

_DIRECT = 2048  # up to this side LAPACK's full SVD is quicker than Lanczos
_FINEST = 1e-6  # what float32 factors of a dense matrix can keep to

Names = Mapping[str, Sequence[str]]
"""Name in a stack -> the path of each of its layers (see ``LoadedAdapters.names``)."""
_LARGEST = float(np.finfo(np.float32).max)


class LoraFactors(NamedTuple):
    """LoRA factors of merged deltas.

    Attributes:
        modules: module path -> (A [r, in], B [out, r]) in float32, scaling included; r <= ``rank``.
        rank: rank of the adapter.
        error: Frobenius norm of what truncation lost over that of the whole, 0 when exact.
    """

    modules: Modules
    rank: int
    error: float


def lora_factors(
    deltas: Deltas, names: Names, rank: int | None = None, tolerance: float | None = None
) -> LoraFactors:
    """Write every delta that is not zero as ``B A``.

    Low-rank deltas of rank at most ``rank`` are exact. Dense ones get the smallest rank, the same for all,
    that meets the tolerance. What is cut off is the least possible (Eckart-Young).

    Args:
        deltas: templates -> delta with a leading layer axis.
        names: template -> path to write of each layer.
        rank: largest rank, whatever the error; None: as high as need be.
        tolerance: error that dense deltas may have, as ``LoraFactors.error`` counts it; None: as little
            as ``rank`` allows.

    Raises:
        UserError: NaN or Inf in a delta, a rank below 1, or a tolerance that no rank meets.
    """
    check_limits(rank, tolerance)
    modules: Modules = {}
    lost = whole = 0.0
    host: Deltas = jax.device_get(deltas)
    dense_rank = _rank_within(host, tolerance, rank) if tolerance else rank
    for template, delta in host.items():
        limit = rank if isinstance(delta, LowRank) else dense_rank
        for layer, path in enumerate(names[template]):
            a, b, missing, norm = layer_factors(one_layer(delta, layer), limit)
            if not float(norm) <= _LARGEST:  # also where only the product of finite factors overflows
                raise UserError(f"the merged delta of {path} has NaN or Inf in it")
            lost, whole = lost + missing**2, whole + norm**2
            if norm:
                modules[path] = a, b
    largest = max((a.shape[0] for a, _ in modules.values()), default=0)
    return LoraFactors(modules, largest, math.sqrt(lost / whole) if whole else 0.0)


def check_limits(rank: int | None, tolerance: float | None) -> None:
    """Refuse limits that no factors keep to.

    Raises:
        UserError: a rank below 1, or a tolerance that is negative, not finite, or finer than float32.
    """
    if rank is not None and rank < 1:
        raise UserError(f"rank {rank}: it must be at least 1")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise UserError(f"tolerance {tolerance}: it must be a number from 0, such as 0.01 for 1 %")
    if tolerance and tolerance < _FINEST:
        raise UserError(
            f"tolerance {tolerance:g}: no rank meets it in float32; give at least {_FINEST:g}, or 0 for as "
            "little as float32 allows"
        )


def delta_parts(deltas: Deltas, names: Names) -> dict[str, tuple[np.ndarray, ...]]:
    """Module path -> its delta as (left, right) or (weight,), for every layer; see ``one_layer``."""
    host: Deltas = jax.device_get(deltas)
    return {
        path: one_layer(delta, layer)
        for template, delta in host.items()
        for layer, path in enumerate(names[template])
    }


def low_rank_deltas(modules: Modules, names: Names, like: Deltas) -> Deltas:
    """LoRA modules as deltas again, so that what was written can be scored.

    Args:
        modules: as in ``LoraFactors``.
        names: template -> path in ``modules`` of each layer.
        like: what they were made of, for templates and shapes.
    """
    rank = max(a.shape[0] for a, _ in modules.values())
    made: Deltas = {}
    for template, delta in like.items():
        out, inner = one_layer(delta, 0)[0].shape[0], one_layer(delta, 0)[-1].shape[1]
        left = np.zeros((_n_layers(delta), out, rank), np.float32)
        right = np.zeros((_n_layers(delta), rank, inner), np.float32)
        for layer, path in enumerate(names[template]):
            if path in modules:
                a, b = modules[path]
                left[layer, :, : a.shape[0]], right[layer, : a.shape[0]] = b, a
        made[template] = LowRank(jnp.asarray(left), jnp.asarray(right), None)
    return made


def _n_layers(delta: Delta) -> int:
    return (delta.left if isinstance(delta, LowRank) else delta.weight).shape[0]


def _rank_within(deltas: Deltas, tolerance: float, limit: int | None) -> int | None:
    """The smallest rank at which all dense deltas together meet the tolerance, at most ``limit``."""
    energies = []
    for delta in deltas.values():
        for layer in range(_n_layers(delta)) if not isinstance(delta, LowRank) else ():
            (weight,) = one_layer(delta, layer)
            if not np.isfinite(weight).all():
                return limit  # to be refused by name
            wide = (weight if weight.shape[0] <= weight.shape[1] else weight.T).astype(np.float64)
            # squared singular values, smallest first; float64, as their squares span twice the digits
            energies.append(np.maximum(np.linalg.eigvalsh(wide @ wide.T), 0.0))
    if not energies:
        return limit
    largest = max(map(len, energies))
    # lost[r]: what truncating everything to rank r loses
    lost = np.zeros(largest + 1)
    for energy in energies:
        lost[: len(energy)] += np.cumsum(energy)[::-1]
    smallest = max(int(np.argmax(lost <= tolerance**2 * lost[0])), 1)
    return smallest if limit is None else min(smallest, limit)


def one_layer(delta: Delta, layer: int) -> tuple[np.ndarray, ...]:
    """(left, right) of a low-rank delta's layer, the core folded into the smaller side; or (weight,)."""
    if not isinstance(delta, LowRank):
        return (np.asarray(delta.weight, np.float32)[layer],)
    if delta.right is None:  # entrywise methods in the KnOTS space: the core reaches the inputs itself
        left, right = (np.asarray(x)[layer] for x in (delta.left, delta.core))
        return left.astype(np.float32), right.astype(np.float32)
    left, core, right = (
        np.asarray(x)[layer].astype(np.float64) for x in (delta.left, delta.core, delta.right)
    )
    if core.shape[0] > core.shape[1]:
        left = left @ core
    else:
        right = core @ right
    used = left.any(axis=0) & right.any(axis=1)  # pruned modules leave zeros behind
    return left[:, used].astype(np.float32), right[used].astype(np.float32)


def squared_norm(left: Float[np.ndarray, "m k"], right: Float[np.ndarray, "k n"]) -> float:
    """``||L R||_F^2`` as ``<L^T L, R R^T>`` in float64, without forming the product."""
    left, right = left.astype(np.float64, copy=False), right.astype(np.float64, copy=False)
    return max(float(np.sum((left.T @ left) * (right @ right.T))), 0.0)


def layer_factors(
    delta: tuple[np.ndarray, ...], rank: int | None
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """(A, B, norm of what is lost, norm of the whole) of one delta, as ``one_layer`` gives it."""
    if len(delta) == 1:
        (weight,) = delta
        norm = float(np.linalg.norm(weight.astype(np.float64)))
        if not norm or not math.isfinite(norm):
            return weight[:0], weight[:, :0], 0.0, norm
        u, s, vt = _top(weight, rank or min(weight.shape))
        a, b = _balance(u, s, vt)
        missing = float(np.linalg.norm(weight - b @ a)) if len(s) < min(weight.shape) else 0.0
        return a, b, missing, norm
    left, right = delta
    k = left.shape[1]
    wide_left, wide_right = left.astype(np.float64), right.astype(np.float64)
    norm = math.sqrt(squared_norm(wide_left, wide_right))
    limit = min(left.shape[0], right.shape[1], rank or k)
    if k <= limit or not norm or not math.isfinite(norm):
        return right, left, 0.0, norm
    ql, rl = np.linalg.qr(wide_left)
    qr, rr = np.linalg.qr(wide_right.T)
    u, s, vt = np.linalg.svd(rl @ rr.T)
    missing = math.sqrt(float(np.sum(s[limit:] ** 2)))
    return *_balance((ql @ u)[:, :limit], s[:limit], (vt @ qr.T)[:limit]), missing, norm


def _top(weight: Float[np.ndarray, "m n"], rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest singular triplets, largest first."""
    rank = min(rank, *weight.shape)
    if min(weight.shape) <= _DIRECT or rank > min(weight.shape) // 4:
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
        return u[:, :rank], s[:rank].astype(np.float64), vt[:rank]
    from scipy.sparse.linalg import svds

    start = np.ones(min(weight.shape), weight.dtype)
    u, s, vt = typing.cast(tuple[np.ndarray, ...], svds(weight, k=rank, v0=start))
    order = np.argsort(-s)
    return u[:, order], s[order].astype(np.float64), vt[order]


def _balance(u: np.ndarray, s: np.ndarray, vt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(A, B) sharing the singular values evenly, in float32."""
    root = np.sqrt(s)
    return (root[:, None] * vt).astype(np.float32), (u * root).astype(np.float32)
