"""Is a difference more than luck? Paired bootstrap intervals over examples, and Holm's correction over rows.

Two models are compared on the same examples, so what is resampled is the difference on each example, within
every task (each task keeps its number of examples). Efron and Tibshirani, "An Introduction to the
Bootstrap", 1993, chapters 13 and 16; Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 10_000
LEVEL = 0.95


class Interval(NamedTuple):
    """A difference with its percentile interval.

    Attributes:
        difference: as measured.
        low: lower end of the interval.
        high: upper end of the interval.
        p: two-sided p-value of "no difference": twice the share of resamples on the other side of zero.
    """

    difference: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    difference: Float[np.ndarray, " example"],
    task: Int[np.ndarray, " example"],
    weight: Float[np.ndarray, " task"],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The interval of ``sum over tasks of weight * mean of the task's differences``.

    A resample with replacement is known by how often each distinct difference comes up, which is a
    multinomial draw: its cost does not grow with the number of examples.

    Args:
        difference: of the scores of two models on each example.
        task: the task of each example.
        weight: of every task's mean: 1 / (tasks * reference accuracy) for the mean normalised accuracy.
        resamples: how many.
        seed: of the resampling.
    """
    random = np.random.default_rng(seed)
    measured, drawn = 0.0, np.zeros(resamples)
    for i, factor in enumerate(weight):
        values, counts = np.unique(np.asarray(difference, float)[task == i], return_counts=True)
        n = counts.sum()
        measured += factor * (values @ counts) / n
        drawn += factor * (random.multinomial(n, counts / n, size=resamples) @ values) / n
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    # the measured data count as one resample: a p-value of 0 is more than resamples can show
    sides = [(np.sum(side) + 1) / (resamples + 1) for side in (drawn <= 0, drawn >= 0)]
    return Interval(float(measured), float(low), float(high), float(min(1.0, 2 * min(sides))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the given order: below alpha in all that may be rejected together at alpha."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
