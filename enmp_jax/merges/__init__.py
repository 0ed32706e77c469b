"""Merge methods. ``make("ties", space="full", density=0.2)`` builds one by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from enmp_jax.errors import UserError
from enmp_jax.merges.base import LayerMethod, Merge, lift, merge_population
from enmp_jax.merges.iso import isotropized
from enmp_jax.merges.sum import mean, sum_
from enmp_jax.merges.ties import ties

METHODS: dict[str, Callable[..., LayerMethod]] = {"sum": sum_, "mean": mean, "ties": ties}
SPACES: tuple[str, ...] = ("full",)

__all__ = ["METHODS", "SPACES", "Merge", "make", "merge_population"]


def make(method: str, space: str = "full", isotropize: bool = False, **hyperparameters: Any) -> Merge:
    """Build a merge method by name.

    Raises:
        UserError: an unknown method, space, pair of them, or hyperparameter.
    """
    if method not in METHODS:
        raise UserError(f"unknown merge method {method!r}: choose one of {', '.join(METHODS)}")
    if space not in SPACES:
        raise UserError(f"unknown merge space {space!r}: choose one of {', '.join(SPACES)}")
    built = METHODS[method](space, **hyperparameters)
    return lift(isotropized(built) if isotropize else built)
