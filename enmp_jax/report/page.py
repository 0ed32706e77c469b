"""``report.html``: one self-contained page, light and dark, for screen, phone and print."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from enmp_jax.report import figures, screen
from enmp_jax.report.comparison import comparison_rows, control_rows, refusals, row_name
from enmp_jax.report.data import FITNESS_LABELS, RunData
from enmp_jax.report.html import Html, el, join, pairs, table
from enmp_jax.report.limits import PAGE, drawn, shortened
from enmp_jax.report.tables import (
    cost_lines,
    mean_measure,
    measure,
    percent,
    points,
    pruned_lines,
    score_rows,
    seed_sentence,
)
from enmp_jax.report.words import commands, export_rows, headline, left_out, points_gained, typed, within

_HERE = Path(__file__).parent
_SCRIPT = (_HERE / "page.js").read_text(encoding="utf-8")
STYLE = (_HERE / "page.css").read_text(encoding="utf-8") + screen.SHADES


def document(title: str, *content: Html | None) -> str:
    """A whole page with style and script in it, which may load nothing and run nothing else."""
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", title),
        el("style", Html(STYLE)),
    )
    body = el("body", el("main", *content), el("script", Html(_SCRIPT)))
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def page(data: RunData) -> str:
    """The report of a run."""
    whole, (data, notes) = data, drawn(data, PAGE)
    _, more = shortened(whole.scores)
    return document(
        f"ENMP: {data.name}",
        _header(whole, [*notes, *more]),
        section(f"{measure(data.scores).capitalize()} by task", _tasks(data)),
        section("Modules", _modules(data), _left_out(whole)),
        section("Search", screen.lines(figures.convergence(data)), _gap(whole), _seeds(whole), _front(whole),
                pairs([*cost_lines(whole.scores).items(), *_scale(whole)])),
        _controls(whole),
        _compare(whole),
        _exports(whole),
        section("How to make it again", _again(whole)),
        section("Data and settings", *_splits(data), *_settings(whole)),
        section("Environment", pairs(flat({k: v for k, v in whole.environment.items() if k != "command"}))),
    )  # fmt: skip


def section(title: str, *parts: Html | None) -> Html:
    """A part of the page."""
    return el("section", el("h2", title), *parts)


def _header(data: RunData, notes: Sequence[str]) -> Html:
    scores = data.scores
    mean, merge = scores["mean_normalised"], data.config.get("merge") or {}
    gain = data.beside.gain.get("enmp")
    found = "with weights" if scores.get("weighted") else "with modules left out"
    numbers = [
        _number("", "merged", percent(mean["merged"]), "%"),
        _number("found", found, percent(mean["enmp"]), "%"),
        _number("", "gain", points(points_gained(scores)), "points", gain),
    ]
    if "refined" in mean:
        more = f"then refined: {points(mean['refined'] - mean['merged'])} points"
        numbers.append(_number("found", more, percent(mean["refined"]), "%", data.beside.gain.get("refined")))
    own = (
        "The data have no labels: a model is scored by how often it answers as the task's own adapter does."
        if scores.get("agreement")
        else "100 % is as good as each task's own adapter alone."
    )
    method = f"{merge.get('method', 'merge')} in {merge.get('space', 'full')} space"
    lead = (
        f"{len(data.tasks)} LoRA adapters merged into one model ({method}): {mean_measure(scores)} on the "
        f"{scores.get('split', 'test')} split, which the search never saw. {own}"
    )
    again = seed_sentence(scores)
    return el(
        "header",
        el("p", f"ENMP report · {data.name}", class_="kicker"),
        el("h1", headline(scores, gain)),
        el("dl", *numbers, class_="hero"),
        el("p", lead, class_="lead"),
        el("p", again) if again else None,
        *(el("p", note, class_="muted") for note in notes),
    )


def _number(kind: str, name: str, value: str, unit: str, gain: Mapping[str, Any] | None = None) -> Html:
    label = f"{name}, 95 % interval {within(gain)}" if gain else name
    figure = el("dd", value, el("small", unit), class_="value")
    return el("div", el("dt", label), figure, class_=kind or None)


def _tasks(data: RunData) -> Html:
    scores, gains = data.scores, data.beside.gain.get("enmp", {}).get("tasks", {})
    header, rows = score_rows(scores)
    if gains:
        header = [*header, "95 % interval"]
        rows = [[*row, within(gains.get(task))] for row, task in zip(rows, [*data.tasks, None], strict=True)]
    first = [i for i, name in enumerate(header) if name in ("change", "95 % interval")]
    order = [0, *first, *(i for i in range(1, len(header)) if i not in first)]  # a phone shows the first ones
    header, rows = [header[i] for i in order], [[row[i] for i in order] for row in rows]
    meaning = (
        "How often a model answers as the task's own adapter does, in per cent."
        if scores.get("agreement")
        else "In per cent; in brackets normalised: divided by that of the task's own adapter."
    )
    return join(screen.dots(figures.tasks(data), header, rows, total=True), el("p", meaning, class_="muted"))


def _modules(data: RunData) -> Html:
    finer = data.mask["layers"] * len(data.mask["tasks"]) * len(data.projections) <= PAGE.cells
    chart = figures.modules(data, finer)

    def cells(values: np.ndarray, combine: Any = np.mean) -> np.ndarray:
        """[layer, projection, task] as the chart's [row, layer]."""
        if finer and data.projections:
            return values.transpose(2, 1, 0).reshape(-1, len(values))
        return combine(values, axis=1).T

    facts = [_fact("weight", chart.values, "{:.3g}")] if chart.weighted else [_kept(chart.values)]
    for one in data.beside.effects:
        what = "leaving it out alone" if one.kind == "leave_one_out" else "leaving it out, to first order"
        what += ", summed over projections" if chart.of > 1 else ""
        fitness = FITNESS_LABELS.get(one.fitness, one.fitness.replace("_", " "))
        effect = cells(data.by_module(one.values, np.nan), np.sum)
        facts.append(_fact(f"{what}:", 100 * effect, "{:+.2f}", f" points of fitness ({fitness})"))
    seeds = data.beside.seeds
    if len(seeds) > 1:
        often = sum(cells((data.weights_of(seed) == 0).astype(float), np.sum) for seed in seeds.values())
        words = ("left out by", f" of {len(seeds)} seeds")
        if chart.of > 1:
            words = (
                "left out",
                f" times of {chart.of * len(seeds)}, in {chart.of} modules of {len(seeds)} seeds",
            )
        facts.append(_fact(words[0], np.asarray(often), "{:.0f}", words[1]))
    return screen.heat(chart, {"facts": facts})


def _fact(before: str, values: np.ndarray, form: str, after: str = "") -> dict[str, Any]:
    shown = [[form.format(x) if np.isfinite(x) else None for x in row] for row in values]
    return {"before": before, "values": shown, "after": after}


def _kept(values: np.ndarray) -> dict[str, Any]:
    words = {0.0: "left out", 1.0: "merged"}
    shown = [[words.get(float(x), f"{x:.2g} of it merged") for x in row] for row in values]
    return {"before": "", "values": shown, "after": ""}


def _left_out(data: RunData) -> Html:
    rows = [list(line.split(": ", 1)) for line in pruned_lines(data.scores)]
    listed = table(["task", "left out"], rows, "text") if rows else None
    return join(el("h3", "What was left out"), el("p", left_out(data)), listed)


def _gap(data: RunData) -> Html | None:
    on = data.scores.get("fitness_on")
    if not on:
        return None
    seen = {"search": "climbed on", "selection": "chose among finalists", "test": "never seen"}
    rows = []
    for split, values in on.items():
        before, after = values.get("merged"), values.get("enmp")
        change = None if before is None or after is None else after - before
        rows.append([f"{split}: {seen[split]}", percent(before), percent(after), points(change)])
    note = (
        f"The fitness of the search ({data.fitness_label}) on all three splits. A gain that shrinks from the "
        "search split to the test split is what the search learnt by heart."
    )
    header = ["split", "merged", "merged + ENMP", "gain, points"]
    return join(el("h3", "Search, selection, test"), table(header, rows), el("p", note, class_="muted"))


def _scale(data: RunData) -> list[tuple[str, object]]:
    scale = data.scores.get("scale")
    return [] if scale is None else [("merge coefficient", f"{scale:g}")]


def _seeds(data: RunData) -> Html | None:
    scores = data.scores
    seeds = scores.get("seeds") or []
    if len(seeds) < 2:
        return None
    counts = [key for key in ("weighted", "pruned") if any(s.get(key) is not None for s in seeds)]
    rows = [
        [
            f"{s['seed']}{' (chosen)' if s['seed'] == scores.get('seed') else ''}",
            *("–" if s.get(key) is None else s[key] for key in counts),
            percent(s.get("mean_normalised")),
            points(s.get("gain")),
        ]
        for s in seeds
    ]
    header = ["seed", *(f"modules {key}" for key in counts), f"{mean_measure(scores)}, test", "gain, points"]
    return join(el("h3", "Seeds"), table(header, rows))


def _front(data: RunData) -> Html | None:
    front = sorted(data.scores.get("pareto") or [], key=lambda point: -point["mean"])
    if not front:
        return None
    rows = [[f"{p['mean']:.4f}", f"{p['worst']:.4f}", len(p["pruned"]), f"{p['scale']:.3g}"] for p in front]
    note = "Masks that no other mask beats both in the mean and in the worst task, on the search split:"
    return join(
        el("h3", "Pareto front"), el("p", note), table(["mean", "worst task", "pruned", "scale"], rows)
    )


def _controls(data: RunData) -> Html | None:
    result = data.beside.controls
    if result is None:
        return None
    result = {**result, "rows": [row for row in result["rows"] if row.get("gain") is not None]}
    return section(
        "Is it more than luck?",
        *(el("p", sentence) for sentence in result["sentences"]),
        screen.dots(figures.controls(result), *control_rows(result)) if result["rows"] else None,
    )


def _compare(data: RunData) -> Html | None:
    result = data.beside.compare
    if result is None or not result["rows"]:
        return None
    (_, _, *header), rows = comparison_rows(result)
    named = [[row_name(row), *cells[2:]] for row, cells in zip(result["rows"], rows, strict=True)]
    chart = screen.dots(figures.comparison(result), ["method, space", *header], named)
    return section("Other merge methods", chart, *(el("p", sentence) for sentence in refusals(result)))


def _exports(data: RunData) -> Html | None:
    rows = export_rows(data)
    return (
        section("Files to take away", table(["directory", "format", "what it is"], rows, "text"))
        if rows
        else None
    )


def _again(data: RunData) -> Html:
    lines = "\n".join(f"{command}  # {what}" for command, what in commands(data))
    was = typed(data.environment)
    commit = data.environment.get("commit")
    return join(
        el("p", "In the directory that holds this run, with base, adapters and data where they were:"),
        el("pre", el("code", lines)),
        el("p", "The run was made by ", el("code", was), f", commit {commit}." if commit else ".")
        if was
        else None,
    )


def _splits(data: RunData) -> list[Html]:
    text = (
        "The search saw only the search split, and the merge coefficient of the plain merge was fixed there "
        "too, with nothing left out. The selection split chose between the best that was found and the plain "
        "merge. The test split was scored once, at the end. In brackets: number of examples used."
    )
    sizes = data.scores.get("splits") or {}
    names = ("train", "search", "selection", "test")
    rows = []
    known = set(data.tasks)
    for task in data.config.get("tasks") or []:
        if task.get("name") not in known:
            continue
        source = task.get("data") or {}
        cells = [task.get("name"), source.get("source", "")]
        for which in names:
            count = (sizes.get(which) or {}).get(task.get("name"))
            cells.append((source.get(which) or "–") + (f" ({count:.0f})" if count is not None else ""))
        rows.append([str(cell) for cell in cells])
    return [el("p", text), table(["task", "source", *names], rows, "text")]


def _settings(data: RunData) -> list[Html]:
    sections = [key for key in ("search", "merge", "base", "evaluation") if data.config.get(key)]
    found = (el("div", el("h3", key), pairs(flat(data.config[key]))) for key in sections)
    return [el("div", *found, class_="columns")]


def flat(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """Nested settings as names with dots."""
    found: list[tuple[str, object]] = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            found += flat(value, f"{prefix}{key}.")
        elif value is not None:
            found.append((f"{prefix}{key}", _show(value)))
    return found


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_show, _some(value))) or "none"
    return str(value)


def _some(values: Iterable[Any], most: int = 100) -> list[Any]:
    values = list(values)
    return values if len(values) <= most else [*values[:most], f"and {len(values) - most} more"]
