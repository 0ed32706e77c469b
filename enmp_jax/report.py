"""The end of a run for people: plots, a self-contained HTML report, and the tables of the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from enmp_jax.files import write_bytes
from enmp_jax.report_data import read

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = {"base": "base", "reference": "expert", "merged": "merged", "enmp": "merged + ENMP"}


def write_plots(run_dir: Path) -> list[Path]:
    """Draw ``plots/*.png`` of a finished run directory.

    Raises:
        UserError: a file of the run is missing or damaged.
    """
    from enmp_jax.report_plots import PLOTS, render

    data, folder = read(run_dir), Path(run_dir) / "plots"
    images = {folder / f"{name}.png": render(draw, data) for name, draw in PLOTS.items()}
    folder.mkdir(exist_ok=True)
    for path, image in images.items():
        write_bytes(path, image)
    return list(images)


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` of a finished run directory: one file, nothing loaded from elsewhere.

    Raises:
        UserError: a file of the run is missing or damaged.
    """
    from enmp_jax.report_page import page

    path = Path(run_dir) / "report.html"
    write_bytes(path, page(read(run_dir)).encode())
    return path


# Tables: the same rows for terminal and page ------------------------------------------------------


def score_rows(scores: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of accuracies: a row per task and the mean.

    Takes the content of ``scores.json``, or of an evaluation that lacks some columns. Accuracies in
    per cent; in brackets normalised by the task's own expert.
    """
    present = [key for key in COLUMNS if key in scores]
    change = "merged" in present and "enmp" in present
    header = ["task", *(COLUMNS[key] for key in present), *(["change"] if change else [])]
    rows = []
    for task in scores["tasks"]:
        reference = scores["reference"][task]
        row = [str(task)]
        for key in present:
            accuracy = scores[key][task]
            row.append(
                percent(accuracy) + (_bracket(accuracy, reference) if key in ("merged", "enmp") else "")
            )
        if change:
            row.append(points(scores["enmp"][task] - scores["merged"][task]))
        rows.append(row)
    mean = ["mean"]
    for key in present:
        values = [scores[key][task] for task in scores["tasks"]]
        normalised = scores.get("mean_normalised", {}).get(key)
        mean.append(
            percent(sum(values) / len(values)) + ("" if normalised is None else f" ({percent(normalised)})")
        )
    if change:
        gap = [scores["enmp"][t] - scores["merged"][t] for t in scores["tasks"]]
        mean.append(points(sum(gap) / len(gap)))
    return header, [*rows, mean]


def final_table(scores: Mapping[str, Any]) -> Table:
    """The table of accuracies for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    header, rows = score_rows(scores)
    title = f"accuracy on the {scores.get('split', 'test')} split, % (normalised by the expert)"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows[:-1]:
        table.add_row(*(Text(cell) for cell in row))
    table.add_section()
    table.add_row(*(Text(cell, style="bold") for cell in rows[-1]))
    return table


def verdict(scores: Mapping[str, Any]) -> str:
    """One sentence: what pruning did on data that the search never saw."""
    before, after = scores["mean_normalised"]["merged"], scores["mean_normalised"]["enmp"]
    count, total = len(scores["pruned"]), scores.get("modules")
    head = f"{count}{f' of {total}' if total else ''} module{'' if (total or count) == 1 else 's'} pruned"
    if not count:
        return f"{head}: no mask beat the plain merge ({percent(before)} % mean normalised accuracy)."
    return (
        f"{head}: mean normalised accuracy on the {scores.get('split', 'test')} split goes from "
        f"{percent(before)} % to {percent(after)} % ({points(after - before)} points)."
    )


def seed_sentence(scores: Mapping[str, Any]) -> str | None:
    """Mean and standard deviation of the gain over several searches; None for a single one."""
    gain, seeds = scores.get("gain") or {}, scores.get("seeds") or []
    if len(seeds) < 2 or gain.get("std") is None:
        return None
    return f"over {len(seeds)} seeds the gain is {points(gain['mean'])} ± {100 * gain['std']:.1f} points"


def pruned_lines(scores: Mapping[str, Any]) -> list[str]:
    """The pruned modules by task: ``dtd: layers 0, 3 (q_proj)``."""
    places: dict[str, dict[int, list[str]]] = {}
    for layer, *middle, task in scores.get("pruned") or []:
        names = places.setdefault(str(task), {}).setdefault(layer, [])
        names += [name.rsplit(".", 1)[-1] for name in middle]
    lines = []
    for task in scores["tasks"]:
        layers = places.get(task, {})
        named = [f"{layer} ({', '.join(names)})" if names else str(layer) for layer, names in layers.items()]
        if named:
            lines.append(f"{task}: layer{'s' if len(named) > 1 else ''} {', '.join(named)}")
    return lines


def print_scores(scores: Mapping[str, Any]) -> None:
    """Print what a search found, on standard output."""
    console = _console()
    console.print()
    console.print(final_table(scores))
    console.print(verdict(scores), style="bold")
    sentence = seed_sentence(scores)
    if sentence:
        console.print(f"{sentence[0].upper()}{sentence[1:]}.")
    for line in pruned_lines(scores):
        console.print(f"  pruned  {line}", markup=False)
    cost = f"{scores['masks_evaluated']} masks evaluated" if "masks_evaluated" in scores else ""
    if scores.get("distinct_masks") is not None:
        cost += f", {scores['distinct_masks']} of them distinct"
    if scores.get("masks_per_second"):
        cost += f", {scores['masks_per_second']:.1f} masks per second"
    if cost:
        console.print(cost)


def print_evaluation(result: Mapping[str, Any]) -> None:
    """Print the result of ``enmp evaluate``, on standard output."""
    console = _console()
    console.print(final_table(result))
    if "enmp" in result:
        console.print(verdict(result), style="bold")
    for line in pruned_lines(result):
        console.print(f"  pruned  {line}", markup=False)


def _console() -> Any:
    from rich.console import Console

    console = Console(highlight=False)
    # a pipe or a log has no width: do not cut tables at 80 columns there
    return console if console.is_terminal else Console(highlight=False, width=160)


def percent(value: float) -> str:
    """A share as per cent, a dash for NaN."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def points(value: float) -> str:
    """A difference of shares as signed percentage points."""
    return f"{100 * value:+.1f}"


def _bracket(accuracy: float, reference: float) -> str:
    return f" ({100 * accuracy / reference:.1f})" if reference else ""
