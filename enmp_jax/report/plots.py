"""The pictures of a run: convergence, the mask, accuracies per task. Matplotlib, no display needed."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from enmp_jax.report.data import Generation, RunData


@dataclass(frozen=True)
class Theme:
    """Colours of a figure; the three series stay apart for the colour-blind and in grey."""

    background: str
    ink: str
    muted: str
    grid: str
    expert: str
    merged: str
    enmp: str
    kept: str


LIGHT = Theme("#ffffff", "#1f2430", "#667085", "#e4e7ec", "#b8bfca", "#4a7fc1", "#d95f02", "#eef1f5")
DARK = Theme("#161a22", "#e6e9ef", "#98a2b3", "#2c3340", "#667085", "#6ea3e6", "#ff9f4a", "#262d3a")


def render(draw: Callable[[RunData, Theme], Figure], data: RunData, theme: Theme = LIGHT) -> bytes:
    """A figure as PNG bytes."""
    figure = draw(data, theme)
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor=theme.background)
    return buffer.getvalue()


def _axes(width: float, height: float, theme: Theme) -> tuple[Figure, Axes]:
    # Figure, not pyplot: no global state, no window system
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor(theme.background)
    axes.tick_params(colors=theme.muted, labelcolor=theme.ink, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.muted)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(axes: Axes, theme: Theme, columns: int) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, frameon=False, fontsize=9,
        labelcolor=theme.ink, handlelength=1.6, columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip


def convergence(data: RunData, theme: Theme = LIGHT) -> Figure:
    """Fitness on the search split against masks evaluated: best so far and mean of each generation,
    with the plain merge as a line. Several seeds: one thin line each, and their mean."""
    figure, axes = _axes(8.0, 4.0, theme)
    seeds = list(data.by_seed().values())
    several = len(seeds) > 1
    for history in seeds:
        x = np.array([g.masks_evaluated for g in history])
        middle, low, high = _spread(history)
        axes.plot(
            x, [g.best for g in history], color=theme.enmp, lw=1 if several else 2.2,
            alpha=0.5 if several else 1, label=None if several else "best mask so far",
        )  # fmt: skip
        axes.plot(
            x, middle, color=theme.muted, lw=0.8 if several else 1.4, alpha=0.6 if several else 1,
            label="mean of a generation" if history is seeds[0] else None,
        )  # fmt: skip
        if not several:
            axes.fill_between(x, low, high, color=theme.muted, alpha=0.15, lw=0, label="worst to best")
    if several:
        shortest = min(map(len, seeds))
        x = [g.masks_evaluated for g in seeds[0][:shortest]]
        best = np.mean([[g.best for g in history[:shortest]] for history in seeds], axis=0)
        axes.plot(x, best, color=theme.enmp, lw=2.4, label=f"best mask so far, mean of {len(seeds)} seeds")
    if data.plain_fitness is not None:
        axes.axhline(data.plain_fitness, color=theme.merged, lw=1.8, ls=(0, (5, 3)), label="plain merge")
    axes.set_xlabel("masks evaluated (per seed)" if several else "masks evaluated", color=theme.ink)
    axes.set_ylabel(f"{data.fitness_label}\non the search split", color=theme.ink)
    if data.fitness_label.endswith("accuracy"):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.01)
    _legend(axes, theme, 4)
    return figure


def _spread(history: list[Generation]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = [g.fitness[np.isfinite(g.fitness)] for g in history]
    values = [(r.mean(), r.min(), r.max()) if len(r) else (np.nan,) * 3 for r in rows]
    middle, low, high = np.array(values).T
    return middle, low, high


def mask(data: RunData, theme: Theme = LIGHT) -> Figure:
    """Which modules were pruned: a cell per (layer, task), layers from left to right. With single
    projections, colour and number say how many of them are gone."""
    pruned, of = data.pruned_share()
    layers, tasks = pruned.shape
    longest = max(len(task) for task in data.mask["tasks"])
    cell = min(0.5, max(0.19, 6.4 / layers))
    figure, axes = _axes(max(4.5, layers * cell + 0.09 * longest + 1), max(2.2, tasks * 0.42 + 1.3), theme)
    colours = LinearSegmentedColormap.from_list("pruned", [theme.kept, theme.enmp])
    share = (pruned / of).T
    axes.pcolormesh(share, cmap=colours, vmin=0, vmax=1, edgecolors=theme.background, linewidth=2.5)
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.set_aspect("auto")
    axes.invert_yaxis()
    stride = 1 if layers <= 40 else 5
    axes.set_xticks(
        np.arange(0, layers, stride) + 0.5, [str(n) for n in range(0, layers, stride)], fontsize=9
    )
    counts = pruned.sum(axis=0)
    labels = [f"{task} ({n})" if n else task for task, n in zip(data.mask["tasks"], counts, strict=True)]
    axes.set_yticks(np.arange(tasks) + 0.5, labels, fontsize=9.5)
    axes.set_xlabel("layer", color=theme.ink)
    if data.mask["granularity"] == "projection":
        for (row, column), value in np.ndenumerate(pruned.T):
            if value:
                axes.text(column + 0.5, row + 0.5, str(value), ha="center", va="center", fontsize=8.5,
                          color=theme.background if share[row, column] > 0.45 else theme.ink)  # fmt: skip
    total = int(counts.sum())
    modules = data.scores.get("modules")
    of_all = f" of {modules}" if modules else ""
    title = f"{total}{of_all} module{'' if (modules or total) == 1 else 's'} pruned"
    axes.set_title(title, loc="left", fontsize=10, color=theme.ink, pad=8)
    return figure


def accuracies(data: RunData, theme: Theme = LIGHT) -> Figure:
    """Test accuracy of every task: its own expert, the plain merge, the merge without negative modules."""
    tasks = data.tasks
    figure, axes = _axes(max(6.0, 1.15 * len(tasks) + 1.5), 4.0, theme)
    x, width = np.arange(len(tasks)), 0.26
    columns = (("reference", "expert, not merged", theme.expert), ("merged", "merged", theme.merged),
               ("enmp", "merged + ENMP", theme.enmp))  # fmt: skip
    for i, (key, label, colour) in enumerate(columns):
        values = [100 * data.scores[key][task] for task in tasks]
        bars = axes.bar(x + (i - 1) * width, values, width * 0.92, color=colour, label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize=7.5, color=theme.muted, padding=1.5)
    crowded = max(map(len, tasks)) > 11
    axes.set_xticks(x, tasks, rotation=25 if crowded else 0, ha="right" if crowded else "center",
                    rotation_mode="anchor")  # fmt: skip
    axes.set_ylabel(f"accuracy on the {data.scores.get('split', 'test')} split, %", color=theme.ink)
    axes.set_ylim(0, 105)
    axes.set_yticks(range(0, 101, 20))
    axes.margins(x=0.02)
    _legend(axes, theme, 3)
    return figure


PLOTS: dict[str, Callable[[RunData, Theme], Figure]] = {
    "convergence": convergence,
    "mask": mask,
    "accuracies": accuracies,
}
