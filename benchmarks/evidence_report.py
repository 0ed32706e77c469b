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
    """Mean normalised test accuracy of every column and its gain over the plain merge of the same seed, with
    standard deviations and 95 % intervals over seeds; a table for every suite and size."""
    parts = []
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    for suite, n in sorted(
        {(r["suite"], r["examples"]) for r in rows}, key=lambda k: (suites.index(k[0]), k[1])
    ):
        own = [row for row in rows if (row["suite"], row["examples"]) == (suite, n)]
        parts.append(f"{suite}, {n} examples a task:\n\n{_table(own)}")
    return "\n\n".join(parts)


def _table(rows: list[Row]) -> str:
    plain = {cell(row, column=False): row["test"] for row in rows if row["column"] == "plain"}
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        found[row["method"], row["column"]].append(row)
    heads = (
        "merge",
        "column",
        "seeds",
        "test",
        "sd",
        "95 %",
        "gain over plain",
        "95 %",
        "example-evaluations",
    )
    lines = [f"| {' | '.join(heads)} |", rule(len(heads))]
    methods, columns = [*METHODS, "-"], list(COLUMNS)
    for method, column in sorted(found, key=lambda key: (methods.index(key[0]), columns.index(key[1]))):
        same = found[method, column]
        name = f"| {method} | {column} | {len(same)} "
        if any("skipped" in row for row in same):
            lines.append(f"{name}| {same[0].get('skipped', '')} |  |  |  |  |  |")
            continue
        mean, deviation, half = interval([row["test"] for row in same])
        gains = [row["test"] - plain[k] for row in same if (k := cell(row, column=False)) in plain]
        gain, _, gain_half = interval(gains) if gains else (math.nan,) * 3
        cost = np.mean([row["example_evaluations"] for row in same])
        lines.append(
            f"{name}| {mean:.3f} | {number(deviation)} | {number(half)} | {number(gain, '+.3f')} "
            f"| {number(gain_half)} | {cost:,.0f} |"
        )
    return "\n".join(lines)


def cell(row: Row, column: bool = True) -> tuple[Any, ...]:
    """Which row it is; without its column, of which plain merge."""
    keys = ("suite", "method", "seed", "examples", *(("column",) if column else ()))
    return tuple(row[key] for key in keys)


def fitness_kinds(rows: list[Row]) -> list[str]:
    """The fitnesses that columns of masks or weights followed."""
    return list(dict.fromkeys(r["column"].split(" by ")[1] for r in rows if " by " in r["column"]))


def over_plain(rows: list[Row], column: str, split: str) -> list[float]:
    """Gains of a column over the plain merge of the same seed, in points; of one method and size."""
    plain = {row["seed"]: row[split] for row in rows if row["column"] == "plain"}
    return [
        100 * (row[split] - plain[row["seed"]])
        for row in rows
        if row["column"] == column and row["seed"] in plain
    ]


def number(value: float, form: str = ".3f") -> str:
    """Nothing for NaN."""
    return "" if math.isnan(value) else format(value, form)


def rule(columns: int) -> str:
    """The line under a table's head."""
    return "|" + "---|" * columns
