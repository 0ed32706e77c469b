"""What a run directory says, read back and checked: plain data for plots, report and tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from enmp_jax.errors import UserError


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
    def fitness_label(self) -> str:
        """What the search maximised."""
        kind = (self.config.get("search") or {}).get("fitness", "accuracy")
        return "mean normalised accuracy" if kind == "accuracy" else "mean log-likelihood"

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

    def pruned_share(self) -> tuple[np.ndarray, np.ndarray]:
        """How many modules are pruned in each [layer, task], and how many a cell stands for."""
        tasks, layers = list(self.mask["tasks"]), int(self.mask["layers"])
        count = np.zeros((layers, len(tasks)), int)
        for layer, *_, task in self.mask["pruned"]:
            count[layer, tasks.index(task)] += 1
        size = len(self.mask.get("projections") or ()) or max(1, int(count.max(initial=0)))
        return count, np.full_like(count, size if self.mask["granularity"] == "projection" else 1)


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
    _check_scores(run_dir / "scores.json", scores)
    _check_mask(run_dir / "mask.json", mask)
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
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _read(path: Path, parse: Any) -> Mapping[str, Any]:
    try:
        data = parse(_text(path))
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    if not isinstance(data, Mapping):
        raise UserError(f"{path} is damaged: it must hold a mapping")
    return data


def _check_scores(path: Path, scores: Mapping[str, Any]) -> None:
    try:
        for column in ("reference", "merged", "enmp"):
            for task in scores["tasks"]:
                float(scores[column][task])
        for column in ("merged", "enmp"):
            float(scores["mean_normalised"][column])
        list(scores["pruned"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__} at {error}") from None


def _check_mask(path: Path, mask: Mapping[str, Any]) -> None:
    try:
        for layer, *_, task in mask["pruned"]:
            if task not in mask["tasks"] or not 0 <= layer < mask["layers"]:
                raise ValueError(f"module {layer}:{task}")
        str(mask["granularity"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__} at {error}") from None
