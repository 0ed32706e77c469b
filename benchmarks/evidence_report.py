"""Rows of benchmarks/evidence.py, their intervals over seeds and their table."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evidence_columns import COLUMNS, METHODS
from scipy import stats

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows of a file; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, standard deviation and half of the 95 % interval of the mean (Student's t); NaN for one."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), math.nan, math.nan
    deviation = float(np.std(values, ddof=1))
    return float(np.mean(values)), deviation, float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)


def table(rows: list[Row]) -> str:
    """Mean normalised test accuracy of every column, and its gain over the plain merge of the same seed."""
    plain = {_cell(row, column=False): row["test"] for row in rows if row["column"] == "plain"}
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[row["suite"], row["method"], row["examples"], row["column"]].append(row)
    lines = [
        "| suite | merge | examples | column | seeds | test | sd | 95 % | gain over plain | 95 % "
        "| example-evaluations | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (suite, method, n, column), same in found.items():
        name = f"| {suite} | {method} | {n} | {column} | {len(same)} "
        if any("skipped" in row for row in same):
            lines.append(f"{name}| {same[0].get('skipped', '')} |  |  |  |  |  |  |")
            continue
        mean, deviation, half = interval([row["test"] for row in same])
        gains = [row["test"] - plain[k] for row in same if (k := _cell(row, column=False)) in plain]
        gain, _, gain_half = interval(gains) if gains else (math.nan,) * 3
        cost, seconds = (np.mean([row[k] for row in same]) for k in ("example_evaluations", "seconds"))
        lines.append(
            f"{name}| {mean:.3f} | {_number(deviation)} | {_number(half)} | {_number(gain, '+.3f')} "
            f"| {_number(gain_half)} | {cost:,.0f} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def overview(rows: list[Row]) -> str:
    """Gains over the plain merge in points, one row a column of ``table``, one table a suite and size.

    Columns without labels are compared with the plain merge that was tuned without. The last two cells are
    means over merge methods: of the gains, and of what a column is ahead of the paper's search.
    """
    rows = [row for row in rows if "skipped" not in row and row["method"] != "-"]
    tests = {_cell(row): row["test"] for row in rows}
    parts = []
    for suite, n in dict.fromkeys((row["suite"], row["examples"]) for row in rows):
        own = [row for row in rows if (row["suite"], row["examples"]) == (suite, n)]
        methods = [m for m in METHODS if any(row["method"] == m for row in own)]
        lines = [f"| {suite}, {n} examples a task | {' | '.join(methods)} | mean | ahead of paper |"]
        lines.append("|" + "---|" * (len(methods) + 3))
        for column in (c for c in COLUMNS if any(row["column"] == c for row in own)):
            same = [row for row in own if row["column"] == column]
            if column.startswith("plain"):
                found = {m: [row["test"] for row in same if row["method"] == m] for m in methods}
                cells = [f"{np.mean(found[m]):.3f} ({len(found[m])})" if found[m] else "" for m in methods]
                lines.append(f"| {column} | {' | '.join(cells)} | | |")
                continue
            plain = "plain, no labels" if column.endswith(", no labels") else "plain"
            gains, ahead = (
                {m: _differences(same, tests, m, other) for m in methods} for other in (plain, "paper")
            )
            cells = [f"{np.mean(gains[m]):+.1f} ({len(gains[m])})" if gains[m] else "" for m in methods]
            means = [np.mean([np.mean(v) for v in d.values() if v] or [math.nan]) for d in (gains, ahead)]
            last = " | ".join(_number(float(mean), "+.1f") for mean in means)
            lines.append(f"| {column} | {' | '.join(cells)} | {last} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _differences(same: list[Row], tests: dict[Any, float], method: str, other: str) -> list[float]:
    """Of a column from another one of the same seeds, in points."""
    pairs = [
        (row["test"], tests.get(_cell(row | {"column": other}))) for row in same if row["method"] == method
    ]
    return [100 * (value - known) for value, known in pairs if known is not None]


def _cell(row: Row, column: bool = True) -> tuple[Any, ...]:
    keys = ("suite", "method", "seed", "examples", *(("column",) if column else ()))
    return tuple(row[key] for key in keys)


def _number(value: float, form: str = ".3f") -> str:
    return "" if math.isnan(value) else format(value, form)
