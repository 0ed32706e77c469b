"""Masks already scored: how many distinct ones a search saw, and which are its finalists."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float


@dataclass
class Candidate:
    """A distinct mask (with its scale, if that was searched) and how it scored.

    ``fitness`` is the mean of its ``evaluations``, NaN ones left out; ``order`` is the position of
    its first evaluation in the search; ``mean`` and ``worst`` are over tasks, NaN where not recorded.
    """

    keep: Bool[np.ndarray, "*module"]
    scale: float | None
    fitness: float
    evaluations: int
    order: int
    mean: float = math.nan
    worst: float = math.nan


class Memo:
    """All masks scored so far, by their bits and scale. Lives on the host."""

    def __init__(self) -> None:
        self._candidates: dict[tuple[bytes, float | None], Candidate] = {}
        self.evaluated = 0
        self.best = -math.inf
        """The largest fitness so far."""

    def __len__(self) -> int:
        """Number of distinct masks."""
        return len(self._candidates)

    def add(
        self,
        keep: Bool[np.ndarray, "member ..."],
        fitness: Float[np.ndarray, " member"],
        scale: Float[np.ndarray, " member"] | None = None,
        mean: Float[np.ndarray, " member"] | None = None,
        worst: Float[np.ndarray, " member"] | None = None,
    ) -> None:
        """Record scored masks, in the order in which they were evaluated.

        The fitness of masks that were seen but not scored is NaN.
        """
        keep, fitness = np.asarray(keep, bool), np.asarray(fitness)
        for i, mask in enumerate(keep):
            value, coefficient = float(fitness[i]), None if scale is None else float(scale[i])
            self.best = max(self.best, value)
            known = self._candidates.get(_key(mask, coefficient))
            if known is None:
                finite = int(not math.isnan(value))
                candidate = Candidate(mask.copy(), coefficient, value, finite, self.evaluated)
                self._candidates[_key(mask, coefficient)] = candidate
            elif not math.isnan(value):
                n = known.evaluations
                known.fitness = value if n == 0 else (known.fitness * n + value) / (n + 1)
                known.evaluations = n + 1
            if mean is not None and worst is not None and not math.isnan(mean[i]):
                candidate = self._candidates[_key(mask, coefficient)]
                candidate.mean, candidate.worst = float(mean[i]), float(worst[i])
            self.evaluated += 1

    def candidates(self) -> list[Candidate]:
        """All distinct masks, in the order in which they were seen."""
        return list(self._candidates.values())

    def finalists(self, count: int) -> list[Candidate]:
        """The best distinct masks, best first. Ties: fewer modules pruned, then seen earlier.

        Masks whose every fitness was NaN are never finalists.
        """
        scored = [c for c in self._candidates.values() if not math.isnan(c.fitness)]
        return sorted(scored, key=lambda c: (-c.fitness, _n_pruned(c), c.order))[:count]


def front(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The Pareto front of ``mean`` and ``worst``, by rising mean: nobody is better in one and as good in
    the other. Of equals the one with the fewest modules pruned. Those with no mean recorded are left out.
    """
    found: list[Candidate] = []
    recorded = (c for c in candidates if not math.isnan(c.mean))
    for c in sorted(recorded, key=lambda c: (-c.mean, -c.worst, _n_pruned(c), c.order)):
        if not found or c.worst > found[-1].worst:
            found.append(c)
    return found[::-1]


def _n_pruned(candidate: Candidate) -> int:
    return int(np.sum(~candidate.keep))


def _key(mask: np.ndarray, scale: float | None) -> tuple[bytes, float | None]:
    return np.packbits(mask).tobytes(), scale
