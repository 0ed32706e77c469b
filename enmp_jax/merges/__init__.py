"""Merge methods. ``make("ties", space="knots", density=0.2)`` builds one by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from enmp_jax.errors import UserError, suggestion
from enmp_jax.lora import LoraPair, LoraStack
from enmp_jax.merges.base import LayerMethod, Merge, lift, merge_population
from enmp_jax.merges.breadcrumbs import breadcrumbs
from enmp_jax.merges.cart import cart
from enmp_jax.merges.dare import dare, dare_ties
from enmp_jax.merges.hyperparameters import check, check_seed
from enmp_jax.merges.iso import iso, isotropized
from enmp_jax.merges.iso_cts import iso_cts
from enmp_jax.merges.lego import lego
from enmp_jax.merges.spaces import SPACES
from enmp_jax.merges.sum import mean, sum_
from enmp_jax.merges.ties import ties
from enmp_jax.merges.tsv import tsv

METHODS: dict[str, Callable[..., LayerMethod]] = {
    "sum": sum_,
    "mean": mean,
    "ties": ties,
    "dare": dare,
    "dare_ties": dare_ties,
    "breadcrumbs": breadcrumbs,
    "tsv": tsv,
    "cart": cart,
    "iso": iso,
    "iso_cts": iso_cts,
    "lego": lego,
}

REFUSED: dict[tuple[str, str], str] = {
    ("iso_cts", "knots"): "the singular values of KnOTS undo the isotropy; use full",
    ("lego", "knots"): "it clusters the adapters' own factors; use full",
    ("lego", "core"): "it clusters the adapters' own factors; use full",
}
_ISOTROPIC = ("iso", "iso_cts")

__all__ = ["METHODS", "REFUSED", "SPACES", "Merge", "make", "merge_population"]


def make(method: str, space: str = "full", isotropize: bool = False, **hyperparameters: Any) -> Merge:
    """Build a merge method by name.

    Args:
        method: a key of ``METHODS`` (``-`` and ``_`` are the same).
        space: one of ``SPACES``.
        isotropize: make the merged delta isotropic afterwards (Iso-C after any method).
        hyperparameters: those of the method (see its factory); ``task_weights`` for all: each task's
            delta is multiplied by its weight before anything else (a weight of 0 is not pruning: the
            task still counts); ``seed`` for random methods.

    Raises:
        UserError: an unknown method, space, pair of them or hyperparameter, or a value out of range.
    """
    name = method.replace("-", "_")
    if name not in METHODS:
        raise UserError(f"unknown merge method {method!r}: {suggestion(name, METHODS)}")
    if space not in SPACES:
        raise UserError(f"unknown merge space {space!r}: {suggestion(space, SPACES)}")
    if (name, space) in REFUSED:
        raise UserError(f"{name} makes no sense in {space} space: {REFUSED[name, space]}")
    if isotropize and name in _ISOTROPIC:
        raise UserError(f"{name} is isotropic already: leave out isotropize")
    weights = hyperparameters.pop("task_weights", None)
    # random methods alone use the seed; others accept it, as run files set it for a whole run
    seed = check_seed(hyperparameters.pop("seed", 0))
    built = METHODS[name](space, **check(name, METHODS[name], hyperparameters))
    merge = lift(isotropized(built) if isotropize else built, seed)
    return merge if weights is None else _weighted(merge, weights)


def _weighted(merge: Merge, weights: Sequence[float]) -> Merge:
    """The method on adapters multiplied by their weights."""
    if isinstance(weights, str) or not all(isinstance(w, int | float) and math.isfinite(w) for w in weights):
        raise UserError(f"task_weights must be finite numbers, one a task, not {weights!r}")

    def prepare(stack: LoraStack) -> Any:
        if len(weights) != stack.n_tasks:
            raise UserError(f"task_weights: give one number a task, {stack.n_tasks}, not {len(weights)}")
        pairs = {}
        for name, pair in stack.pairs.items():
            factor = jnp.asarray(weights, pair.b.dtype)[:, None, None]
            pairs[name] = LoraPair(pair.a, pair.b * factor, pair.rank)
        return merge.prepare(LoraStack(pairs, stack.tasks))

    return Merge(prepare, merge.merge)
