"""What a chart shows, as plain data: drawn for the screen by ``screen`` and for papers by ``paper``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

Role = Literal["base", "expert", "merged", "found", "refined", "random"]
"""What a mark stands for; each role has a colour and a shape of its own."""


class Mark(NamedTuple):
    """A value in a row of ``Dots``, with its interval if it has one."""

    role: Role
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Dots:
    """Named rows with marks on a common axis.

    Attributes:
        caption: what it shows.
        axis: what the values are.
        rows: name and marks of each.
        names: role -> its name in the legend.
        zero: a value that all others are compared with.
    """

    caption: str
    axis: str
    rows: tuple[tuple[str, tuple[Mark, ...]], ...]
    names: dict[Role, str]
    zero: float | None = None

    @property
    def limits(self) -> tuple[float, float]:
        """The ends of the axis."""
        marks = [mark for _, row in self.rows for mark in row]
        values = [x for m in marks for x in (m.value, m.low, m.high) if x is not None and math.isfinite(x)]
        return spread([*values, *([] if self.zero is None else [self.zero])])


@dataclass(frozen=True)
class Curve:
    """Points (x, y) of an ``Lines`` chart.

    Attributes:
        role: colour: a ``Role``, or ``run0``, ``run1``, ... of several runs.
        shape: ``line``, ``thin`` (one of several), ``cloud`` (single points), ``squares``, or ``rule`` (one y
            for all x).
        name: in the legend; empty for none.
    """

    role: str
    shape: Literal["line", "thin", "cloud", "squares", "rule"]
    name: str
    x: Float[np.ndarray, " point"]
    y: Float[np.ndarray, " point"]


@dataclass(frozen=True)
class Lines:
    """Curves over a common axis; values of y are shares, shown as per cent."""

    caption: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]

    @property
    def limits(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The ends of both axes."""
        x, y = (
            [float(v) for c in self.curves for v in getattr(c, axis) if math.isfinite(v)]
            for axis in ("x", "y")
        )
        return (min(x, default=0.0), max(max(x, default=1.0), min(x, default=0.0) + 1)), spread(y)


@dataclass(frozen=True)
class Heat:
    """A cell for each module, or for all projections of one task in a layer.

    Attributes:
        caption: what it shows.
        rows: task, and projection where each has a row of its own.
        values: weights in the merge, 0 pruned and 1 as it is, of several projections their mean.
        pruned: how many modules of a cell are gone.
        of: how many modules a cell stands for.
        weighted: whether weights are shown, or only what is gone.
    """

    caption: str
    rows: tuple[tuple[str, str], ...]
    values: Float[np.ndarray, "row layer"]
    pruned: Float[np.ndarray, "row layer"]
    of: int
    weighted: bool

    @property
    def gone(self) -> Bool[np.ndarray, "row layer"]:
        """Cells with nothing left."""
        return self.pruned == self.of

    def text(self, row: int, layer: int) -> str:
        """What stands in a cell, as colour is not enough: a cross, how many are gone, or a weight."""
        if self.gone[row, layer]:
            return "×"
        if self.weighted:
            shown = f"{self.values[row, layer]:.1f}"
            return "" if shown == "1.0" or self.values.shape[1] > 16 else shown
        return f"{self.pruned[row, layer]:.0f}" if self.pruned[row, layer] else ""

    def shade(self) -> Float[np.ndarray, "row layer"]:
        """-1 (gone) over 0 (as in the plain merge) to 1 (the largest weight, 2 at least)."""
        values = self.values if self.weighted else 1 - self.pruned / self.of
        above = max(1.0, float(np.nanmax(values)) - 1)
        return np.where(values < 1, values - 1, (values - 1) / above)


Chart = Dots | Lines | Heat


def spread(values: list[float]) -> tuple[float, float]:
    """Ends of an axis with a little room at both."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or max(0.05, 0.05 * abs(high))
    return low - room, high + room


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most so many round numbers within an axis."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * f for f in (1, 2, 5, 10) if power * f >= raw * 0.999)
    return [
        round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def short(value: float) -> str:
    """A number on an axis: 12k, 3.5M."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{unit}"
    return f"{value:.4g}"
