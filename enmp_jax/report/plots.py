"""The pictures of a run: convergence, the mask or weights, accuracies. Matplotlib, no display needed."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from enmp_jax.errors import UserError
from enmp_jax.report.data import Generation, RunData
from enmp_jax.report.limits import as_label
from enmp_jax.report.tables import measure

T = TypeVar("T")


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


def render(draw: Callable[[T, Theme], Figure], data: T, theme: Theme = LIGHT) -> bytes:
    """A figure of some data as PNG bytes."""
    figure = draw(data, theme)
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor=theme.background)
    return buffer.getvalue()


def new_axes(width: float, height: float, theme: Theme) -> tuple[Figure, Axes]:
    """An empty figure, in inches."""
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


def add_legend(axes: Axes, theme: Theme, columns: int) -> None:
    """What the series are, above the axes."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, frameon=False, fontsize=9,
        labelcolor=theme.ink, handlelength=1.6, columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip


def convergence(data: RunData, theme: Theme = LIGHT) -> Figure:
    """Draw fitness against what was evaluated, or against the steps of a gradient search."""
    figure, axes = new_axes(8.0, 4.0, theme)
    seeds = list(data.by_seed().values())
    several, (x_name, x_label) = len(seeds) > 1, _progress(data)
    gradient = x_name == "step"
    point, mean = ("point", "each step") if gradient else ("mask", "mean of a generation")
    for history in seeds:
        x = np.array([getattr(g, x_name) for g in history], float)
        middle, low, high = _spread(history)
        axes.plot(
            x, [g.best for g in history], color=theme.enmp, lw=1 if several else 2.2,
            alpha=0.5 if several else 1, label=None if several else f"best {point} so far",
        )  # fmt: skip
        axes.plot(
            x, middle, color=theme.muted, lw=0.8 if several else 1.4, alpha=0.6 if several else 1,
            label=mean if history is seeds[0] else None,
        )  # fmt: skip
        selection = np.array([g.selection for g in history])
        if np.isfinite(selection).any():
            axes.plot(
                x, selection, ls="none", marker="o", ms=3.5, color=theme.expert,
                label="selection split" if history is seeds[0] else None,
            )  # fmt: skip
        if not (several or gradient):
            axes.fill_between(x, low, high, color=theme.muted, alpha=0.15, lw=0, label="worst to best")
    if several:
        shortest = min(map(len, seeds))
        x = [getattr(g, x_name) for g in seeds[0][:shortest]]
        best = np.mean([[g.best for g in history[:shortest]] for history in seeds], axis=0)
        axes.plot(x, best, color=theme.enmp, lw=2.4, label=f"best {point} so far, mean of {len(seeds)} seeds")
    if data.plain_fitness is not None:
        axes.axhline(data.plain_fitness, color=theme.merged, lw=1.8, ls=(0, (5, 3)), label="plain merge")
    axes.set_xlabel(f"{x_label} (per seed)" if several else x_label, color=theme.ink)
    axes.set_ylabel(f"{as_label(data.fitness_label)}\non the search split, % of the experts", color=theme.ink)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.01)
    add_legend(axes, theme, 4)
    return figure


def _progress(data: RunData) -> tuple[str, str]:
    """What all lines of the history count: the field of ``Generation`` and how to call it."""
    masks = ("masks_evaluated", "masks evaluated")
    if not data.history:
        return masks
    for name, label in (("step", "steps"), masks, ("example_evaluations", "example evaluations")):
        if all(getattr(generation, name) is not None for generation in data.history):
            return name, label
    raise UserError("history.jsonl mixes searches that count different things")


def _spread(history: list[Generation]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = [g.fitness[np.isfinite(g.fitness)] for g in history]
    values = [(r.mean(), r.min(), r.max()) if len(r) else (np.nan,) * 3 for r in rows]
    middle, low, high = np.array(values).T
    return middle, low, high


def _cells(values: np.ndarray, names: list[str], theme: Theme, scale: bool = False, **colours: Any) -> Axes:
    """A coloured cell for each of ``values [layer, row]``, layers from left to right."""
    layers, rows = values.shape
    cell = min(0.5, max(0.19, 6.4 / layers))
    width = layers * cell + 0.09 * max(len(as_label(name)) for name in names) + 1
    figure, axes = new_axes(max(4.5, width), max(2.2, rows * 0.42 + 1.3), theme)
    cells = axes.pcolormesh(values.T, edgecolors=theme.background, linewidth=2.5, **colours)
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.set_aspect("auto")
    axes.invert_yaxis()
    ticks = range(0, layers, 1 if layers <= 40 else 5)
    axes.set_xticks([n + 0.5 for n in ticks], [str(n) for n in ticks], fontsize=9)
    axes.set_yticks(np.arange(rows) + 0.5, list(map(as_label, names)), fontsize=9.5)
    axes.set_xlabel("layer", color=theme.ink)
    if scale:
        bar = figure.colorbar(cells, ax=axes, pad=0.02, aspect=12, spacing="proportional")
        bar.ax.tick_params(colors=theme.muted, labelcolor=theme.ink, length=0, labelsize=9)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return axes


def _in_cells(axes: Axes, values: np.ndarray, text: str, dark: np.ndarray, theme: Theme) -> None:
    """Write the values that are not zero into their cells; ``dark`` where the ink must be light."""
    for (layer, row), value in np.ndenumerate(values):
        if value:
            axes.text(layer + 0.5, row + 0.5, format(value, text), ha="center", va="center", fontsize=8.5,
                      color=theme.background if dark[layer, row] else theme.ink)  # fmt: skip


def _pruned_title(data: RunData) -> str:
    total, modules = len(data.mask["pruned"]), data.scores.get("modules")
    of_all = f" of {modules}" if modules else ""
    return f"{total}{of_all} module{'' if (modules or total) == 1 else 's'} pruned"


def mask(data: RunData, theme: Theme = LIGHT) -> Figure:
    """Draw which modules were pruned."""
    pruned, of = data.pruned_share()
    counts = pruned.sum(axis=0)
    names = [f"{task} ({n})" if n else task for task, n in zip(data.mask["tasks"], counts, strict=True)]
    colours = LinearSegmentedColormap.from_list("pruned", [theme.kept, theme.enmp])
    share = pruned / of
    axes = _cells(share, names, theme, cmap=colours, vmin=0, vmax=1)
    if data.mask["granularity"] == "projection":
        _in_cells(axes, pruned, "d", share > 0.45, theme)
    axes.set_title(_pruned_title(data), loc="left", fontsize=10, color=theme.ink, pad=8)
    return axes.get_figure()  # type: ignore[return-value]


def weights(data: RunData, theme: Theme = LIGHT) -> Figure:
    """Draw the weight that each module has in the merge; cells with nothing left have a cross."""
    values = data.weights()
    pruned, of = data.pruned_share()
    colours = LinearSegmentedColormap.from_list("weights", [theme.enmp, theme.kept, theme.merged])
    norm = TwoSlopeNorm(1.0, 0.0, max(2.0, float(values.max())))
    axes = _cells(values, list(data.mask["tasks"]), theme, scale=True, cmap=colours, norm=norm)
    for layer, row in np.argwhere(pruned == of):
        axes.text(layer + 0.5, row + 0.5, "×", ha="center", va="center", fontsize=11, color=theme.background)
    if len(values) <= 16:  # more layers make cells too narrow for figures
        _in_cells(axes, values, ".1f", np.abs(norm(values) - 0.5) > 0.25, theme)
    title = f"weights from {values.min():.2g} to {values.max():.2g}; {_pruned_title(data)}"
    axes.set_title(title, loc="left", fontsize=10, color=theme.ink, pad=8)
    return axes.get_figure()  # type: ignore[return-value]


def accuracies(data: RunData, theme: Theme = LIGHT) -> Figure:
    """Draw the accuracy (or agreement) of every task under its expert and both merges."""
    tasks = data.tasks
    figure, axes = new_axes(max(6.0, 1.15 * len(tasks) + 1.5), 4.0, theme)
    x, width = np.arange(len(tasks)), 0.26
    columns = (("reference", "expert, not merged", theme.expert), ("merged", "merged", theme.merged),
               ("enmp", "merged + ENMP", theme.enmp))  # fmt: skip
    for i, (key, label, colour) in enumerate(columns):
        values = [100 * data.scores[key][task] for task in tasks]
        bars = axes.bar(x + (i - 1) * width, values, width * 0.92, color=colour, label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize=7.5, color=theme.muted, padding=1.5)
    crowded = max(len(as_label(task)) for task in tasks) > 11
    axes.set_xticks(
        x, list(map(as_label, tasks)), rotation=25 if crowded else 0, ha="right" if crowded else "center",
        rotation_mode="anchor",
    )  # fmt: skip
    split = data.scores.get("split", "test")
    axes.set_ylabel(f"{measure(data.scores)} on the {as_label(split)} split, %", color=theme.ink)
    axes.set_ylim(0, 105)
    axes.set_yticks(range(0, 101, 20))
    axes.margins(x=0.02)
    add_legend(axes, theme, 3)
    return figure


class Plot(NamedTuple):
    """A picture and what is written under it."""

    draw: Callable[[RunData, Theme], Figure]
    caption: str


_ACCURACIES = Plot(
    accuracies,
    "Every task on the test split: its own expert, the plain merge, the merge that the search chose.",
)
_CONVERGENCE = Plot(
    convergence,
    "Fitness on the search split against masks evaluated: best so far and mean of each generation, with the "
    "plain merge as a line. 100 % is as good as the tasks' own experts. Several seeds: one thin line each, "
    "and their mean.",
)
_STEPS = Plot(
    convergence,
    "Fitness on the search split at each step of the gradient search, and on the selection split where it "
    "looked, with the plain merge as a line. 100 % is as good as the tasks' own experts. Several seeds: one "
    "thin line each, and their mean.",
)
_MASK = Plot(
    mask,
    "Which modules were pruned: a cell per (layer, task), layers from left to right. With single "
    "projections, colour and number say how many of them are gone.",
)
_WEIGHTS = Plot(
    weights,
    "The weight of each module in the merge: a cell per (layer, task), layers from left to right; 1 is "
    "as in the plain merge, a cross pruned (weight 0). With single projections, their mean.",
)


def plots_of(data: RunData) -> dict[str, Plot]:
    """The pictures that a run has, by name."""
    modules = {"weights": _WEIGHTS} if data.has_weights else {"mask": _MASK}
    search = _STEPS if _progress(data)[0] == "step" else _CONVERGENCE
    return {"convergence": search, **modules, "accuracies": _ACCURACIES}
