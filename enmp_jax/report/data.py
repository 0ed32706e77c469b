"""What a run directory says, read back and checked: plain data for plots, report and tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from enmp_jax.config.compose import parse_yaml
from enmp_jax.errors import UserError, one_line
from enmp_jax.report.beside import Beside, read_beside
from enmp_jax.report.damage import DAMAGE, finite, mapping, number, text

FITNESS_LABELS = {
    "accuracy": "normalised accuracy",
    "probability": "normalised expected accuracy",
    "margin": "normalised sigmoid of the margin",
    "log_likelihood": "normalised likelihood",
    "calibrated": "normalised likelihood at the best temperature",
    "expert_margin": "normalised sigmoid of the margin of the expert's class",
    "expert_probability": "normalised probability of the expert's class",
    "expert_kl": "exp(-KL) from the expert",
    "expert_hidden": "exp(-distance) from the expert's hidden states and answers",
    "entropy": "normalised exp(-entropy)",
}
"""Names for people; a kind that is not here goes by its own name. All are relative to the tasks' own experts:
1 is as good as they are."""


@dataclass(frozen=True)
class Generation:
    """A line of ``history.jsonl``: a generation of masks, or a step of a gradient search.

    Attributes:
        seed: of the search.
        masks_evaluated: so far; None where the line does not say.
        example_evaluations: forward passes of one example so far, likewise.
        step: of a gradient search.
        best: fitness so far, NaN if none is finite.
        fitness: of the members, NaN where an evaluation failed; of a gradient search its one point.
        selection: fitness of a gradient search on the selection split, NaN where it did not look.
    """

    seed: int
    masks_evaluated: int | None
    example_evaluations: float | None
    step: int | None
    best: float
    fitness: np.ndarray
    selection: float


@dataclass(frozen=True)
class RunData:
    """A finished run."""

    name: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    history: tuple[Generation, ...]
    mask: Mapping[str, Any]
    scores: Mapping[str, Any]
    beside: Beside = field(default_factory=Beside)

    @property
    def tasks(self) -> list[str]:
        """Task names in merge order."""
        return list(self.scores["tasks"])

    @property
    def fitness_label(self) -> str:
        """What the search maximised, in words."""
        kind = self.scores.get("fitness") or (self.config.get("search") or {}).get("fitness", "accuracy")
        return FITNESS_LABELS.get(str(kind)) or str(kind).replace("_", " ")

    @property
    def plain_fitness(self) -> float | None:
        """Fitness of the plain merge on the search split, at the best scale tried; None if not recorded."""
        grid = self.scores.get("scale_grid") or {}
        return max((value for value in grid.values() if value is not None), default=None)

    def by_seed(self) -> dict[int, list[Generation]]:
        """The history of every search, in order."""
        seeds: dict[int, list[Generation]] = {}
        for generation in self.history:
            seeds.setdefault(generation.seed, []).append(generation)
        return seeds

    @property
    def has_weights(self) -> bool:
        """Whether modules have weights in the merge, not only in or out."""
        return any(weight for *_, weight in self.mask.get("weights") or ())

    @property
    def projections(self) -> list[str]:
        """Templates of the projections that are modules of their own; none where a module is all of them."""
        return list(self.mask["projections"]) if self.mask["granularity"] == "projection" else []

    def by_module(self, entries: Iterable[Sequence[Any]], default: float) -> np.ndarray:
        """Values of modules, ``[*module, value]`` each, as an array [layer, projection, task].

        Args:
            entries: of any order; what this run has no place for is left out.
            default: of modules that are not listed.
        """
        tasks = {task: i for i, task in enumerate(self.mask["tasks"])}
        columns = {name: i for i, name in enumerate(self.projections)} or {"": 0}
        values = np.full((int(self.mask["layers"]), len(columns), len(tasks)), default)
        for layer, *middle, task, value in entries:
            column, row = columns.get(middle[0] if middle else ""), tasks.get(task)
            if column is not None and row is not None and 0 <= layer < len(values):
                values[layer, column, row] = np.nan if value is None else value
        return values

    def weights_of(self, winner: Mapping[str, Any]) -> np.ndarray:
        """Weights [layer, projection, task] of a mask as ``mask.json`` lists it: what it does not list has
        weight 1, or 0 if pruned."""
        pruned = [(*module, 0.0) for module in winner["pruned"]]
        return self.by_module([*pruned, *(winner.get("weights") or ())], 1.0)


def read(run_dir: Path) -> RunData:
    """Read a finished run directory.

    Raises:
        UserError: a file is missing or damaged; the line names it.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a directory: give the --out directory of a search")
    config = _read(run_dir / "config.yaml", _yaml)
    environment = _read(run_dir / "environment.json", json.loads)
    lines = text(run_dir / "history.jsonl").splitlines()
    mask = _read(run_dir / "mask.json", json.loads)
    scores = _read(run_dir / "scores.json", json.loads)
    history = []
    for at, line in enumerate(lines, 1):
        try:
            history.append(_generation(json.loads(line)))
        except DAMAGE:
            raise UserError(f"{run_dir / 'history.jsonl'} is damaged in line {at}") from None
    checks = (("config.yaml", _check_config, config), ("scores.json", _check_scores, scores),
              ("mask.json", _check_mask, mask))  # fmt: skip
    for name, check, content in checks:
        try:
            check(content)
        except DAMAGE as error:
            raise UserError(
                f"{run_dir / name} is damaged: {type(error).__name__} at {one_line(error)}"
            ) from None
    beside = read_beside(run_dir)
    return RunData(run_dir.resolve().name, config, environment, tuple(history), mask, scores, beside)


_MAX_LAYERS = _MAX_TASKS = 100_000


def _yaml(text: str) -> Any:
    try:
        return parse_yaml(text, "the file")
    except UserError as error:
        raise ValueError(error) from None


def _generation(record: Mapping[str, Any]) -> Generation:
    masks, examples, step = (record.get(key) for key in ("masks_evaluated", "example_evaluations", "step"))
    if masks is None and examples is None and step is None:
        raise KeyError("masks_evaluated")
    return Generation(
        int(record.get("seed", 0)),
        None if masks is None else int(masks),
        None if examples is None else float(examples),
        None if step is None else int(step),
        number(record.get("best")),
        np.array([number(value) for value in record["fitness"]]),
        number(record.get("selection")),
    )


def _read(path: Path, parse: Any) -> Mapping[str, Any]:
    try:
        return mapping(parse(text(path)))
    except DAMAGE as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from None


def _check_config(config: Mapping[str, Any]) -> None:
    for section in ("base", "merge", "search", "evaluation"):
        dict(config.get(section) or {})
    for task in config.get("tasks") or []:
        str(task["name"])
        dict(task.get("data") or {})


def _check_scores(scores: Mapping[str, Any]) -> None:
    _check_tasks(scores["tasks"])
    for column in ("reference", "merged", "enmp", *(["base"] if "base" in scores else [])):
        for task in scores["tasks"]:
            finite(scores[column][task])
    for column in ("merged", "enmp"):
        finite(scores["mean_normalised"][column])
    for _layer, *_, _task in scores.get("pruned") or []:
        pass
    for seed in scores.get("seeds") or []:
        int(seed["seed"])
        for key in ("pruned", "weighted", "mean_normalised", "gain"):
            number(seed.get(key))
    for key in ("weighted", "modules", "masks_evaluated", "example_evaluations", "masks_per_second"):
        number(scores.get(key))
    for key in ("gain", "scale_grid"):
        for value in dict(scores.get(key) or {}).values():
            number(value)
    for split, models in dict(scores.get("fitness_on") or {}).items():
        if split not in ("search", "selection", "test"):
            raise KeyError(split)
        for value in models.values():
            number(value)
    for point in scores.get("pareto") or []:
        for key in ("mean", "worst", "scale"):
            finite(point[key])
        list(point["pruned"])
    for sizes in dict(scores.get("splits") or {}).values():
        for size in sizes.values():
            float(size)


def _check_tasks(tasks: Any) -> None:
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
        raise TypeError("tasks")
    if len(tasks) > _MAX_TASKS or len(set(tasks)) < len(tasks):
        raise ValueError(f"{len(tasks)} tasks")


def _check_mask(mask: Mapping[str, Any]) -> None:
    if mask["granularity"] not in ("layer", "projection"):
        raise ValueError(f"granularity {mask['granularity']!r}")
    _check_tasks(mask["tasks"])
    if type(mask["layers"]) is not int or not 0 < mask["layers"] <= _MAX_LAYERS:
        raise ValueError(f"layers {one_line(mask['layers'], 40)}")
    tasks = set(mask["tasks"])
    known = list(mask["projections"]) if mask["granularity"] == "projection" else []
    weighted = mask.get("weights") or []
    for *_, weight in weighted:
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight {weight}")
    for module in (*mask["pruned"], *(module for *module, _ in weighted)):
        layer, *projection, task = module
        if type(layer) is not int:
            raise TypeError("a layer")
        if task not in tasks or not 0 <= layer < mask["layers"] or len(projection) != bool(known):
            raise ValueError(f"module {':'.join(map(str, module))}")
        if projection and projection[0] not in known:
            raise ValueError(f"projection {projection[0]!r}")
