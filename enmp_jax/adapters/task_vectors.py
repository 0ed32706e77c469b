"""Merging whole fine-tuned models: what each differs from its base by, tensor by tensor as it is written.

Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023: a task vector is a fine-tuned model less
its base. No tensor of a task vector is kept: rows are read again from the files whenever they are needed.
TIES needs one threshold a task and tensor, found by counting; DARE draws by position. TSV and Iso need the
singular vectors of a matrix D, m x n: those of the smaller side from the Gram matrix (n x n, in float64),
those of the larger as ``D v / s``, so that the merge is ``sum_i D_i N_i`` with small ``N_i``. Tensors that
are no matrices, and embeddings (a row each for tokens, no map), get the mean of what the tasks add, as in the
reference code of both.
"""

from __future__ import annotations

import functools
import operator
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from enmp_jax.errors import UserError
from enmp_jax.io.tensor_rows import TensorRows

METHODS = ("sum", "mean", "ties", "dare", "dare_ties", "tsv", "iso")
_CHUNK = 2**20  # entries read at a time
_BLOCK = 2**16  # entries drawn by one key
_CUT = 5e-5  # singular values up to it are none, as in merges.iso


@dataclass(frozen=True)
class Method:
    """A merge of task vectors.

    Attributes:
        name: one of ``METHODS``.
        scale: merge coefficient.
        density: TIES: share of the largest entries kept of each task.
        drop_rate: DARE: share of entries dropped.
        seed: of DARE.
        task_weights: one factor a task.
    """

    name: str
    scale: float = 1.0
    density: float = 0.2
    drop_rate: float = 0.9
    seed: int = 0
    task_weights: tuple[float, ...] | None = None

    @classmethod
    def of(cls, merge: Mapping[str, Any], scale: float, n_tasks: int) -> Method:
        """From what ``merges.make`` takes.

        Raises:
            UserError: a method or an option that is there for adapters only.
        """
        name = merge["method"]
        if name not in METHODS:
            raise UserError(f"whole models are merged by {', '.join(METHODS)}; {name} is for adapters")
        if merge.get("space", "full") != "full":
            raise UserError(f"whole models are merged in full space: {merge['space']} is for adapters")
        for key in ("isotropize", "layer_scaling"):
            if merge.get(key):
                raise UserError(f"{key} is for adapters, not for whole models")
        weights = merge.get("task_weights")
        if weights is not None and len(weights) != n_tasks:
            raise UserError(f"task_weights: give one number a task, {n_tasks}, not {len(weights)}")
        given = {key: merge[key] for key in ("density", "drop_rate", "seed") if merge.get(key) is not None}
        return cls(name, scale, task_weights=None if weights is None else tuple(weights), **given)


@dataclass(frozen=True)
class MergedTensor:
    """What merging adds to one tensor of the base (a ``shards.Change``).

    Attributes:
        name: of the tensor.
        base: its rows in the base.
        tasks: task -> its rows in the task's model.
        method: the merge.
        matrix: whether it is a map, which has singular vectors.
    """

    name: str
    base: TensorRows
    tasks: Mapping[str, TensorRows]
    method: Method
    matrix: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Of the tensor, seen as a matrix."""
        return self.base.shape

    def rows(self, start: int, stop: int) -> Float[np.ndarray, "rows in"]:
        """Some rows of the merge, in float32."""
        if self.method.name in ("tsv", "iso") and self.matrix:
            found = self._solution(start, stop)
            if stop == self.shape[0]:  # served: what only this tensor needs is freed
                self.__dict__.pop("_solution", None)
        elif self.method.name in ("ties", "dare_ties"):
            found = self._elected(start, stop)
        else:
            found = np.zeros((stop - start, self.shape[1]), np.float32)
            for i in range(len(self.tasks)):
                found += self._vector(i, start, stop)
            if self.method.name not in ("sum", "dare"):  # spectral methods on what has no spectrum: the mean
                found /= np.float32(len(self.tasks))
        found *= np.float32(self.method.scale)
        return found

    def _vector(self, task: int, start: int, stop: int) -> Float[np.ndarray, "rows in"]:
        """Rows of a task vector, after DARE's draw where there is one."""
        name = list(self.tasks)[task]
        own = self.tasks[name].read(start, stop)
        own -= self.base.read(start, stop)
        if self.method.task_weights is not None:
            own *= np.float32(self.method.task_weights[task])
        return self._dropped(name, own, start * self.shape[1]) if self.method.name.startswith("dare") else own

    def _chunks(self, task: int | None) -> Iterator[tuple[int, np.ndarray]]:
        """First row and rows of a task vector, piece by piece; None: of the sum of all."""
        step = max(1, _CHUNK // self.shape[1])
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            every = range(len(self.tasks)) if task is None else [task]
            yield start, functools.reduce(operator.iadd, (self._vector(i, start, stop) for i in every))

    def _dropped(self, task: str, own: np.ndarray, first: int) -> np.ndarray:
        """DARE's draw for the entries from ``first`` on, the same however they are divided."""
        rate, flat = self.method.drop_rate, own.reshape(-1)
        words = [self.method.seed, zlib.crc32(task.encode()), zlib.crc32(self.name.encode())]
        for block in range(first // _BLOCK, -(-(first + flat.size) // _BLOCK)):
            kept = np.random.default_rng([*words, block]).random(_BLOCK, np.float32) >= rate
            low, high = max(first, block * _BLOCK), min(first + flat.size, (block + 1) * _BLOCK)
            flat[low - first : high - first] *= kept[low - block * _BLOCK : high - block * _BLOCK]
        own /= np.float32(1 - rate)
        return own

    def _elected(self, start: int, stop: int) -> Float[np.ndarray, "rows in"]:
        """TIES; see ``merges.ties``."""
        total = self._trimmed(start, stop)
        sign = np.where(total == 0, self._majority, np.sign(total)).astype(np.int8)
        total[...] = 0
        counts = np.zeros(total.shape, np.uint16)
        for i, threshold in enumerate(self._thresholds):
            own = self._vector(i, start, stop)
            own[(np.abs(own) < threshold) | (own * sign <= 0)] = 0
            total += own
            counts += own != 0
        total /= np.maximum(counts, 1)
        return total

    def _trimmed(self, start: int, stop: int) -> Float[np.ndarray, "rows in"]:
        """The sum of the task vectors' largest entries."""
        total = np.zeros((stop - start, self.shape[1]), np.float32)
        for i, threshold in enumerate(self._thresholds):
            own = self._vector(i, start, stop)
            own[np.abs(own) < threshold] = 0
            total += own
        return total

    @cached_property
    def _majority(self) -> int:
        """The sign of entries whose sum is zero: that of most."""
        votes = 0
        for start, rows in self._chunks(0):
            votes += int(np.sign(self._trimmed(start, start + len(rows))).sum())
        return 1 if votes > 0 else -1

    @cached_property
    def _thresholds(self) -> list[np.float32]:
        """The ``int(density * d) + 1``-th largest magnitude of each task."""
        size = self.shape[0] * self.shape[1]
        count = min(int(size * self.method.density) + 1, size)
        return [self._largest(i, count) for i in range(len(self.tasks))]

    def _largest(self, task: int, count: int) -> np.float32:
        """Exact, by the bits of the floats, eleven at a time: a counting pass each."""
        known, shift = 0, 32
        for width in (11, 11, 10):
            shift -= width
            bins = np.zeros(1 << width, np.int64)
            for _, own in self._chunks(task):
                bits = np.abs(own).reshape(-1).view(np.uint32)
                if shift + width < 32:
                    bits = bits[bits >> np.uint32(shift + width) == known]
                digits = (bits >> np.uint32(shift)) & np.uint32((1 << width) - 1)
                bins += np.bincount(digits, minlength=1 << width)
            above = np.cumsum(bins[::-1])
            place = int(np.argmax(above >= count))
            count -= int(above[place - 1]) if place else 0
            known = (known << width) | (len(bins) - 1 - place)
        return np.uint32(known).view(np.float32)

    @cached_property
    def _solution(self) -> Callable[[int, int], np.ndarray]:
        """Rows of ``sum_i D_i N_i``, or of ``sum_i N_i^T D_i`` where D has more columns than rows."""
        tall = self.shape[0] >= self.shape[1]
        one = self.method.name == "iso"
        every: list[int | None] = [None] if one else list(range(len(self.tasks)))
        factors = _isotropic(self._gram(None, None)) if one else _decorrelated(self._gram, len(self.tasks))
        if tall:
            narrow = [factor.astype(np.float32) for factor in factors]

            def rows(start: int, stop: int) -> np.ndarray:
                own = [self._vector(i, start, stop) for i in range(len(self.tasks))]
                own = [functools.reduce(operator.iadd, own)] if one else own
                return functools.reduce(operator.iadd, (x @ n for x, n in zip(own, narrow, strict=True)))

            return rows
        whole = np.zeros(self.shape, np.float32)
        for task, factor in zip(every, factors, strict=True):
            for start, own in self._chunks(task):
                whole += factor.T[:, start : start + len(own)].astype(np.float32) @ own
        return lambda start, stop: whole[start:stop].copy()

    def _gram(self, task: int | None, other: int | None) -> Float[np.ndarray, "n n"]:
        """Products of the shorter sides' vectors of two task vectors, in float64."""
        small = min(self.shape)
        found = np.zeros((small, small))
        if self.shape[0] >= self.shape[1]:
            for (_, x), (_, y) in zip(self._chunks(task), self._chunks(other), strict=True):
                found += x.astype(np.float64).T @ y.astype(np.float64)
            return found
        x, y = (np.concatenate([rows for _, rows in self._chunks(i)]) for i in (task, other))
        step = max(1, _CHUNK // small)
        for start in range(0, self.shape[1], step):
            part = (z[:, start : start + step].astype(np.float64) for z in (x, y))
            found += next(part) @ next(part).T
        return found


def _isotropic(gram: Float[np.ndarray, "n n"]) -> list[np.ndarray]:
    """N of Iso: ``D N`` has the singular vectors of D and their mean for all values."""
    values, v = np.linalg.eigh(gram)
    s = np.sqrt(np.maximum(values, 0))
    used = s > max(_CUT, 1e-7 * float(s.max(initial=0)))
    if not used.any():
        return [np.zeros_like(gram)]
    return [(v[:, used] * (s[used].mean() / s[used])) @ v[:, used].T]


def _decorrelated(gram: Callable[[int, int], np.ndarray], n_tasks: int) -> list[np.ndarray]:
    """N_i of TSV: ``sum_i D_i N_i = polar(U) S polar(V)^T`` of ``min(m, n) / T`` triplets a task."""
    left, right, values = [], [], []
    for i in range(n_tasks):
        found, v = np.linalg.eigh(gram(i, i))
        count = max(1, len(found) // n_tasks)
        s = np.sqrt(np.maximum(found[::-1][:count], 0))
        v = v[:, ::-1][:, :count]
        used = s > 1e-7 * max(float(s[0]), np.finfo(np.float64).tiny)
        left.append(v * np.divide(1, s, out=np.zeros_like(s), where=used))  # U_i = D_i times it
        right.append(v * used)
        values.append(s * used)
    k = len(values[0])
    overlap = np.zeros((n_tasks * k, n_tasks * k))
    for i in range(n_tasks):
        for j in range(i, n_tasks):
            block = left[i].T @ gram(i, j) @ left[j]
            overlap[i * k : (i + 1) * k, j * k : (j + 1) * k] = block
            overlap[j * k : (j + 1) * k, i * k : (i + 1) * k] = block.T
    v = np.concatenate(right, axis=1)
    middle = _root(overlap) * np.concatenate(values) @ _root(v.T @ v) @ v.T
    return [left[i] @ middle[i * k : (i + 1) * k] for i in range(n_tasks)]


def _root(gram: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "k k"]:
    """The inverse square root of a Gram matrix, null directions left out."""
    values, vectors = np.linalg.eigh(gram)
    used = values > 1e-9 * max(float(values[-1]), np.finfo(np.float64).tiny)
    return (vectors[:, used] / np.sqrt(values[used])) @ vectors[:, used].T
