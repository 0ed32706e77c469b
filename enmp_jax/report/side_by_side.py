"""``enmp report A B C``: several runs on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from enmp_jax.report import figures, screen
from enmp_jax.report.charts import Curve, Dots, Lines
from enmp_jax.report.data import RunData
from enmp_jax.report.html import Html, el, join, table
from enmp_jax.report.page import document, flat, section
from enmp_jax.report.tables import mean_measure, measure, percent, points
from enmp_jax.report.words import points_gained, within

MOST_CURVES = 6
"""Colours and dashes that can be told apart."""
MOST_TASKS = 500


def side_by_side(runs: Mapping[str, RunData], differences: Mapping[str, Mapping[str, Any]]) -> str:
    """The page.

    Args:
        runs: by the names that they go by here; the first is what the others are compared with.
        differences: run -> its difference to the first on the same test examples, with the interval.
    """
    first = next(iter(runs))
    best = max(runs, key=lambda name: runs[name].scores["mean_normalised"]["enmp"])
    return document(
        "ENMP: runs compared",
        el("header", el("p", "ENMP report · runs compared", class_="kicker"),
           el("h1", f"{best} is best of {len(runs)} runs: "
              f"{percent(runs[best].scores['mean_normalised']['enmp'])} %")),
        section("Results", _results(runs)),
        section(f"Against {first}", _differences(first, differences)) if differences else None,
        section("Searches", _curves(runs)),
        section("Tasks", _tasks(runs)),
        section("What differs", _settings(runs)),
    )  # fmt: skip


def _results(runs: Mapping[str, RunData]) -> Html:
    measures = {mean_measure(data.scores) for data in runs.values()}
    what = measures.pop() if len(measures) == 1 else "mean score"
    refined = any("refined" in data.scores["mean_normalised"] for data in runs.values())
    chart = Dots(
        f"The {what} of every run on its test split: the plain merge, and what the search made of it.",
        f"{what}, %",
        tuple((name, figures.marks(data.scores["mean_normalised"])) for name, data in runs.items()),
        {"merged": "merged", "found": "merged + ENMP", **({"refined": "refined"} if refined else {})},
    )
    rows = []
    for name, data in runs.items():
        mean, gain = data.scores["mean_normalised"], data.beside.gain.get("enmp")
        cost = data.scores.get("example_evaluations")
        merge, search = (data.config.get(key) or {} for key in ("merge", "search"))
        rows.append([
            name, points(points_gained(data.scores)), within(gain), percent(mean["merged"]),
            percent(mean["enmp"]), *([percent(mean.get("refined"))] if refined else []),
            f"{merge.get('method', '–')}, {merge.get('space', 'full')}", search.get("strategy", "–"),
            f"{len(data.scores.get('pruned') or [])} of {data.scores.get('modules', '–')}",
            "–" if cost is None else f"{cost:,.0f}",
        ])  # fmt: skip
    more = ["refined"] if refined else []
    header = ["run", "gain, points", "95 % interval", "merged", "merged + ENMP", *more,
              "merge", "strategy", "left out", "example-evaluations"]  # fmt: skip
    return screen.dots(chart, header, rows)


def _differences(first: str, differences: Mapping[str, Mapping[str, Any]]) -> Html:
    rows = [[name, points(d["difference"]), within(d), f"{d['p']:.4f}"] for name, d in differences.items()]
    note = f"What the searches found, against that of {first}, on the same test examples (paired bootstrap)."
    return join(
        table(["run", "difference, points", "95 % interval", "p"], rows), el("p", note, class_="muted")
    )


def _curves(runs: Mapping[str, RunData]) -> Html:
    labels = {data.fitness_label for data in runs.values()}
    counts = {figures.progress(data) for data in runs.values() if data.history}
    if len(labels) > 1 or len(counts) != 1:
        return el("p", "The runs search by different measures, which no common axis shows.")
    ((count, x_label),) = counts
    curves = []
    for i, (name, data) in enumerate(list(runs.items())[:MOST_CURVES]):
        for seed, history in data.by_seed().items():
            if seed == data.scores.get("seed", seed) and not any(curve.name == name for curve in curves):
                x, y = ([getattr(g, key) for g in history] for key in (count, "best"))
                curves.append(Curve(f"run{i}", "line", name, np.array(x, float), np.array(y, float)))
    more = f" The first {MOST_CURVES} runs are drawn." if len(runs) > MOST_CURVES else ""
    caption = f"The best fitness so far of the chosen seed of every run, against what it paid.{more}"
    return screen.lines(Lines(caption, x_label, f"{labels.pop()}, % of the experts", tuple(curves)))


def _tasks(runs: Mapping[str, RunData]) -> Html:
    known = list(dict.fromkeys(task for data in runs.values() for task in data.tasks))
    rows = [
        [task, *(percent(data.scores["enmp"].get(task)) for data in runs.values())]
        for task in known[:MOST_TASKS]
    ]
    what = " / ".join(sorted({measure(data.scores) for data in runs.values()}))
    note = f"Of what the searches found: {what} on the test split, in per cent."
    if len(known) > MOST_TASKS:
        note += f" The first {MOST_TASKS} of {len(known)} tasks."
    return join(table(["task", *runs], rows), el("p", note, class_="muted"))


def _settings(runs: Mapping[str, RunData]) -> Html:
    sections = ("base", "merge", "search", "evaluation")
    settings = [
        dict(flat({key: data.config.get(key) or {} for key in sections}))
        | {"enmp-jax": data.environment.get("enmp_jax"), "commit": str(data.environment.get("commit"))[:12]}
        for data in runs.values()
    ]
    rows = [
        [key, *(str(own.get(key, "–")) for own in settings)]
        for key in dict.fromkeys(key for own in settings for key in own)
        if _differ([own.get(key) for own in settings])
    ]
    return table(["setting", *runs], rows, "text") if rows else el("p", "The settings are the same.")


def _differ(values: Sequence[object]) -> bool:
    return any(value != values[0] for value in values)
