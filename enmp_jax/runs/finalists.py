"""What searches hand to the selection split: masks or weights, and who of them wins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.masks import Keep, MaskSpec


@dataclass
class Finalist:
    """A mask, or weights of modules, that the selection split decides on."""

    seed: int
    keep: Shaped[np.ndarray, "*module"]
    """bool: a mask; float: weights."""
    scale: float
    search: float | None
    """Fitness on the search split; None: the search never scored it."""
    selection: float = float("nan")

    @property
    def pruned(self) -> int:
        """Number of modules left out."""
        return int(np.sum(np.asarray(self.keep) == 0))

    @property
    def plain(self) -> bool:
        """Whether this is the plain merge."""
        return bool((np.asarray(self.keep) == 1).all())


class Searched(NamedTuple):
    """The finalists of all seeds, and what they cost (keys of ``scores.json``)."""

    finalists: list[Finalist]
    cost: dict[str, Any]


def with_plain(evaluator: Evaluator, found: list[Finalist], scale: float) -> list[Finalist]:
    """The finalists and, for every seed, the plain merge: pruning must win its place."""
    search = evaluator.loaded.run.search
    plain = evaluator.loaded.mask_spec.all_kept()
    missing = [
        Finalist(seed, plain, scale, None)
        for seed in range(search.seed, search.seed + search.seeds)
        if not any(f.seed == seed and f.plain and f.scale == scale for f in found)
    ]
    return [*found, *missing]


def select(evaluator: Evaluator, candidates: list[Finalist]) -> dict[int, Finalist]:
    """Score finalists on the selection split; the best of every seed."""
    scoring = evaluator.scoring("selection")
    as_weights = any(f.keep.dtype != bool for f in candidates)
    keep = np.stack([f.keep.astype(np.float32) if as_weights else f.keep for f in candidates])
    scales = np.asarray([f.scale for f in candidates], np.float32)
    fitness = evaluator.fitness_of(evaluator.inputs("selection"), scoring, keep, scales)
    winners: dict[int, Finalist] = {}
    for candidate, value in zip(candidates, fitness, strict=True):
        candidate.selection = float(value)
        known = winners.get(candidate.seed)
        if known is None or rank(candidate) > rank(known):
            winners[candidate.seed] = candidate
    return dict(sorted(winners.items()))


def listed(spec: MaskSpec, keep: Keep) -> dict[str, Any]:
    """The modules of a mask or weights by name, as ``mask.json`` has them."""
    entry: dict[str, Any] = {"pruned": [list(module) for module in spec.pruned_modules(keep)]}
    if keep.dtype != bool:
        entry["weights"] = [list(module) for module in spec.weighted_modules(keep)]
    return entry


def rank(finalist: Finalist) -> tuple[float, bool, int, float]:
    """Better on the selection split; ties: the plain merge, fewer modules pruned, better on the search
    split. NaN is last."""

    def number(value: float | None) -> float:
        return -np.inf if value is None or np.isnan(value) else float(value)

    return number(finalist.selection), finalist.plain, -finalist.pruned, number(finalist.search)


def finite_or_none(value: float | None) -> float | None:
    """For JSON, which has no NaN."""
    return float(value) if value is not None and np.isfinite(value) else None
