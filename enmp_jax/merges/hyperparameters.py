"""Hyperparameters of merge methods, read off the signatures and docstrings of their factories.

A factory says all there is to know: ``density: Annotated[float, Range(0, 1, low_open=True)] = 0.2`` gives
type, range and default, the ``Args`` section of its docstring the help. Whatever checks, lists or
offers hyperparameters (``make``, run files, ``enmp merge --help``) asks here.
"""

from __future__ import annotations

import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from enmp_jax.errors import UserError, suggestion


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, an open end left out."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        """Whether a finite number lies in the range."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        """In words: ``above 0 to 1``."""
        low, high = "above" if self.low_open else "from", "and below" if self.high_open else "to"
        if math.isinf(self.high):
            return "finite" if math.isinf(self.low) else f"{low} {self.low:.9g}"
        return f"{low} {self.low:.9g} {high} {self.high:.9g}"


Share = Annotated[float, Range(0, 1)]
"""None (0) to all (1)."""
PositiveShare = Annotated[float, Range(0, 1, low_open=True)]
"""More than none, to all."""
ProperShare = Annotated[float, Range(0, 1, high_open=True)]
"""None to not quite all."""
Seed = Annotated[int, Range(0, 2**32 - 1)]

# what `make` and the merge section of a run file take for every method: near misses are named
GENERAL = (
    "scale",
    "scale_grid",
    "space",
    "isotropize",
    "seed",
    "task_weights",
    "layer_scaling",
    "statistics",
)


@dataclass(frozen=True)
class Hyperparameter:
    """One hyperparameter of one method.

    Attributes:
        name: as in the factory's signature.
        type: float, int, or a ``Literal`` of strings.
        range: of numbers.
        default: None where the method finds its own.
        help: from the factory's docstring.
    """

    name: str
    type: Any
    range: Range
    default: Any
    help: str

    def check(self, value: Any) -> Any:
        """The value, whole numbers as int.

        Raises:
            UserError: of another type, or out of range.
        """
        if typing.get_origin(self.type) is Literal:
            choices = typing.get_args(self.type)
            if value not in choices:
                raise UserError(f"{self.name} must be one of {', '.join(choices)}, not {value!r}")
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{self.name} must be a number, not {value!r}")
        if value not in self.range:
            raise UserError(f"{self.name} is {value!r}: it must be {self.range}")
        if self.type is int and value != int(value):
            raise UserError(f"{self.name} must be a whole number, not {value!r}")
        return int(value) if self.type is int else value

    def domain(self) -> str:
        """What values it takes, in words."""
        if typing.get_origin(self.type) is Literal:
            return " or ".join(typing.get_args(self.type))
        return str(self.range)


def hyperparameters(factory: Callable[..., Any]) -> dict[str, Hyperparameter]:
    """Those of a method by name: every parameter of its factory but ``space``.

    Raises:
        TypeError: a parameter that is not annotated as a number or a ``Literal`` of strings, or has no
            default or no line in the docstring (a fault of the factory, not of its user).
    """
    hints = typing.get_type_hints(factory, include_extras=True)
    lines, found = _documented(factory), {}
    for name, parameter in inspect.signature(factory).parameters.items():
        if name == "space":
            continue
        kind, limits = _unwrapped(hints.get(name))
        if kind not in (int, float) and typing.get_origin(kind) is not Literal:
            raise TypeError(f"{factory.__name__}: annotate {name} as float, int or a Literal of strings")
        if parameter.default is inspect.Parameter.empty or name not in lines:
            raise TypeError(f"{factory.__name__}: {name} needs a default and a line under Args")
        found[name] = Hyperparameter(name, kind, limits, parameter.default, lines[name])
    return found


def check(method: str, factory: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the hyperparameters given for a method; returns them, whole numbers as int.

    Raises:
        UserError: one that the method does not have, or a value of another type or out of range.
    """
    known, checked = hyperparameters(factory), {}
    for name, value in given.items():
        if name not in known:
            hint = suggestion(name, [*known, *GENERAL], "it takes")
            raise UserError(f"merge method {method!r} has no hyperparameter {name!r}: {hint}")
        checked[name] = known[name].check(value)
    return checked


def check_seed(value: Any) -> int:
    """Check the seed, which ``make`` takes for every method.

    Raises:
        UserError: no whole number, or out of range.
    """
    kind, limits = _unwrapped(Seed)
    return Hyperparameter("seed", kind, limits, 0, "").check(value)


def _unwrapped(hint: Any) -> tuple[Any, Range]:
    """Type and range of an annotation; ``None`` beside them (the method finds its own) left out."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (option for option in typing.get_args(hint) if option is not types.NoneType)
    if typing.get_origin(hint) is not Annotated:
        return hint, Range()
    kind, *extras = typing.get_args(hint)
    return kind, next((extra for extra in extras if isinstance(extra, Range)), Range())


def _documented(factory: Callable[..., Any]) -> dict[str, str]:
    """Parameter -> its text in the ``Args`` section of the docstring, on one line."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", inspect.getdoc(factory) or "", re.MULTILINE)
    entries = re.split(r"^ {4}(\w+): ", section[1], flags=re.MULTILINE)[1:] if section else []
    return {name: " ".join(text.split()) for name, text in zip(entries[::2], entries[1::2], strict=True)}
