"""The tables of ``enmp compare`` and ``enmp controls``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from enmp_jax.report.tables import percent, points

Result = Mapping[str, Any]
MOST_TASKS = 8
"""With more, the table has no column for each."""


def row_name(row: Mapping[str, Any]) -> str:
    """Method and space of a row of ``compare.json``."""
    return f"{row['method']}{' (isotropic)' if row.get('isotropize') else ''}, {row['space']}"


def comparison_rows(result: Result) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of merge methods: the content of ``compare.json``, best first."""
    searched = any("enmp" in row["mean_normalised"] or "note" in row for row in result["rows"])
    tasks = result["tasks"] if len(result["tasks"]) <= MOST_TASKS else []
    header = ["method", "space", "scale", "hyperparameters", "search fitness", "mean",
              *(["mean + ENMP", "pruned"] if searched else []), *tasks, "seconds"]  # fmt: skip
    rows = []
    for row in result["rows"]:
        given = ", ".join(f"{name} {value}" for name, value in row["hyperparameters"].items())
        fitness = row["search"]
        cells = [
            row["method"] + (" (isotropic)" if row["isotropize"] else ""), row["space"], f"{row['scale']:g}",
            given, "–" if fitness is None else f"{fitness:.3f}", percent(row["mean_normalised"]["merged"]),
        ]  # fmt: skip
        if searched:
            cells += [
                percent(row["mean_normalised"].get("enmp")),
                str(len(row["pruned"])) if "pruned" in row else "–",
            ]
        cells += [percent(row["merged"][task]) for task in tasks]
        rows.append([*cells, f"{row['seconds']:.0f}"])
    return header, rows


def refusals(result: Result) -> list[str]:
    """What a comparison has no row of, and why."""
    return [f"Left out: {name}: {why}" for name, why in result.get("left_out", {}).items()]


def control_rows(result: Result) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of controls: the content of ``controls.json``."""
    header = ["row", "mean", "sd", "gain", "95 % interval", "p (Holm)", "found better by", "95 % interval",
              "p (Holm)", "note"]  # fmt: skip
    return header, [
        [
            row["row"], percent(row["mean_normalised"]), percent(row.get("std")),
            *_difference(row.get("gain")), *_difference(row.get("found_better_by")), _note(row),
        ]
        for row in result["rows"]
    ]  # fmt: skip


def _note(row: Mapping[str, Any]) -> str:
    if "as_good_as_found" in row:
        return f"{row['as_good_as_found']} of {len(row['values'])} as good as found"
    return row.get("note", "")


def _difference(found: Mapping[str, float] | None) -> list[str]:
    if found is None:
        return ["–", "–", "–"]
    interval = f"{points(found['low'])} to {points(found['high'])}"
    return [points(found["difference"]), interval, f"{found['p_holm']:.4f}"]
