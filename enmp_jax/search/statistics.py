"""Is a difference more than luck? Paired bootstrap intervals over examples, and Holm's correction over rows.

Two models are compared on the same examples, so that both get the same resample, drawn within every task
(each task keeps its number of examples). Efron and Tibshirani, "An Introduction to the
Bootstrap", 1993, chapters 13 and 16; Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

RESAMPLES = 10_000
LEVEL = 0.95
DRAWS = 10**7
"""Most counts of a resample's examples that are held at a time."""


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


class Sample(NamedTuple):
    """The examples of a split, and how a model's values on them make its score.

    A task's score is the sum of its values by the sum of its units, or ``exp`` of that: accuracy, of
    answers that are 1 or 0 and count as one unit each; the likelihood of a token, of the log-likelihoods of
    completions, whose units are tokens.

    Attributes:
        task: the task of each example.
        weight: of every task's score in the mean: 1 / (tasks * reference score) for the mean normalised
            accuracy.
        units: of each example; None: 1 each.
        likelihood: which tasks' scores are likelihoods; None: none.
    """

    task: Int[np.ndarray, " example"]
    weight: Float[np.ndarray, " task"]
    units: Float[np.ndarray, " example"] | None = None
    likelihood: Bool[np.ndarray, " task"] | None = None

    def is_likelihood(self, task: int) -> bool:
        """Whether the score of a task is a likelihood."""
        return self.likelihood is not None and bool(self.likelihood[task])

    def units_of(self, task: int) -> Float[np.ndarray, " own"]:
        """Units of a task's examples."""
        own = self.task == task
        return np.ones(own.sum()) if self.units is None else np.asarray(self.units, float)[own]

    def scores(self, values: Float[np.ndarray, "*model example"]) -> Float[np.ndarray, "*model task"]:
        """Scores of every task."""
        found = []
        for i in range(len(self.weight)):
            mean = values[..., self.task == i].sum(axis=-1) / self.units_of(i).sum()
            found.append(np.exp(mean) if self.is_likelihood(i) else mean)
        return np.stack(found, axis=-1)

    def mean(self, values: Float[np.ndarray, "*model example"]) -> Float[np.ndarray, "*model"]:
        """The weighted mean of the tasks' scores."""
        return np.asarray(self.scores(values) @ self.weight)


def paired_bootstrap(
    values: Float[np.ndarray, "*model example"],
    other: Float[np.ndarray, "*other example"],
    sample: Sample,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The interval of the difference of two models' weighted mean scores.

    Args:
        values: of a model on each example, or of several, whose scores are averaged.
        other: of the model, or models, that it is compared with.
        sample: the examples.
        resamples: how many.
        seed: of the resampling.
    """
    random = np.random.default_rng(seed)
    measured, drawn = 0.0, np.zeros(resamples)
    for i, factor in enumerate(sample.weight):
        own = sample.task == i
        sides = [np.atleast_2d(np.asarray(side, float)[..., own]) for side in (values, other)]
        if sample.is_likelihood(i):
            one, all_of_them = _likelihoods(sides, sample.units_of(i), resamples, random)
        else:
            one, all_of_them = _means(sides[0].mean(axis=0) - sides[1].mean(axis=0), resamples, random)
        measured += factor * one
        drawn += factor * all_of_them
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    # the measured data count as one resample: a p-value of 0 is more than resamples can show
    both = [(np.sum(side) + 1) / (resamples + 1) for side in (drawn <= 0, drawn >= 0)]
    return Interval(float(measured), float(low), float(high), float(min(1.0, 2 * min(both))))


def _means(
    difference: Float[np.ndarray, " example"], resamples: int, random: np.random.Generator
) -> tuple[float, Float[np.ndarray, " resample"]]:
    """The mean, measured and resampled.

    A resample is known by how often each distinct difference comes up, which is a multinomial draw: its cost
    does not grow with the number of examples.
    """
    values, counts = np.unique(difference, return_counts=True)
    n = counts.sum()
    return (values @ counts) / n, (random.multinomial(n, counts / n, size=resamples) @ values) / n


def _likelihoods(
    sides: Sequence[Float[np.ndarray, "_ example"]],
    units: Float[np.ndarray, " example"],
    resamples: int,
    random: np.random.Generator,
) -> tuple[float, Float[np.ndarray, " resample"]]:
    """The difference of two mean likelihoods, measured and resampled."""
    columns = np.concatenate([*sides, units[None]]).T  # [example, model]: all are summed over the same draws
    n, models = len(columns), len(sides[0])

    def difference(sums: np.ndarray) -> np.ndarray:
        likelihood = np.exp(sums[..., :-1] / sums[..., -1:])
        return np.asarray(likelihood[..., :models].mean(axis=-1) - likelihood[..., models:].mean(axis=-1))

    drawn, most = [], max(1, DRAWS // n)
    for start in range(0, resamples, most):
        counts = random.multinomial(n, np.full(n, 1 / n), size=min(most, resamples - start))
        drawn.append(difference(counts @ columns))
    return float(difference(columns.sum(axis=0))), np.concatenate(drawn)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the given order: below alpha in all that may be rejected together at alpha."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
