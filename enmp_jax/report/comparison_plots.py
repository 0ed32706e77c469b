"""The pictures of ``enmp compare`` and ``enmp controls``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from enmp_jax.io.files import write_bytes
from enmp_jax.report.comparison import Result
from enmp_jax.report.plots import LIGHT, Theme, add_legend, new_axes, render
from enmp_jax.report.tables import mean_measure


def write_plot(run_dir: Path, name: str, result: Result) -> Path:
    """Draw ``plots/compare.png`` or ``plots/controls.png`` into a run directory."""
    path = run_dir / "plots" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, render({"compare": draw_comparison, "controls": draw_controls}[name], result))
    return path


def draw_comparison(result: Result, theme: Theme = LIGHT) -> Figure:
    """Draw the mean of every method in every space, and of what the searches found."""
    rows = list(reversed(result["rows"]))
    figure, axes = new_axes(8.0, 1.0 + 0.26 * len(rows), theme)
    y, plain = np.arange(len(rows)), [100 * row["mean_normalised"]["merged"] for row in rows]
    axes.barh(y, plain, 0.7, color=theme.merged, label="merged")
    found = [
        (i, 100 * row["mean_normalised"]["enmp"])
        for i, row in enumerate(rows)
        if "enmp" in row["mean_normalised"]
    ]
    if found:
        axes.plot(
            [x for _, x in found], [i for i, _ in found], "D", ms=5, color=theme.enmp, label="merged + ENMP"
        )
        add_legend(axes, theme, 2)
    axes.set_yticks(y, [f"{row['method']}, {row['space']}" for row in rows], fontsize=8.5)
    axes.grid(False, axis="y")
    axes.grid(axis="x", color=theme.grid, linewidth=0.8)
    axes.set_xlabel(f"{mean_measure(result)} on the test split, %", color=theme.ink)
    low = min([*plain, *(x for _, x in found)])
    axes.set_xlim(max(0.0, low - 5), None)
    return figure


def draw_controls(result: Result, theme: Theme = LIGHT) -> Figure:
    """Draw every row's difference to its plain merge, with the interval over examples."""
    rows = [row for row in reversed(result["rows"]) if row.get("gain") is not None]
    figure, axes = new_axes(8.0, 1.0 + 0.28 * len(rows), theme)
    for i, row in enumerate(rows):
        low, middle, high = (100 * row["gain"][key] for key in ("low", "difference", "high"))
        colour = theme.enmp if row["row"] == "found" else theme.merged
        axes.plot([low, high], [i, i], color=colour, lw=2)
        axes.plot([middle], [i], "o", ms=5, color=colour)
    axes.axvline(0, color=theme.muted, lw=1, ls=(0, (5, 3)))
    axes.set_yticks(range(len(rows)), [row["row"] for row in rows], fontsize=8.5)
    axes.grid(False, axis="y")
    axes.grid(axis="x", color=theme.grid, linewidth=0.8)
    axes.set_xlabel(
        f"{mean_measure(result)} on the test split: difference to the plain merge, points", color=theme.ink
    )
    return figure
