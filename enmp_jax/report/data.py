"""What a run directory says, read back and checked: plain data for plots, report and tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from enmp_jax.errors import UserError, one_line, reason


class Fitness(NamedTuple):
    """How to call a kind of fitness, and whether its values are shares of 1 (shown in per cent)."""

    label: str
    is_share: bool = False


FITNESS = {
    "accuracy": Fitness("mean normalised accuracy", is_share=True),
    "log_likelihood": Fitness("mean log-likelihood"),
}
"""Names for people; a kind that is not here goes by its own name."""


@dataclass(frozen=True)
class Generation:
    """A line of ``history.jsonl``."""

    seed: int
    masks_evaluated: int
    best: float  # so far
    fitness: np.ndarray  # of the members, NaN where an evaluation failed


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
    def fitness(self) -> Fitness:
        """What the search maximised."""
        kind = str((self.config.get("search") or {}).get("fitness", "accuracy"))
        return FITNESS.get(kind) or Fitness(kind.replace("_", " "))

    @property
    def plain_fitness(self) -> float | None:
        """Fitness of the plain merge on the search split, at the best scale tried; None if not recorded."""
        grid = self.scores.get("scale_grid")
        return max(grid.values()) if isinstance(grid, Mapping) and grid else None

    def by_seed(self) -> dict[int, list[Generation]]:
        """The history of every search, in order."""
        seeds: dict[int, list[Generation]] = {}
        for generation in self.history:
            seeds.setdefault(generation.seed, []).append(generation)
        return seeds

    @property
    def has_weights(self) -> bool:
        """Whether modules have weights in the merge, not only in or out."""
        return bool(self.mask.get("weights"))

    @property
    def projections(self) -> int:
        """How many projections a cell (layer, task) stands for."""
        return len(self.mask["projections"]) if self.mask["granularity"] == "projection" else 1

    def pruned_share(self) -> tuple[np.ndarray, int]:
        """How many modules are pruned in each [layer, task], and how many a cell stands for."""
        tasks = list(self.mask["tasks"])
        count = np.zeros((int(self.mask["layers"]), len(tasks)), int)
        for layer, *_, task in self.mask["pruned"]:
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
    config = _read(run_dir / "config.yaml", yaml.safe_load)
    environment = _read(run_dir / "environment.json", json.loads)
    lines = _text(run_dir / "history.jsonl").splitlines()
    mask = _read(run_dir / "mask.json", json.loads)
    scores = _read(run_dir / "scores.json", json.loads)
    history = []
    for number, line in enumerate(lines, 1):
        try:
            history.append(_generation(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{run_dir / 'history.jsonl'} is damaged in line {number}") from None
    checks = (("config.yaml", _check_config, config), ("scores.json", _check_scores, scores),
              ("mask.json", _check_mask, mask))  # fmt: skip
    for name, check, content in checks:
        try:
            check(content)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(
                f"{run_dir / name} is damaged: {type(error).__name__} at {one_line(error)}"
            ) from None
    return RunData(run_dir.resolve().name, config, environment, tuple(history), mask, scores)


def _generation(record: Mapping[str, Any]) -> Generation:
    fitness = np.array([math.nan if f is None else float(f) for f in record["fitness"]])
    best = record.get("best")
    return Generation(
        int(record.get("seed", 0)),
        int(record["masks_evaluated"]),
        math.nan if best is None else float(best),
        fitness,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} has no {path.name}: the search there has not finished (continue with --resume)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None


def _read(path: Path, parse: Any) -> Mapping[str, Any]:
    try:
        data = parse(_text(path))
    except (ValueError, yaml.YAMLError) as error:
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
    for column in ("reference", "merged", "enmp"):
        for task in scores["tasks"]:
            float(scores[column][task])
    for column in ("merged", "enmp"):
        float(scores["mean_normalised"][column])
    for _layer, *_, _task in scores["pruned"]:
        pass
    for seed in scores.get("seeds") or []:
        for key in ("seed", "pruned", "mean_normalised", "gain"):
            float(seed[key])
    for value in dict(scores.get("gain") or {}).values():
        float(value or 0)
    for value in dict(scores.get("scale_grid") or {}).values():
        float(value)
    for sizes in dict(scores.get("splits") or {}).values():
        for size in sizes.values():
            float(size)


def _check_mask(mask: Mapping[str, Any]) -> None:
    if mask["granularity"] not in ("layer", "projection"):
        raise ValueError(f"granularity {mask['granularity']!r}")
    known = list(mask["projections"]) if mask["granularity"] == "projection" else []
    weighted = mask.get("weights") or []
    for *_, weight in weighted:
        if not math.isfinite(weight):
            raise ValueError(f"weight {weight}")
    for module in (*mask["pruned"], *(module for *module, _ in weighted)):
        layer, *projection, task = module
        if task not in mask["tasks"] or not 0 <= layer < mask["layers"] or len(projection) != bool(known):
            raise ValueError(f"module {':'.join(map(str, module))}")
        if projection and projection[0] not in known:
            raise ValueError(f"projection {projection[0]!r}")
