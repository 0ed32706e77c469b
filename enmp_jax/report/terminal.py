"""Tables and sentences of a result on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from enmp_jax.report.comparison import comparison_rows, control_rows, refusals
from enmp_jax.report.tables import (
    cost_lines,
    export_lines,
    mean_measure,
    measure,
    pruned_lines,
    score_rows,
    seed_sentence,
    verdict,
)


def final_table(scores: Mapping[str, Any]) -> Table:
    """The table of accuracies, or of agreement, for a terminal."""
    header, rows = score_rows(scores)
    normalised = "" if scores.get("agreement") else " (normalised by the expert)"
    title = f"{measure(scores)} on the {scores.get('split', 'test')} split, %{normalised}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows[:-1]:
        table.add_row(*(Text(cell) for cell in row))
    table.add_section()
    table.add_row(*(Text(cell, style="bold") for cell in rows[-1]))
    return table


def print_scores(scores: Mapping[str, Any]) -> None:
    """Print what a search found, on standard output."""
    console = _console()
    console.print()
    console.print(final_table(scores))
    console.print(verdict(scores), style="bold")
    if sentence := seed_sentence(scores):
        console.print(sentence)
    _print_pruned(console, scores)
    for line in export_lines(scores):
        console.print(line)
    if costs := cost_lines(scores):
        console.print(", ".join(f"{value} {name}" for name, value in costs.items()))


def print_evaluation(result: Mapping[str, Any]) -> None:
    """Print the result of ``enmp evaluate``, on standard output."""
    console = _console()
    console.print(final_table(result))
    if "enmp" in result:
        console.print(verdict(result), style="bold")
    _print_pruned(console, result)


def print_comparison(result: Mapping[str, Any]) -> None:
    """Print the content of ``compare.json``, on standard output."""
    title = f"{measure(result)} on the test split, %; mean: {mean_measure(result)}"
    console = _console()
    console.print(_table(title, *comparison_rows(result)))
    for sentence in refusals(result):
        console.print(sentence)


def print_controls(result: Mapping[str, Any]) -> None:
    """Print the content of ``controls.json``, on standard output."""
    console = _console()
    console.print(_table(f"{mean_measure(result)} on the test split, %, and differences in points",
                         *control_rows(result)))  # fmt: skip
    for sentence in result["sentences"]:
        console.print(sentence)


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    text = ("method", "space", "hyperparameters", "row", "note")
    for name in header:
        table.add_column(name, justify="left" if name in text else "right", no_wrap=name != "note")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _print_pruned(console: Console, scores: Mapping[str, Any]) -> None:
    for line in pruned_lines(scores):
        console.print(f"  pruned  {line}")


def _console() -> Console:
    # square brackets and colons in the names of tasks are no markup, no emoji
    plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
    console = Console(**plain)
    # a pipe or a log has no width: do not cut tables at 80 columns there
    return console if console.is_terminal else Console(**plain, width=160)
