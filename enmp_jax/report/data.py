"""What a run directory says, read back and checked: plain data for plots, report and tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from enmp_jax.config.compose import parse_yaml
from enmp_jax.errors import UserError, one_line, reason
from enmp_jax.io.files import is_file

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
    def projections(self) -> int:
        """How many projections a cell (layer, task) stands for."""
        return len(self.mask["projections"]) if self.mask["granularity"] == "projection" else 1

    def pruned_share(self) -> tuple[np.ndarray, int]:
        """How many modules are pruned in each [layer, task], and how many a cell stands for."""
        tasks = list(self.mask["tasks"])
        count = np.zeros((int(self.mask["layers"]), len(tasks)), int)
        # once where both lists have it
        zero = {tuple(module) for *module, weight in self.mask.get("weights") or () if not weight}
        for layer, *_, task in zero | {tuple(module) for module in self.mask["pruned"]}:
            count[layer, tasks.index(task)] += 1
        return count, self.projections

    def weights(self) -> np.ndarray:
        """Weight in the merge of each [layer, task], of several projections the mean.

        ``mask.json`` lists ``[*module, weight]``; what it does not list has weight 1, or 0 if pruned.
        """
        tasks = list(self.mask["tasks"])
        weights = {tuple(module): 0.0 for module in self.mask["pruned"]}
        weights |= {tuple(module): float(weight) for *module, weight in self.mask["weights"]}
        total = np.full((int(self.mask["layers"]), len(tasks)), float(self.projections))
        for (layer, *_, task), weight in weights.items():
            total[layer, tasks.index(task)] += weight - 1
        return total / self.projections


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
    lines = _text(run_dir / "history.jsonl").splitlines()
    mask = _read(run_dir / "mask.json", json.loads)
    scores = _read(run_dir / "scores.json", json.loads)
    history = []
    for number, line in enumerate(lines, 1):
        try:
            history.append(_generation(json.loads(line)))
        except _DAMAGE:
            raise UserError(f"{run_dir / 'history.jsonl'} is damaged in line {number}") from None
    checks = (("config.yaml", _check_config, config), ("scores.json", _check_scores, scores),
              ("mask.json", _check_mask, mask))  # fmt: skip
    for name, check, content in checks:
        try:
            check(content)
        except _DAMAGE as error:
            raise UserError(
                f"{run_dir / name} is damaged: {type(error).__name__} at {one_line(error)}"
            ) from None
    return RunData(run_dir.resolve().name, config, environment, tuple(history), mask, scores)


_DAMAGE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_MAX_BYTES = 2**28
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
        _number(record.get("best")),
        np.array([_number(value) for value in record["fitness"]]),
        _number(record.get("selection")),
    )


def _number(value: Any) -> float:
    """JSON has no NaN, but null."""
    if isinstance(value, str | bool):
        raise TypeError(f"a {type(value).__name__} where a number belongs")
    return math.nan if value is None else float(value)


def _finite(value: Any) -> float:
    """A number that can be drawn."""
    if not abs(_number(value)) < 1e6:  # NaN is not smaller either
        raise ValueError(f"the number {one_line(value, 40)}")
    return float(value)


def _text(path: Path) -> str:
    if not is_file(path):
        raise UserError(
            f"{path.parent} has no {path.name}: the search there has not finished (continue with --resume)"
        )
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise UserError(f"{path} has {size} bytes: more than {_MAX_BYTES} are not read")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None


def _read(path: Path, parse: Any) -> Mapping[str, Any]:
    try:
        data = parse(_text(path))
    except _DAMAGE as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from None
    if not isinstance(data, Mapping):
        raise UserError(f"{path} is damaged: it must hold a mapping")
    return data


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
            _finite(scores[column][task])
    for column in ("merged", "enmp"):
        _finite(scores["mean_normalised"][column])
    for _layer, *_, _task in scores.get("pruned") or []:
        pass
    for seed in scores.get("seeds") or []:
        int(seed["seed"])
        for key in ("pruned", "weighted", "mean_normalised", "gain"):
            _number(seed.get(key))
    for key in ("weighted", "modules", "masks_evaluated", "example_evaluations", "masks_per_second"):
        _number(scores.get(key))
    for key in ("gain", "scale_grid"):
        for value in dict(scores.get(key) or {}).values():
            _number(value)
    for point in scores.get("pareto") or []:
        for key in ("mean", "worst", "scale"):
            _finite(point[key])
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
