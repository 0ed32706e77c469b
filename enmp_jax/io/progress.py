"""Progress: a bar on a terminal, plain lines elsewhere, nothing with ``--quiet``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Progress(NamedTuple):
    """How far a search or a training is. Counts are since its beginning, resumed or not.

    Attributes:
        done: of ``total`` units.
        total: units at most.
        best: best fitness so far; None in a training.
        unit: what is counted: ``generation`` or ``step``.
        phase: what goes on: ``search``, ``refine``, ``adapters`` or ``base``.
        mean: fitness of the last generation's members.
        loss: of a training.
        masks: merged models run.
        examples: forward passes of one example that were run.
        spent: example-evaluations that count against the budget, of the search that has spent most.
        budget: most of them; None: no limit.
        seed: of the search, where searches run one after the other.
    """

    done: int
    total: int
    best: float | None = None
    unit: str = "generation"
    phase: str = "search"
    mean: float | None = None
    loss: float | None = None
    masks: int = 0
    examples: int = 0
    spent: int = 0
    budget: int | None = None
    seed: int | None = None


class Reporter(NamedTuple):
    """Where progress goes: ``say(line)``, ``advance(progress)`` of a search or training, and
    ``read(what, done, total)`` while examples are read."""

    say: Callable[[str], None]
    advance: Callable[[Progress], None]
    read: Callable[[str, int, int], None] = lambda what, done, total: None

    def reading(self, what: str) -> Callable[[int, int], None]:
        """The ``progress`` of ``data.load_examples`` for data called ``what``."""
        return lambda done, total: self.read(what, done, total)


SILENT = Reporter(lambda line: None, lambda progress: None)
QUIET_SECONDS = 5.0
"""Reading that takes less is not worth a line."""
LINE_SECONDS = 60.0
"""Without a terminal a search says something at least so often."""


@contextmanager
def make_reporter(quiet: bool = False, results_on_stdout: bool = False) -> Iterator[Reporter]:
    """The reporter of a command: only process 0 of a multi-host run reports.

    A bar goes to standard error where that is a terminal; else lines go to standard output, as into a log.

    Args:
        quiet: report nothing.
        results_on_stdout: standard output is for a machine to read: lines go to standard error.
    """
    import jax
    from rich.console import Console

    if quiet or jax.process_index() != 0:
        yield SILENT
        return
    # square brackets and colons in paths and shapes are no markup, no emoji
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:

        def line(text: str) -> None:
            print(text, file=sys.stderr if results_on_stdout else sys.stdout, flush=True)

        yield Reporter(line, advance_lines(line), read_lines(line))
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("search", total=None, visible=False, facts="")
        meter = Meter()

        def advance(now: Progress) -> None:
            facts = ", ".join(meter.facts(now))
            bars.update(bar, description=_phase(now), completed=now.done, total=now.total, facts=facts,
                        visible=now.done < now.total)  # fmt: skip

        def say(text: str) -> None:
            bars.console.print(text)

        yield Reporter(say, advance, read_lines(say))


class Meter:
    """Rates and the remaining time, from the first report with something done: by then all is compiled."""

    def __init__(self) -> None:
        """``facts`` of the first report begins to count."""
        self._first: Progress | None = None
        self._last: Progress | None = None
        self._clock = 0.0

    def facts(self, now: Progress) -> list[str]:
        """In words, what is known of: best, loss, masks and examples a second, budget spent, time left."""
        first, last, clock = self._first, self._last, time.monotonic()
        if first is None or last is None or not first.done or _other(now, last):
            self._first, self._clock, first = now, clock, now
        self._last = now
        facts = [f"best {now.best:.4f}"] if now.best is not None else []
        facts += [f"loss {now.loss:.4f}"] if now.loss is not None else []
        seconds = clock - self._clock
        if seconds > 0:
            for name in ("masks", "examples"):
                if many := getattr(now, name) - getattr(first, name):
                    facts.append(f"{_rate(many / seconds)} {name}/s")
        if now.budget is not None:
            facts.append(f"{now.spent / now.budget:.0%} of the budget of {now.budget} example-evaluations")
        elif now.spent:
            facts.append(f"{now.spent} example-evaluations")
        left = self._left(now, first, seconds)
        return [*facts, f"{_clock(left)} left"] if left is not None else facts

    @staticmethod
    def _left(now: Progress, first: Progress, seconds: float) -> float | None:
        """Seconds until the units or the budget end, whichever is first; a search may stop earlier."""
        times = []
        if now.done > first.done:
            times.append((now.total - now.done) * seconds / (now.done - first.done))
        if now.budget is not None and now.spent > first.spent:
            times.append(max(0, now.budget - now.spent) * seconds / (now.spent - first.spent))
        return min(times) if times and now.done < now.total else None


def advance_lines(say: Callable[[str], None]) -> Callable[[Progress], None]:
    """``Reporter.advance`` that says a line for every tenth of the work, and at least every minute."""
    meter, said = Meter(), {"tenth": -1, "time": time.monotonic(), "phase": ""}

    def advance(now: Progress) -> None:
        facts, tenth, clock = meter.facts(now), now.done * 10 // max(1, now.total), time.monotonic()
        phase = _phase(now)
        if phase == said["phase"] and tenth == said["tenth"] and clock - said["time"] < LINE_SECONDS:
            return
        said.update(tenth=tenth, time=clock, phase=phase)
        say(f"{phase}: {now.unit} {now.done} of {now.total}" + "".join(f", {fact}" for fact in facts))

    return advance


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


def _phase(now: Progress) -> str:
    return now.phase if now.seed is None else f"{now.phase}, seed {now.seed}"


def _other(now: Progress, last: Progress) -> bool:
    """Whether another search or training has begun."""
    return _phase(now) != _phase(last) or now.done < last.done


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
