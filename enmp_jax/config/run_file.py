"""Run files: what stands in one, as frozen dataclasses, and the checks that their types cannot make.

Relative paths in a run file are relative to the run file; ``package:demo/base`` means a file
shipped in ``enmp_jax/suites``. A run file may extend another one: see ``config.compose``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enmp_jax.config import compose
from enmp_jax.config.paths import SUITES, resolve_path  # noqa: F401 (found here by users of run files)
from enmp_jax.config.schema import parse
from enmp_jax.config.sections import (
    BaseConfig,
    EvaluationConfig,
    ExportConfig,
    MergeConfig,
    PretrainConfig,
    SearchConfig,
    TaskConfig,
    TrainConfig,
)
from enmp_jax.errors import UserError, shown
from enmp_jax.io.files import is_file_name

_MOST = {"batch_size": 10**6, "rank": 65536, "finalists": 10**6, "seeds": 10**4, "max_length": 10**6}
_MOST_MASKS = 10**8  # the archive of a search has a row for each
_MOST_FLOAT = 1e9
_MOST_SCALE = 1e4


@dataclass(frozen=True)
class RunConfig:
    """A whole run file."""

    base: BaseConfig
    tasks: tuple[TaskConfig, ...]
    merge: MergeConfig = field(default_factory=MergeConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    pretrain: PretrainConfig | None = None
    root: Path = field(default=Path(), metadata={"internal": True})
    """Directory that relative paths start from (the run file's)."""

    def path(self, value: str) -> str:
        """Resolve ``package:`` and relative paths; hub ids (nothing there on disk) stay as they are."""
        return resolve_path(value, self.root)


def load(name: str | Path, *over: Mapping[str, Any]) -> RunConfig:
    """Read and check a run file, with what it extends.

    Args:
        name: its path, or the name of a packaged one.
        over: settings in a run file's plain form, which lie over it.

    Raises:
        UserError: unreadable file, unknown key (the nearest right one is named), wrong type or value.
    """
    data, root = compose.read(RunConfig, str(name))
    for settings in over:
        data = compose.overlay(RunConfig, data, settings)
    run = dataclasses.replace(parse(RunConfig, data, str(name)), root=root.resolve())
    if run.merge.statistics is not None:  # what a merge is made of has to be found again from anywhere
        run = dataclasses.replace(
            run, merge=dataclasses.replace(run.merge, statistics=run.path(run.merge.statistics))
        )
    return check(run)


def check(run: RunConfig) -> RunConfig:
    """Check values that types cannot; returns the run unchanged.

    Raises:
        UserError: the first value that is out of range.
    """
    names = [task.name for task in run.tasks]
    if not names:
        raise UserError("tasks: at least one task is needed")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"tasks: two tasks are named {name!r}; give each its own name")
        if not is_file_name(name):
            raise UserError(
                f"tasks: the name {shown(name)} cannot be a file name: at most 200 bytes, no . in front, "
                'none of / \\ : * ? " < > |'
            )
    search, evaluation, train = run.search, run.evaluation, run.train
    positive: dict[str, float] = {
        "search.population": search.population, "search.generations": search.generations,
        "search.sigma0": search.sigma0, "search.finalists": search.finalists, "search.seeds": search.seeds,
        "search.generations_per_dispatch": search.generations_per_dispatch,
        "search.checkpoint_every": search.checkpoint_every, "evaluation.batch_size": evaluation.batch_size,
        "train.steps": train.steps, "train.batch_size": train.batch_size, "train.rank": train.rank,
        "train.learning_rate": train.learning_rate, "train.alpha": train.alpha,
        "train.epochs": 1 if train.epochs is None else train.epochs,
    }  # fmt: skip
    for key, value in positive.items():
        if not value > 0:
            raise UserError(f"{key} is {value}: it must be above 0")
    _check_sizes(run)
    if not 0 <= search.max_pruned <= 1:
        raise UserError(f"search.max_pruned is {search.max_pruned}: it must lie in 0..1")
    _check_racing(search)
    if search.cross_fit and search.strategy != "gradient":
        raise UserError(
            f"search.cross_fit follows a gradient, and search.strategy {search.strategy} has none: take "
            "strategy gradient, or cross_fit false"
        )
    if not 0 <= evaluation.seed < 2**32:
        raise UserError(
            f"evaluation.seed is {evaluation.seed}: it must be a whole number from 0 to {2**32 - 1}"
        )
    if run.merge.scale == "auto" and not run.merge.scale_grid:
        raise UserError("merge.scale_grid is empty: give at least one scale, or set merge.scale")
    for task in run.tasks:
        if task.reference is not None and not 0 < task.reference <= 1:
            raise UserError(f"tasks.{task.name}.reference is {task.reference}: scores lie in 0..1")
    return run


def _check_sizes(run: RunConfig) -> None:
    """Whole numbers that memory would not bear, seeds that are none, factors that no float32 bears."""
    search = run.search
    sections = (search, run.evaluation, run.train, run.pretrain, search.refine)
    for name, section in zip(("search", "evaluation", "train", "pretrain", "search.refine"), sections):
        for f in () if section is None else dataclasses.fields(section):
            value = getattr(section, f.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if isinstance(value, float) or f.name == "seed":
                if not abs(value) <= (2**31 - 1 if f.name == "seed" else _MOST_FLOAT):
                    raise UserError(f"{name}.{f.name} is {shown(value)}: that is too large")
            elif not 0 <= value <= (most := _MOST.get(f.name, 10**9)):
                raise UserError(f"{name}.{f.name} is {shown(value)}: it must lie in 0..{most}")
    for task in run.tasks:
        if not 0 < task.data.max_length <= _MOST["max_length"]:
            raise UserError(f"tasks.{task.name}.data.max_length is {task.data.max_length}: out of range")
    if search.seed + search.seeds >= 2**31 or not abs(run.merge.seed or 0) < 2**31:
        raise UserError("search.seed and merge.seed must be below 2^31")
    masks = search.population * search.generations * search.seeds
    if masks > _MOST_MASKS:
        raise UserError(
            f"search.population x generations x seeds is {masks}: more than {_MOST_MASKS} masks are not kept"
        )
    scales = () if run.merge.scale == "auto" else (run.merge.scale,)
    for value in (*run.merge.scale_grid, *scales):
        if not abs(value) <= _MOST_SCALE:
            raise UserError(f"merge.scale is {value:g}: it must lie in -{_MOST_SCALE:g}..{_MOST_SCALE:g}")


def _check_racing(search: SearchConfig) -> None:
    rising = all(a < b for a, b in itertools.pairwise((0.0, *search.rungs)))
    if not rising or not search.rungs or search.rungs[-1] != 1:
        raise UserError(
            f"search.rungs is {list(search.rungs)}: shares of the search split must be above 0 and rise to 1"
        )
    if search.fidelity == "none":
        return
    if search.objective != "mean":
        raise UserError(
            f"search.fidelity racing does not work with search.objective {search.objective}: take mean, or "
            "fidelity none"
        )
    if search.fitness == "calibrated":
        raise UserError(
            "search.fidelity racing does not work with search.fitness calibrated, which has no value per "
            "example: take log_likelihood, or fidelity none"
        )
    if search.fitness == "expert_hidden":
        raise UserError(
            "search.fidelity racing does not work with search.fitness expert_hidden, which looks at hidden "
            "states: take expert_kl, or fidelity none"
        )
    if search.strategy == "gradient":
        raise UserError(
            "search.fidelity racing compares masks, and search.strategy gradient has none: take fidelity none"
        )


def skip_bad_images(run: RunConfig) -> RunConfig:
    """The run with ``skip_bad`` in every task's data, those of the pretraining included."""

    def skip(tasks: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            dataclasses.replace(task, data=dataclasses.replace(task.data, skip_bad=True)) for task in tasks
        )

    pretrain = run.pretrain and dataclasses.replace(run.pretrain, tasks=skip(run.pretrain.tasks))
    return dataclasses.replace(run, tasks=skip(run.tasks), pretrain=pretrain)
