"""Progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax


class Reporter(NamedTuple):
    """Where progress goes: ``say(line)``, ``advance(done, total, best)`` of a search, and
    ``read(what, done, total)`` while examples are read."""

    say: Callable[[str], None]
    advance: Callable[[int, int, float], None]
    read: Callable[[str, int, int], None] = lambda what, done, total: None

    def reading(self, what: str) -> Callable[[int, int], None]:
        """The ``progress`` of ``data.load_examples`` for data called ``what``."""
        return lambda done, total: self.read(what, done, total)


SILENT = Reporter(lambda line: None, lambda done, total, best: None)
QUIET_SECONDS = 5.0
"""Reading that takes less is not worth a line."""


@contextmanager
def make_reporter() -> Iterator[Reporter]:
    """The reporter for standard error: only process 0 of a multi-host run reports."""
    from rich.console import Console

    if jax.process_index() != 0:
        yield SILENT
        return
    # square brackets and colons in paths and shapes are no markup, no emoji
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        yield Reporter(
            lambda line: print(line, flush=True), _lines, read_lines(lambda line: print(line, flush=True))
        )
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

        def say(line: str) -> None:
            progress.console.print(line)

        yield Reporter(say, advance, read_lines(say))


def _lines(done: int, total: int, best: float) -> None:
    every = max(1, total // 10)
    if done % every == 0 or done == total:
        print(f"generation {done} of {total}, best fitness {best:.4f}", flush=True)


def read_lines(say: Callable[[str], None]) -> Callable[[str, int, int], None]:
    """``Reporter.read`` that says a line every few seconds of a slow load, and none of a quick one."""
    clock = {"what": "", "last": 0.0}

    def read(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if clock["what"] != what:
            clock.update(what=what, last=now)
        elif now - clock["last"] >= QUIET_SECONDS:
            clock["last"] = now
            say(f"reading {what}: {done} of {total}")

    return read
