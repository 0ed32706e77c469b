"""Progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax


class Reporter(NamedTuple):
    """Where progress goes: ``say(line)``, and ``advance(done, total, best)`` of a search."""

    say: Callable[[str], None]
    advance: Callable[[int, int, float], None]


SILENT = Reporter(lambda line: None, lambda done, total, best: None)


@contextmanager
def make_reporter() -> Iterator[Reporter]:
    """The reporter for standard error: only process 0 of a multi-host run reports."""
    from rich.console import Console

    if jax.process_index() != 0:
        yield SILENT
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Reporter(lambda line: print(line, flush=True), _lines)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("searching"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("best {task.fields[best]:.4f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("search", total=None, visible=False, best=0.0)

        def advance(done: int, total: int, best: float) -> None:
            progress.update(bar, completed=done, total=total, best=best, visible=done < total)

        yield Reporter(lambda line: progress.console.print(line, highlight=False), advance)


def _lines(done: int, total: int, best: float) -> None:
    every = max(1, total // 10)
    if done % every == 0 or done == total:
        print(f"generation {done} of {total}, best fitness {best:.4f}", flush=True)
