"""Tables of the rows of benchmarks/evidence.py that compare columns, sizes, fitness kinds and strategies."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from evidence_columns import COLUMNS, METHODS, RUNGS
from evidence_report import Row, cell, fitness_kinds, interval, over_plain, rule


def overview(rows: list[Row]) -> str:
    """Every table that there are rows for.

    Of every suite and size, gains of all columns by merge method; of suites with several sizes, tests by
    size; gains by the fitness that was followed, and by strategy. Gains are over the plain merge in points.
    """
    rows = [row for row in rows if "skipped" not in row]
    parts = [part for suite in _distinct(rows, "suite") for part in _suite(rows, suite)]
    return "\n\n".join(parts)


def _suite(rows: list[Row], suite: str) -> Iterator[str]:
    rows = [row for row in rows if row["suite"] == suite]
    for n in sorted(_distinct(rows, "examples")):
        yield from gains(suite, n, [row for row in rows if row["examples"] == n and row["method"] != "-"])
    for method in (m for m in _distinct(rows, "method") if m != "-"):
        own = [row for row in rows if row["method"] in (method, "-")]
        yield from rungs(f"{suite}, {method}", own)
        for n in sorted(_distinct(own, "examples")):
            sized = [row for row in own if row["examples"] == n]
            name = f"{suite}, {method}, {n} examples a task"
            yield from fitnesses(name, sized)
            yield from strategies(name, sized)


def gains(suite: str, n: int, rows: list[Row]) -> Iterator[str]:
    """Gains of a suite and size by merge method, with the number of seeds.

    Columns without labels are compared with the plain merge that was tuned without. The last two cells are
    means over merge methods: of the gains, and of what a column is ahead of the paper's search; with the 95 %
    interval over seeds where three seeds or more have every method.
    """
    columns = [c for c in COLUMNS if not _apart(c) and any(row["column"] == c for row in rows)]
    methods = [m for m in METHODS if any(r["method"] == m and r["column"] in columns for r in rows)]
    if not columns:
        return
    lines = [f"| {suite}, {n} examples a task | {' | '.join(methods)} | mean | ahead of paper |"]
    lines.append(rule(len(methods) + 3))
    for column in columns:
        if column.startswith("plain"):
            same = [row for row in rows if row["column"] == column]
            found = {m: [row["test"] for row in same if row["method"] == m] for m in methods}
            cells = [f"{np.mean(found[m]):.3f} ({len(found[m])})" if found[m] else "" for m in methods]
            lines.append(f"| {column} | {' | '.join(cells)} | | |")
            continue
        over, ahead = _compared(rows, column, methods)
        cells = [f"{np.mean([*v.values()]):+.1f} ({len(v)})" if (v := over[m]) else "" for m in methods]
        lines.append(f"| {column} | {' | '.join(cells)} | {_mean(over)} | {_mean(ahead)} |")
    yield "\n".join(lines)
    yield from _most_seeds(f"{suite}, {n} examples a task", rows, columns, methods)


def _most_seeds(name: str, rows: list[Row], columns: list[str], methods: list[str]) -> Iterator[str]:
    """Means over the merge methods that have more seeds than the others, of columns that have all of them."""
    seeds = {m: {r["seed"] for r in rows if r["method"] == m and r["column"] == "plain"} for m in methods}
    most = max(map(len, seeds.values()))
    chosen = [m for m in methods if len(seeds[m]) == most]
    if most < 3 or not 1 < len(chosen) < len(methods):
        return
    lines = [f"| {name}: {', '.join(chosen)}, {most} seeds | mean | ahead of paper |", rule(3)]
    for column in columns:
        over, ahead = _compared(rows, column, chosen)
        if not column.startswith("plain") and all(len(values) == most for values in over.values()):
            lines.append(f"| {column} | {_mean(over)} | {_mean(ahead)} |")
    yield "\n".join(lines)


def rungs(name: str, rows: list[Row]) -> Iterator[str]:
    """Mean test accuracy by examples a task, with labels and without, with the number of seeds."""
    sizes = sorted({row["examples"] for row in rows if row["column"] == "plain"})
    if len(sizes) < 2:
        return
    tests: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        tests[row["column"], row["examples"]].append(row["test"])
    heads = [f"{n}, {which}" for which in ("labels", "none") for n in sizes]
    lines = [f"| {name}: examples a task | {' | '.join(heads)} |", rule(len(heads) + 1)]
    for column, called in RUNGS.items():
        found = [tests[column + labels, n] for labels in ("", ", no labels") for n in sizes]
        cells = [f"{np.mean(values):.3f} ({len(values)})" if values else "" for values in found]
        lines.append(f"| {called} | {' | '.join(cells)} |")
    yield "\n".join(lines)


def fitnesses(name: str, rows: list[Row]) -> Iterator[str]:
    """Gains on the search split and on test by the fitness that masks and weights followed, over seeds."""
    kinds = fitness_kinds(rows)
    if not kinds:
        return
    lines = [f"| {name}: fitness | masks: search | masks: test | weights: search | weights: test |", rule(5)]
    for kind in kinds:
        cells = [
            _spread(over_plain(rows, f"{what} by {kind}", split))
            for what in ("masks", "weights")
            for split in ("search", "test")
        ]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    yield "\n".join(lines)


def strategies(name: str, rows: list[Row]) -> Iterator[str]:
    """Gains on test by strategy, the largest first, and what they cost."""
    columns = [c for c in _distinct(rows, "column") if c.startswith("strategy ")]
    if not columns:
        return
    found = {c: over_plain(rows, c, "test") for c in columns}
    lines = [f"| {name}: strategy | test | example-evaluations |", rule(3)]
    for column in sorted(columns, key=lambda c: -np.mean(found[c])):
        cost = np.mean([row["example_evaluations"] for row in rows if row["column"] == column])
        lines.append(f"| {column.removeprefix('strategy ')} | {_spread(found[column])} | {cost:,.0f} |")
    yield "\n".join(lines)


def _apart(column: str) -> bool:
    """Columns that have tables of their own."""
    return " by " in column or column.startswith("strategy ")


def _spread(values: list[float]) -> str:
    """Mean ± deviation over seeds."""
    if not values:
        return ""
    mean, deviation, _ = interval(values)
    return f"{mean:+.1f}" + ("" if math.isnan(deviation) else f" ± {deviation:.1f}")


BySeed = dict[str, dict[int, float]]
"""Merge method -> seed -> a difference in points."""


def _compared(rows: list[Row], column: str, methods: list[str]) -> tuple[BySeed, BySeed]:
    """How far a column is ahead of the plain merge, and of the paper's search, of the same seeds."""
    tests = {cell(row): row["test"] for row in rows}
    same = [row for row in rows if row["column"] == column]
    plain = "plain, no labels" if column.endswith(", no labels") else "plain"

    def over(other: str) -> BySeed:
        return {
            method: {
                row["seed"]: 100 * (row["test"] - tests[k])
                for row in same
                if row["method"] == method and (k := cell(row | {"column": other})) in tests
            }
            for method in methods
        }

    return over(plain), over("paper")


def _mean(found: BySeed) -> str:
    """The mean over methods of the means over seeds of what was found by method and seed."""
    if not (by_method := [values for values in found.values() if values]):
        return ""
    mean = np.mean([np.mean([*values.values()]) for values in by_method])
    seeds = set.intersection(*map(set, found.values()))  # those that every method of the table has
    _, _, half = interval([float(np.mean([values[s] for values in by_method])) for s in seeds] or [0.0])
    return f"{mean:+.1f}" + (f" ± {half:.1f}" if len(seeds) > 2 else "")


def _distinct(rows: list[Row], key: str) -> list:
    return list(dict.fromkeys(row[key] for row in rows))
