"""Charts for papers: PNG and SVG files, drawn by matplotlib; no display needed."""

from __future__ import annotations

import io

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from enmp_jax.report.charts import Chart, Dots, Heat, Lines, short
from enmp_jax.report.limits import cut

INK, MUTED, GRID = "#1c1b19", "#6b6862", "#e3e0d9"
COLOURS = {"base": "#b3afa6", "random": "#8d8980", "merged": "#4c5a67", "found": "#c2410c",
           "refined": "#c2410c", "expert": "#1c1b19"}  # fmt: skip
MARKERS = {"expert": "|", "refined": "D", "base": "."}
SHADES = LinearSegmentedColormap.from_list("weights", ["#c2410c", "#f0eee9", "#1f5f99"])


def files(chart: Chart) -> dict[str, bytes]:
    """A chart as ``png`` and ``svg``, whose text stays text; the same bytes for the same chart."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "enmp"}):
        figure = draw(chart)
        FigureCanvasAgg(figure)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=160)
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return {"png": png.getvalue(), "svg": svg.getvalue()}


def draw(chart: Chart) -> Figure:
    """A chart as a figure."""
    if isinstance(chart, Dots):
        return _dots(chart)
    return _lines(chart) if isinstance(chart, Lines) else _heat(chart)


def label(name: object) -> str:
    """A name that is no formula: matplotlib's begin with a dollar sign."""
    return cut(name).replace("$", r"\$")


def _axes(width: float, height: float, grid: str) -> tuple[Figure, Axes]:
    """An empty figure, in inches."""
    # Figure, not pyplot: no global state, no window system
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.tick_params(colors=MUTED, labelcolor=INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(MUTED)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    return figure, axes


def _legend(figure: Figure) -> None:
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9, labelcolor=INK)


def _dots(chart: Dots) -> Figure:
    figure, axes = _axes(8.0, 1.0 + 0.3 * len(chart.rows), "x")
    seen = set()
    for i, (_, marks) in enumerate(chart.rows):
        for mark in marks:
            colour = COLOURS[mark.role]
            if mark.low is not None and mark.high is not None:
                axes.plot([mark.low, mark.high], [i, i], color=colour, lw=2)
            hollow = mark.role == "merged"
            axes.plot(
                [mark.value], [i], ls="none", marker=MARKERS.get(mark.role, "o"), color=colour, ms=7, mew=1.6,
                markerfacecolor="white" if hollow else colour,
                label=None if mark.role in seen else label(chart.names.get(mark.role, mark.role)),
            )  # fmt: skip
            seen.add(mark.role)
    if chart.zero is not None:
        axes.axvline(chart.zero, color=MUTED, lw=1, ls=(0, (5, 3)))
    axes.set_yticks(range(len(chart.rows)), [label(name) for name, _ in chart.rows], fontsize=9)
    axes.set_ylim(len(chart.rows) - 0.5, -0.5)
    axes.set_xlim(*chart.limits)
    axes.set_xlabel(label(chart.axis), color=INK)
    _legend(figure)
    return figure


def _lines(chart: Lines) -> Figure:
    figure, axes = _axes(8.0, 4.0, "y")
    for curve in chart.curves:
        colour, name = COLOURS[curve.role], label(curve.name) if curve.name else None
        if curve.shape == "rule":
            axes.axhline(float(curve.y[0]), color=colour, lw=1.6, ls=(0, (5, 3)), label=name)
        elif curve.shape in ("cloud", "squares"):
            cloud = curve.shape == "cloud"
            axes.plot(
                curve.x, curve.y, ls="none", marker="." if cloud else "s", ms=3 if cloud else 4.5,
                color=colour, alpha=0.35 if cloud else 1, label=name, mew=0,
            )  # fmt: skip
        else:
            axes.plot(curve.x, curve.y, color=colour, lw=2.2 if curve.shape == "line" else 1.2, label=name)
    (left, right), (low, high) = chart.limits
    room = 0.02 * (right - left)
    axes.set_xlim(left - room, right + room)
    axes.set_ylim(low, high)
    axes.set_xlabel(label(chart.x_label), color=INK)
    axes.set_ylabel("\n".join(map(label, chart.y_label.split(", "))), color=INK)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.4g}"))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    if chart.curves:
        _legend(figure)
    return figure


def _heat(chart: Heat) -> Figure:
    rows, layers = chart.values.shape
    names = [label(f"{task} {projection}".strip()) for task, projection in chart.rows]
    cell = min(0.5, max(0.19, 6.4 / layers))
    width = layers * cell + 0.09 * max(map(len, names)) + 1
    figure, axes = _axes(max(4.5, width), max(2.2, rows * (0.42 if rows < 20 else 0.24) + 1.1), "y")
    axes.pcolormesh(chart.shade(), edgecolors="white", linewidth=2, cmap=SHADES, vmin=-1, vmax=1)
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.invert_yaxis()
    ticks = range(0, layers, 1 if layers <= 40 else 5)
    axes.set_xticks([n + 0.5 for n in ticks], [str(n) for n in ticks], fontsize=9)
    axes.set_yticks(np.arange(rows) + 0.5, names, fontsize=9)
    axes.set_xlabel("layer", color=INK)
    dark = np.abs(chart.shade()) > 0.6
    for row, layer in np.ndindex(rows, layers):
        if text := chart.text(row, layer):
            axes.text(layer + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8,
                      color="white" if dark[row, layer] else INK)  # fmt: skip
    gone = int(chart.pruned.sum())
    title = f"{gone} module{'' if gone == 1 else 's'} left out"
    if chart.weighted:
        title = f"weights from {np.nanmin(chart.values):.2g} to {np.nanmax(chart.values):.2g}; {title}"
    axes.set_title(title, loc="left", fontsize=10, color=INK, pad=8)
    return figure
