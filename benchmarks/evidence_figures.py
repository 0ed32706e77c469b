"""The figures of benchmarks/evidence.py, as far as its rows suffice for them."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from evidence_columns import RUNGS
from evidence_report import Row, fitness_kinds, interval, over_plain
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#667085", "#4a7fc1", "#2a9d8f", "#d95f02", "#8e5ea2", "#b8860b", "#c0392b", "#e78ac3", "#34495e")


def figures(rows: list[Row], folder: Path) -> list[Path]:
    """Draw every figure that there are rows for: files by suite, merge method and number of examples."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    rows = [row for row in rows if "skipped" not in row]
    drawers: dict[str, Callable[[list[Row]], Figure | None]] = {
        "rungs": rungs, "strategies": strategies, "gap": gap, "pruned": pruned
    }  # fmt: skip
    for suite in dict.fromkeys(row["suite"] for row in rows):
        methods = dict.fromkeys(r["method"] for r in rows if r["suite"] == suite and r["method"] != "-")
        for method in methods:
            own = [r for r in rows if r["suite"] == suite and r["method"] in (method, "-")]
            parts = {"": own} | {
                f"-{n}": [r for r in own if r["examples"] == n] for n in {r["examples"] for r in own}
            }
            for name, draw in drawers.items():
                for which, part in parts.items():
                    figure = draw(part) if (name == "rungs") == (which == "") else None
                    if figure is not None:
                        figure.suptitle(f"{suite}, {method}", fontsize=9)
                        made.append(folder / f"{name}-{suite}-{method}{which}.png")
                        _save(figure, made[-1])
    return made


def rungs(rows: list[Row]) -> Figure | None:
    """Test accuracy against search examples a task, with labels and without."""
    if len({row["examples"] for row in rows if row["column"] == "plain"}) < 2:
        return None
    figure, axes = _panels(2)
    for ax, labels, title in zip(axes, ("", ", no labels"), ("with labels", "without labels"), strict=True):
        for colour, (column, name) in zip(COLOURS, RUNGS.items(), strict=False):
            found = _by(rows, column + labels, lambda row: row["examples"], lambda row: row["test"])
            _line(ax, found, name, colour)
        ax.set_xscale("log")
        sizes = sorted({row["examples"] for row in rows})
        ax.set_xticks(sizes, list(map(str, sizes)))
        ax.set_xticks([], minor=True)
        ax.set_title(title, fontsize=8)
        ax.set_xlabel("examples a task to search, as many to select", fontsize=8)
    axes[0].set_ylabel("mean normalised test accuracy", fontsize=8)
    axes[1].sharey(axes[0])
    axes[0].autoscale()
    names = axes[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return figure


def strategies(rows: list[Row]) -> Figure | None:
    """Test accuracy of the best so far against example-evaluations."""
    columns = sorted({row["column"] for row in rows if row["column"].startswith("strategy ")})
    if not columns:
        return None
    figure, (ax,) = _panels(1)
    for colour, column in zip(COLOURS, columns, strict=False):
        curves = [row["curve"] for row in rows if row["column"] == column and row.get("curve")]
        if not curves:
            continue
        costs = np.geomspace(max(c[0][0] for c in curves), max(c[-1][0] for c in curves), 20)
        # what was best at a cost stays until something better is found
        at = [
            [
                np.asarray(curve)[np.searchsorted([c for c, _ in curve], cost, "right") - 1, 1]
                for cost in costs
            ]
            for curve in curves
        ]
        ax.plot(costs, np.mean(at, axis=0), color=colour, label=column.removeprefix("strategy "))
    ax.set_xscale("log")
    ax.set_xlabel("example-evaluations", fontsize=8)
    ax.set_ylabel("mean normalised test accuracy", fontsize=8)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    return figure


def gap(rows: list[Row]) -> Figure | None:
    """How much of what a search gains on its own examples is lost on the test split, by fitness."""
    kinds = fitness_kinds(rows)
    if not kinds or not any(row["column"] == "plain" for row in rows):
        return None
    figure, axes = _panels(2)
    for ax, what in zip(axes, ("masks", "weights"), strict=True):
        for i, (split, colour) in enumerate((("search", "#b8bfca"), ("test", "#d95f02"))):
            gains = [over_plain(rows, f"{what} by {kind}", split) for kind in kinds]
            found = [interval(values) if values else (0.0, 0.0, 0.0) for values in gains]
            ax.barh(
                np.arange(len(kinds)) - 0.2 + 0.4 * i, [mean for mean, *_ in found], 0.4, color=colour,
                xerr=np.nan_to_num([deviation for _, deviation, _ in found]), label=f"{split} split",
                error_kw={"lw": 0.8, "capsize": 2, "ecolor": "#475467"},
            )  # fmt: skip
        ax.set_yticks(np.arange(len(kinds)), kinds)
        ax.invert_yaxis()
        ax.axvline(0, color="#667085", linewidth=0.8)
        ax.set_title(what, fontsize=8)
        ax.set_xlabel("gain over the plain merge, points ± deviation", fontsize=8)
    names = axes[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    return figure


def pruned(rows: list[Row]) -> Figure | None:
    """In how many of the seeds a module is pruned, [layer, task]."""
    masks = [np.asarray(row["keep"]) for row in rows if row["column"] == "ours, binary"]
    if len(masks) < 2:
        return None
    figure, (ax,) = _panels(1)
    share = np.mean([mask == 0 for mask in masks], axis=0)
    image = ax.imshow(share, vmin=0, vmax=1, cmap="Oranges", aspect="auto")
    ax.grid(visible=False)
    ax.set_xlabel("task")
    ax.set_ylabel("layer")
    figure.colorbar(image, ax=ax, label=f"share of {len(masks)} draws in which it is pruned")
    return figure


def _by(
    rows: Iterable[Row], column: str, x: Callable[[Row], Any], y: Callable[[Row], float]
) -> Iterator[tuple[Any, tuple[float, float, float]]]:
    found: dict[Any, list[float]] = defaultdict(list)
    for row in rows:
        if row["column"] == column:
            found[x(row)].append(y(row))
    for key in sorted(found):
        mean, deviation, half = interval(found[key])
        yield key, (mean, deviation, half if len(found[key]) > 2 else 0.0)  # two seeds: wider than any figure


def _line(ax: Axes, found: Iterator[tuple[Any, tuple[float, float, float]]], name: str, colour: str) -> None:
    points = list(found)
    if points:
        x, values = [p[0] for p in points], [p[1] for p in points]
        half = np.nan_to_num([v[2] for v in values])
        ax.errorbar(
            x, [v[0] for v in values], half, color=colour, label=name, marker="o", ms=3, lw=1.4, capsize=2
        )


def _panels(count: int, width: float = 4.2) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * count, 3.4), layout="constrained")
    axes = [figure.add_subplot(1, count, i + 1) for i in range(count)]
    for ax in axes:
        ax.tick_params(labelsize=7)
        ax.grid(axis="both", color="#e4e7ec", linewidth=0.8)
        ax.set_axisbelow(True)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    path.write_bytes(buffer.getvalue())
