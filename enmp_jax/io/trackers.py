"""Experiment trackers for ``--tracker``: none is a dependency, each is imported when it is asked for."""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from enmp_jax.errors import UserError, one_line
from enmp_jax.io.progress import Progress, Reporter

PROJECT = "enmp"
Metrics = Mapping[str, float]


class Session(NamedTuple):
    """A begun run of a tracker: ``log(metrics, step)`` and ``finish()``."""

    log: Callable[[Metrics, int], None]
    finish: Callable[[], None]


def _tensorboard(module: Any, directory: Path, settings: Mapping[str, Any]) -> Session:
    writer = module.SummaryWriter(str(directory / "tensorboard"))

    def log(metrics: Metrics, step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return Session(log, writer.close)


def _wandb(module: Any, directory: Path, settings: Mapping[str, Any]) -> Session:
    run = module.init(project=PROJECT, name=directory.name, config=dict(settings))
    run.define_metric("*", step_metric="step")  # seeds and phases begin at 0 again, which wandb's own may not
    return Session(lambda metrics, step: run.log({**metrics, "step": step}), run.finish)


def _trackio(module: Any, directory: Path, settings: Mapping[str, Any]) -> Session:
    module.init(project=PROJECT, name=directory.name, config=dict(settings))
    return Session(lambda metrics, step: module.log(dict(metrics), step=step), module.finish)


def _mlflow(module: Any, directory: Path, settings: Mapping[str, Any]) -> Session:
    module.set_experiment(PROJECT)
    module.start_run(run_name=directory.name)
    module.log_dict(dict(settings), "config.json")
    return Session(lambda metrics, step: module.log_metrics(dict(metrics), step=step), module.end_run)


class Kind(NamedTuple):
    """A tracker: modules that will do, the package to install, and how a run begins."""

    modules: tuple[str, ...]
    package: str
    begin: Callable[[Any, Path, Mapping[str, Any]], Session]


TRACKERS = {
    "tensorboard": Kind(("tensorboardX", "torch.utils.tensorboard"), "tensorboardX", _tensorboard),
    "wandb": Kind(("wandb",), "wandb", _wandb),
    "trackio": Kind(("trackio",), "trackio", _trackio),
    "mlflow": Kind(("mlflow",), "mlflow", _mlflow),
}


class Tracking:
    """What a command reports, to a tracker too.

    One that fails is told of once and left out: a search is worth more than its log.

    Attributes:
        reporter: reports as before, and every step to the tracker.
    """

    def __init__(self, name: str, directory: Path, settings: Mapping[str, Any], reporter: Reporter) -> None:
        """Find the tracker; its run begins with the first step, when the run directory is there.

        Raises:
            UserError: it is not installed.
        """
        self._module, self._begin = _module(name), TRACKERS[name].begin
        self._name, self._directory, self._settings = name, directory, settings
        self._say, self._advance = reporter.say, reporter.advance
        self._session: Session | None = None
        self._failed = False
        self.reporter = reporter._replace(advance=self._on_advance)

    def final(self, scores: Mapping[str, Any]) -> None:
        """Log the final scores (``scores.json``)."""
        self._call(lambda session: session.log(final_metrics(scores), 0))

    def finish(self) -> None:
        """End the tracker's run, if one has begun."""
        if self._session is not None:
            self._call(lambda session: session.finish())

    def _on_advance(self, now: Progress) -> None:
        self._advance(now)
        self._call(lambda session: session.log(step_metrics(now), now.done))

    def _call(self, use: Callable[[Session], None]) -> None:
        if self._failed:
            return
        try:
            with contextlib.redirect_stdout(sys.stderr):  # standard output is for the result
                if self._session is None:
                    self._session = self._begin(self._module, self._directory, self._settings)
                use(self._session)
        except Exception as error:  # whatever the tracker raises: network, login, disk
            self._failed = True
            self._say(f"{self._name} has failed and is left out from here on: {one_line(error, 200)}")


@contextlib.contextmanager
def tracking(
    name: str | None, directory: Path, settings: Mapping[str, Any], reporter: Reporter
) -> Iterator[Tracking | None]:
    """Track what happens inside; None without a tracker, and on all processes but the first.

    Raises:
        UserError: the tracker is not installed.
    """
    import jax

    if name is None or jax.process_index():
        yield None
        return
    found = Tracking(name, directory, settings, reporter)
    try:
        yield found
    finally:
        found.finish()


def step_metrics(now: Progress) -> dict[str, float]:
    """What is logged of a generation or step, as ``search/best`` or ``search/seed-1/best``."""
    phase = now.phase if now.seed is None else f"{now.phase}/seed-{now.seed}"
    known = {
        "best": now.best, "mean": now.mean, "loss": now.loss, "example_evaluations": now.spent or None,
    }  # fmt: skip
    given = {f"{phase}/{name}": float(value) for name, value in known.items() if value is not None}
    return {name: value for name, value in given.items() if math.isfinite(value)}


def final_metrics(scores: Mapping[str, Any]) -> dict[str, float]:
    """What is logged of the final scores, as ``test/enmp/TASK`` and ``test/mean_normalised/enmp``."""
    found: dict[str, float] = {}
    for part in ("reference", "base", "merged", "enmp", "refined", "mean_normalised"):
        values = scores.get(part)
        if isinstance(values, Mapping):
            found |= {f"test/{part}/{key}": float(value) for key, value in values.items()}
    return found


def _module(name: str) -> ModuleType:
    kind = TRACKERS[name]
    for module in kind.modules:
        try:
            return importlib.import_module(module)
        except ImportError:
            continue
    raise UserError(f"--tracker {name}: it is not installed; pip install {kind.package}")
