"""Merge methods. ``make("ties", space="full", density=0.2)`` builds one by name."""

from __future__ import annotations

from collections.abc import Callable

from enmp_jax.errors import UserError
from enmp_jax.merges.base import Merge
from enmp_jax.merges.sum import mean, sum_

METHODS: dict[str, Callable[..., Merge]] = {"sum": sum_, "mean": mean}
SPACES: tuple[str, ...] = ("full",)


def make(method: str, space: str = "full", **hyperparameters: float) -> Merge:
    """Build a merge method by name.

    Raises:
        UserError: an unknown method, space, pair of them, or hyperparameter.
    """
    if method not in METHODS:
        raise UserError(f"unknown merge method {method!r}: choose one of {', '.join(METHODS)}")
    return METHODS[method](**hyperparameters)
