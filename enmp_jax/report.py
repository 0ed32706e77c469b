"""The end of a run for people: plots, a self-contained HTML report, and the tables of the terminal."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from enmp_jax.report_data import RunData, read

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
        _write(path, image)
    return list(images)


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` of a finished run directory: one file, nothing loaded from elsewhere.

    Raises:
        UserError: a file of the run is missing or damaged.
    """
    path = Path(run_dir) / "report.html"
    _write(path, _page(read(run_dir)).encode())
    return path


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


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
                _percent(accuracy) + (_bracket(accuracy, reference) if key in ("merged", "enmp") else "")
            )
        if change:
            row.append(_points(scores["enmp"][task] - scores["merged"][task]))
        rows.append(row)
    mean = ["mean"]
    for key in present:
        values = [scores[key][task] for task in scores["tasks"]]
        normalised = scores.get("mean_normalised", {}).get(key)
        mean.append(
            _percent(sum(values) / len(values)) + ("" if normalised is None else f" ({_percent(normalised)})")
        )
    if change:
        gap = [scores["enmp"][t] - scores["merged"][t] for t in scores["tasks"]]
        mean.append(_points(sum(gap) / len(gap)))
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
        return f"{head}: no mask beat the plain merge ({_percent(before)} % mean normalised accuracy)."
    return (
        f"{head}: mean normalised accuracy on the {scores.get('split', 'test')} split goes from "
        f"{_percent(before)} % to {_percent(after)} % ({_points(after - before)} points)."
    )


def seed_sentence(scores: Mapping[str, Any]) -> str | None:
    """Mean and standard deviation of the gain over several searches; None for a single one."""
    gain, seeds = scores.get("gain") or {}, scores.get("seeds") or []
    if len(seeds) < 2 or gain.get("std") is None:
        return None
    return f"over {len(seeds)} seeds the gain is {_points(gain['mean'])} ± {100 * gain['std']:.1f} points"


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


def _percent(value: float) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _bracket(accuracy: float, reference: float) -> str:
    return f" ({100 * accuracy / reference:.1f})" if reference else ""


# Page ---------------------------------------------------------------------------------------------


def _page(data: RunData) -> str:
    from enmp_jax.report_page import STYLE

    scores = data.scores
    sections = [
        _section("Accuracy by task", _picture(data, "accuracies"), _score_table(scores)),
        _section("Pruned modules", _picture(data, "mask"), _pruned_table(scores)),
        _section("Search", _picture(data, "convergence"), _search_notes(data), _seed_table(scores)),
        _section("How the data was used", *_splits(data)),
        _section("Settings", *_settings(data)),
        _section("Environment", _pairs(_flat(data.environment))),
    ]
    sentence = seed_sentence(scores)
    again = f"<p>{escape(sentence[0].upper() + sentence[1:])}.</p>" if sentence else ""
    merge = data.config.get("merge") or {}
    made = f"{merge.get('method', 'merge')} in {merge.get('space', 'full')} space, {len(data.tasks)} tasks"
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>ENMP: {escape(data.name)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><p class='kicker'>ENMP report · {escape(data.name)}</p><h1>{escape(_headline(scores))}</h1>"
        f"<p class='lead'>{escape(verdict(scores))}</p>{again}<p class='muted'>{escape(made)}</p></header>"
        + "".join(sections)
        + "</main></body></html>\n"
    )


def _headline(scores: Mapping[str, Any]) -> str:
    gain = scores["mean_normalised"]["enmp"] - scores["mean_normalised"]["merged"]
    if not scores["pruned"]:
        return "No negative modules found"
    if gain <= 0:
        return "Pruning did not help on the test split"
    return f"{_points(gain)} points without {len(scores['pruned'])} negative modules"


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _picture(data: RunData, name: str) -> str:
    from enmp_jax.report_plots import DARK, LIGHT, PLOTS, render

    light, dark = (
        "data:image/png;base64," + base64.b64encode(render(PLOTS[name], data, theme)).decode()
        for theme in (LIGHT, DARK)
    )
    caption = " ".join((PLOTS[name].__doc__ or "").split())
    return (
        f"<figure><picture><source media='(prefers-color-scheme: dark)' srcset='{dark}'>"
        f"<img src='{light}' alt='{escape(caption)}'></picture>"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _table(
    header: Sequence[str], rows: Iterable[Sequence[str]], last_is_total: bool = False, text: bool = False
) -> str:
    rows = [list(row) for row in rows]
    body = "".join(
        f"<tr{' class=total' if last_is_total and row is rows[-1] else ''}>"
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    kind = " class='text'" if text else ""
    return (
        f"<div class='scroll'><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _pairs(pairs: Iterable[tuple[str, Any]]) -> str:
    items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(_show(value))}</dd>" for key, value in pairs)
    return f"<dl>{items}</dl>"


def _score_table(scores: Mapping[str, Any]) -> str:
    note = (
        f"Accuracy on the {escape(str(scores.get('split', 'test')))} split in per cent; in brackets "
        "normalised: divided by the accuracy of the task's own expert, not merged."
    )
    return _table(*score_rows(scores), last_is_total=True) + f"<p class='muted'>{note}</p>"


def _pruned_table(scores: Mapping[str, Any]) -> str:
    rows = [line.split(": ", 1) for line in pruned_lines(scores)]
    return (
        _table(["task", "pruned"], rows, text=True)
        if rows
        else "<p>Nothing is pruned: every module is merged.</p>"
    )


def _search_notes(data: RunData) -> str:
    scores = data.scores
    notes = [
        ("masks evaluated", scores.get("masks_evaluated")),
        ("distinct masks", scores.get("distinct_masks")),
        ("masks per second", scores.get("masks_per_second")),
        ("fitness", f"{data.fitness_label} on the search split"),
        ("merge coefficient", scores.get("scale")),
    ]
    return _pairs((key, value) for key, value in notes if value is not None)


def _seed_table(scores: Mapping[str, Any]) -> str:
    seeds = scores.get("seeds") or []
    if len(seeds) < 2:
        return ""
    rows = [
        (
            f"{s['seed']}{' (chosen)' if s['seed'] == scores.get('seed') else ''}",
            s["pruned"],
            _percent(s["mean_normalised"]),
            _points(s["gain"]),
        )
        for s in seeds
    ]
    return _table(["seed", "modules pruned", "mean normalised accuracy, test", "gain, points"], rows)


def _splits(data: RunData) -> list[str]:
    text = (
        "The search saw only the search split, and the merge coefficient of the plain merge was fixed there "
        "too, with nothing pruned. The selection split chose between the best masks found and the plain "
        "merge. The test split was scored once, at the end."
    )
    sizes = data.scores.get("splits") or {}
    names = ("train", "search", "selection", "test")
    rows = []
    for task in data.config.get("tasks") or []:
        source = task.get("data") or {}
        cells = [task.get("name"), source.get("source", "")]
        for which in names:
            count = (sizes.get(which) or {}).get(task.get("name"))
            cells.append((source.get(which) or "–") + (f" ({count:.0f})" if count is not None else ""))
        rows.append([str(cell) for cell in cells])
    note = "<p class='muted'>In brackets: number of examples used.</p>" if sizes else ""
    return [f"<p>{text}</p>", _table(["task", "source", *names], rows, text=True), note]


def _settings(data: RunData) -> list[str]:
    parts = []
    for key in ("base", "merge", "search", "evaluation"):
        if data.config.get(key):
            parts.append(f"<h3>{escape(key)}</h3>{_pairs(_flat(data.config[key]))}")
    return parts


def _flat(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_show(item) for item in value) or "none"
    return str(value)
