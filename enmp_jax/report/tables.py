"""Tables and sentences of a result: the same for the terminal and the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

COLUMNS = {"base": "base", "reference": "expert", "merged": "merged", "enmp": "merged + ENMP",
           "refined": "refined"}  # fmt: skip


def measure(scores: Mapping[str, Any]) -> str:
    """What the scores of a result are: without labels, how often a model answers as the expert does; of
    completions exp(-loss)."""
    chosen = "agreement with the expert" if scores.get("agreement") else "accuracy"
    kinds = set(scores.get("metric", {}).values())
    if "likelihood" not in kinds:
        return chosen
    likelihood = "likelihood exp(-loss)"
    return likelihood if len(kinds) == 1 else f"{chosen}, of completions {likelihood}"


def mean_measure(scores: Mapping[str, Any]) -> str:
    """What ``mean_normalised`` is; agreement needs no normalising, the expert's own is 1."""
    if "likelihood" in scores.get("metric", {}).values():
        return "mean normalised score"
    return f"mean {measure(scores)}" if scores.get("agreement") else "mean normalised accuracy"


def score_rows(scores: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of accuracies: a row per task and the mean.

    Takes the content of ``scores.json``, or of an evaluation that lacks some columns. Accuracies in
    per cent; in brackets normalised by the task's own expert. Agreement with the expert is so already.
    """
    present = [key for key in COLUMNS if key in scores]
    change = "merged" in present and "enmp" in present
    bracketed = () if scores.get("agreement") else ("merged", "enmp", "refined")
    header = ["task", *(COLUMNS[key] for key in present), *(["change"] if change else [])]
    rows = []
    for task in scores["tasks"]:
        reference = scores["reference"][task]
        row = [str(task)]
        for key in present:
            accuracy = scores[key][task]
            row.append(percent(accuracy) + (_bracket(accuracy, reference) if key in bracketed else ""))
        if change:
            row.append(points(scores["enmp"][task] - scores["merged"][task]))
        rows.append(row)
    mean = ["mean"]
    for key in present:
        values = [scores[key][task] for task in scores["tasks"]]
        normalised = scores.get("mean_normalised", {}).get(key) if key in bracketed else None
        mean.append(
            percent(sum(values) / len(values)) + ("" if normalised is None else f" ({percent(normalised)})")
        )
    if change:
        gap = [scores["enmp"][t] - scores["merged"][t] for t in scores["tasks"]]
        mean.append(points(sum(gap) / len(gap)))
    return header, [*rows, mean]


def verdict(scores: Mapping[str, Any]) -> str:
    """One sentence: what pruning or weighting did on data that the search never saw."""
    before, after = scores["mean_normalised"]["merged"], scores["mean_normalised"]["enmp"]
    head, mean = how_many(scores), mean_measure(scores)
    if not changed(scores):
        what = "weights" if "weighted" in scores else "mask"
        return f"{head}: no {what} beat the plain merge ({percent(before)} % {mean})."
    return (
        f"{head}: {mean} on the {scores.get('split', 'test')} split goes from "
        f"{percent(before)} % to {percent(after)} % ({points(after - before)} points)."
    )


def how_many(scores: Mapping[str, Any]) -> str:
    """``4 of 48 modules pruned``, or ``40 of 48 modules weighted, 4 of them pruned`` (with weight 0)."""
    pruned, weighted, total = len(scores.get("pruned") or []), scores.get("weighted"), scores.get("modules")
    count = pruned if weighted is None else weighted
    modules = f"{count}{f' of {total}' if total else ''} module{'' if (total or count) == 1 else 's'}"
    if weighted is None:
        return f"{modules} pruned"
    return f"{modules} weighted" + (f", {pruned} of them pruned" if pruned else "")


def changed(scores: Mapping[str, Any]) -> bool:
    """Whether the search chose another merge than the plain one (by pruning, by weights or by the scale)."""
    return bool(scores.get("pruned") or scores.get("weighted")) or scores["enmp"] != scores["merged"]


def seed_sentence(scores: Mapping[str, Any]) -> str | None:
    """Mean and standard deviation of the gain over several searches; None for a single one."""
    gain, seeds = scores.get("gain") or {}, scores.get("seeds") or []
    if len(seeds) < 2 or gain.get("std") is None or gain.get("mean") is None:
        return None
    return f"Over {len(seeds)} seeds the gain is {points(gain['mean'])} ± {100 * gain['std']:.1f} points."


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


def export_lines(scores: Mapping[str, Any]) -> list[str]:
    """Exports that are not quite the model that was scored, with their own scores."""
    lines = []
    for name, own in (scores.get("exported") or {}).items():
        whole = scores["mean_normalised"].get("refined" if name == "refined" else "enmp")
        lines.append(
            f"{name}/ has rank {own['rank']} and misses the merge by {percent(own['error'])} %: it has "
            f"{percent(own['mean_normalised'])} % {mean_measure(scores)} instead of {percent(whole)} %"
        )
    return lines


def percent(value: float | None) -> str:
    """A share as per cent, a dash for NaN and None."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def points(value: float | None) -> str:
    """A difference of shares as signed percentage points, a dash for NaN and None."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:+.1f}"


def cost_lines(scores: Mapping[str, Any]) -> dict[str, str]:
    """What a search cost, by name, as far as it is recorded."""
    forms = {"masks_evaluated": "", "distinct_masks": "", "example_evaluations": ",.0f",
             "masks_per_second": ".1f", "masks_failed": ""}  # fmt: skip
    return {
        key.replace("_", " "): format(value, form)
        for key, form in forms.items()
        if (value := scores.get(key)) is not None and (value or key != "masks_failed")
    }


def _bracket(accuracy: float, reference: float) -> str:
    return f" ({100 * accuracy / reference:.1f})" if reference else ""
