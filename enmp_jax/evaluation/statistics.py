"""What regmean and fisher need to know of the tasks' data (``merges.statistics``), by our own forward passes.

Every task's own adapter sees its own examples. A module's inputs are caught in the backward pass: a delta
whose gradient with respect to a matrix of zeros is their second moment, so that no backbone needs to know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from enmp_jax import merges
from enmp_jax.data import Split, batch
from enmp_jax.data.batches import Batches
from enmp_jax.data.layout import TOKEN_INPUTS
from enmp_jax.deltas import Deltas, Dense, LowRank
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.fitness import FITNESS
from enmp_jax.evaluation.kinds import count_batch
from enmp_jax.merges.statistics import Kind

Matrices = dict[str, Float[np.ndarray, "layer _ _"]]  # projection -> the matrices of its layers


class _Seen(NamedTuple):
    """A sum over examples or tokens, and how many they were."""

    total: Float[Array, "*layer _ _"]
    examples: Float[Array, "*layer"]


@jax.custom_vjp
def _watch(
    x: Float[Array, "*batch in"], seen: _Seen, real: Float[Array, "*batch"]
) -> Float[Array, "*batch in"]:
    """``x``; the cotangent of ``seen`` is what the rows that are real add to it."""
    return x


def _watch_forward(x: Array, seen: _Seen, real: Array) -> tuple[Array, tuple[Array, Array]]:
    return x, (x, real)


def _watch_backward(kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, _Seen, None]:
    x, real = kept
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    weighted = rows * real.reshape(-1, 1)
    return cotangent, _Seen(jnp.matmul(weighted.T, rows, precision="highest"), real.sum()), None


_watch.defvjp(_watch_forward, _watch_backward)


@flax.struct.dataclass
class _Watched(LowRank):
    """A delta that watches the inputs of its module."""

    seen: _Seen
    real: tuple[Float[Array, "*layer row _"], ...]  # 1 where an input is one: of rows, of tokens, of targets

    def apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        own = [one for one in self.real if one.shape == x.shape[: one.ndim]]
        real = own[0] if own else self.real[0]
        real = real[:, 0] if x.ndim == 2 else real
        return super().apply(_watch(x, self.seen, jnp.broadcast_to(real, x.shape[:-1])))


def measure(
    evaluator: Evaluator, kind: Kind, split: Split, on_task: Callable[[str], None] = lambda task: None
) -> dict[str, Matrices]:
    """The statistics of every task: ``{task: {projection: [layer, _, _]}}``.

    gram: the mean of ``x x^T`` over the inputs of a module, padding left out; in the last layer, of those
    tokens whose outputs are used, which are the only ones that are computed. fisher: the mean over examples
    of the squared gradient of the log-likelihood of the label (of the expert's choice, where there are no
    labels) with respect to the entries of the module's weight: the empirical Fisher information.

    Args:
        evaluator: of the run.
        kind: which.
        split: whose examples.
        on_task: called with every task when it is done.
    """
    loaded = evaluator.loaded
    alone = merges.make("sum")  # the sum of one adapter is that adapter
    prepared, merge = alone.prepare(loaded.stack), jax.jit(alone.merge)
    size = loaded.run.evaluation.batch_size if kind == "gram" else 1
    of_batch = jax.jit(_gram(evaluator) if kind == "gram" else _fisher(evaluator))
    found = {}
    for i, task in enumerate(loaded.tasks):
        keep = np.eye(len(loaded.tasks), dtype=np.float32)[[i] * loaded.stack.n_layers]
        deltas = merge(prepared, keep, 1.0)
        total: Any = None
        for bucket in batch([evaluator.examples(split)[i]], size):
            for b in range(bucket.label.shape[0]):
                one = jax.tree.map(lambda x, b=b: x[b], bucket)
                one = one._replace(task=jnp.full_like(one.task, i))
                seen = of_batch(loaded.params, loaded.heads, one, deltas)
                total = seen if total is None else jax.tree.map(jnp.add, total, seen)
        found[task] = {name: np.asarray(s.total / s.examples[:, None, None]) for name, s in total.items()}
        on_task(task)
    return found


Statistics = Callable[[Any, Any, Batches, Deltas], dict[str, _Seen]]
"""``(params, heads, batch, deltas) -> {projection: what the rows of the batch add}``."""


def _log_likelihood(evaluator: Evaluator) -> Callable[..., Float[Array, ""]]:
    backbone, n_tasks = evaluator.loaded.backbone, len(evaluator.loaded.tasks)

    def value(params: Any, heads: Any, batch: Batches, deltas: Deltas) -> Float[Array, ""]:
        counts = count_batch(backbone, params, heads, batch, deltas, n_tasks, FITNESS["log_likelihood"])
        return counts.log_likelihood.sum()

    return value


def _gram(evaluator: Evaluator) -> Statistics:
    value = _log_likelihood(evaluator)

    def of_batch(params: Any, heads: Any, batch: Batches, deltas: Deltas) -> dict[str, _Seen]:
        batch = batch._replace(inputs=_told_apart(batch.inputs))
        rows = batch.mask.astype(jnp.float32)[:, None]
        names = [name for name in ("attention_mask", "target_branch") if name in batch.inputs]
        real = rows, *(rows * (batch.inputs[name] > 0) for name in names)

        def watched(seen: dict[str, _Seen]) -> Float[Array, ""]:
            watching: dict[str, Any] = {}
            for name, delta in deltas.items():
                assert isinstance(delta, LowRank)
                layers = delta.core.shape[0]
                masks = tuple(jnp.broadcast_to(one, (layers, *one.shape)) for one in real)
                watching[name] = _Watched(delta.left, delta.core, delta.right, seen[name], masks)
            return value(params, heads, batch, watching)

        def nothing(delta: Any) -> _Seen:
            layers, inner = delta.right.shape[0], delta.right.shape[-1]
            return _Seen(jnp.zeros((layers, inner, inner), jnp.float32), jnp.zeros(layers, jnp.float32))

        return jax.grad(watched)({name: nothing(delta) for name, delta in deltas.items()})

    return of_batch


def _told_apart(inputs: dict[str, Array]) -> dict[str, Array]:
    """Inputs with more tokens than targets, so that shapes say which of both a module sees."""
    if "target_ids" not in inputs or inputs["input_ids"].shape[1] != inputs["target_ids"].shape[1]:
        return inputs
    return {name: jnp.pad(x, ((0, 0), (0, 1))) if name in TOKEN_INPUTS else x for name, x in inputs.items()}


def _fisher(evaluator: Evaluator) -> Statistics:
    value = _log_likelihood(evaluator)

    def of_batch(params: Any, heads: Any, batch: Batches, deltas: Deltas) -> dict[str, _Seen]:
        full = {name: delta.materialise() for name, delta in deltas.items()}

        def of_weights(weights: dict[str, Array]) -> Float[Array, ""]:
            return value(params, heads, batch, {name: Dense(w) for name, w in weights.items()})

        found = jax.grad(of_weights)(full)
        rows = batch.mask.sum().astype(jnp.float32)
        return {name: _Seen(g**2, jnp.broadcast_to(rows, len(g))) for name, g in found.items()}

    return of_batch
