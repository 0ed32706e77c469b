"""Names and ranges of the hyperparameters of merge methods."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from enmp_jax.errors import UserError

# name -> (lowest, highest, whether the lowest and the highest are allowed)
_RANGES: Mapping[str, tuple[float, float, bool, bool]] = {
    "density": (0, 1, False, True),
    "gamma": (0, 1, True, False),
    "drop_rate": (0, 1, True, False),
    "rank_fraction": (0, 1, False, True),
    "coefficient": (-math.inf, math.inf, False, False),
    "common_fraction": (0, 1, True, True),
    "clusters": (1, 1_000_000, True, True),
    "seed": (0, 2**32 - 1, True, True),
}
_WHOLE = ("clusters", "seed")


def nearest(kind: str, name: str, known: Collection[str]) -> str:
    """The message for an unknown name, with the nearest right one."""
    near = difflib.get_close_matches(name.replace("-", "_").lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"
    return f"unknown {kind} {name!r}: {hint}"


def names(factory: Callable[..., Any]) -> tuple[str, ...]:
    """The hyperparameters of a method."""
    return tuple(name for name in inspect.signature(factory).parameters if name != "space")


def check(method: str, factory: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the hyperparameters given for a method; returns them, whole numbers as int.

    Raises:
        UserError: one that the method does not have, or a value that is no number or out of range.
    """
    known, checked = names(factory), {}
    for name, value in given.items():
        if name not in known:
            if not known:
                raise UserError(f"{method} has no hyperparameters: leave out {name!r}")
            raise UserError(f"merge method {method!r}: {nearest('hyperparameter', name, known)}")
        checked[name] = check_range(name, value)
    return checked


def check_range(name: str, value: Any) -> float | int:
    """Check one hyperparameter's value.

    Raises:
        UserError: no number, not whole where it must be, or out of range.
    """
    low, high, with_low, with_high = _RANGES[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name} must be a number, not {value!r}")
    if name in _WHOLE and value != int(value):
        raise UserError(f"{name} must be a whole number, not {value!r}")
    inside = (low <= value if with_low else low < value) and (value <= high if with_high else value < high)
    if not inside:
        lower, upper = "from" if with_low else "above", "to" if with_high else "and below"
        range_of = "finite" if high == math.inf else f"{lower} {low:g} {upper} {high:g}"
        raise UserError(f"{name} is {value!r}: it must be {range_of}")
    return int(value) if name in _WHOLE else value
