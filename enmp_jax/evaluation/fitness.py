"""What a search maximises: a value per example, per task its mean, over tasks an objective.

Accuracy on a few hundred examples is learnt by heart, and the log-likelihood measures confidence as
much as rightness. Smooth accuracies (``probability``, ``margin``) rank masks better on data that the
search never saw, and so do those that need no labels: they ask for the class that the task's own,
unmerged expert would choose. benchmarks/results/search.md has figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from enmp_jax.errors import UserError, suggestion

LogProbabilities = Float[Array, "batch class"]
Values = Float[Array, "batch *temperature"]

TEMPERATURES = tuple(float(t) for t in 2.0 ** np.arange(-2, 4.25, 0.25))
"""Temperatures among which ``calibrated`` finds the best of each task: 1/4 to 16."""


class Fitness(NamedTuple):
    """A fitness kind.

    Attributes:
        name: key of ``FITNESS``.
        label: what an example name of its values means, for figures and tables.
        value: ``value(log_probabilities, label, expert) -> [batch]``, higher is better; ``expert`` are the
            log-probabilities of the task's own unmerged adapter (None where ``needs_expert`` is False).
        needs_labels: whether it looks at the labels.
        needs_expert: whether it looks at the expert's answers.
        has_gradient: False where the derivative is zero almost everywhere.
        logarithmic: values are logarithms, so that they are compared with the expert's own by
            ``exp(value - expert's)`` instead of ``value / expert's``.
        hidden: what ``state_distance`` of hidden states from the expert's is multiplied by before it is
            subtracted from the value; 0: hidden states do not matter (classification only).
    """

    name: str
    label: str
    value: Callable[[LogProbabilities, Int[Array, " batch"], LogProbabilities | None], Values]
    needs_labels: bool = True
    needs_expert: bool = False
    has_gradient: bool = True
    logarithmic: bool = False
    hidden: float = 0.0


def state_distance(
    states: Float[Array, "batch layer width"], expert: Float[Array, "batch layer width"]
) -> Float[Array, " batch"]:
    """Squared distance of hidden states from the expert's, relative to their norm, mean over layers.

    Relative, so that layers of large states do not decide alone.
    """
    squares = jnp.sum((states - expert) ** 2, axis=-1) / jnp.sum(expert**2, axis=-1)
    return squares.mean(axis=-1)


def _of_class(x: LogProbabilities, chosen: Int[Array, " batch"]) -> Float[Array, " batch"]:
    return jnp.take_along_axis(x, chosen[:, None], axis=1)[:, 0]


def _margin(x: LogProbabilities, chosen: Int[Array, " batch"]) -> Float[Array, " batch"]:
    """Sigmoid of how far the logit of a class is above the best other one; 0.5 on the border."""
    others = jnp.where(jax.nn.one_hot(chosen, x.shape[1], dtype=bool), -jnp.inf, x)
    return jax.nn.sigmoid(_of_class(x, chosen) - others.max(axis=1))


def _best(expert: LogProbabilities | None) -> Int[Array, " batch"]:
    assert expert is not None, "this fitness needs the experts' answers"
    return jnp.argmax(expert, axis=1)


def _expectation(p: LogProbabilities, x: LogProbabilities) -> Float[Array, " batch"]:
    """Mean of ``x`` under log-probabilities ``p``; classes that ``p`` excludes count nothing."""
    possible = p > -jnp.inf
    return jnp.sum(jnp.where(possible, jnp.exp(p) * jnp.where(possible, x, 0.0), 0.0), axis=1)


def _calibrated(x: LogProbabilities, label: Int[Array, " batch"]) -> Float[Array, "batch temperature"]:
    # -inf / T stays -inf; its gradient would be NaN
    finite = jnp.where(x > -jnp.inf, x, -1e30)
    scaled = [_of_class(jax.nn.log_softmax(finite / t, axis=1), label) for t in TEMPERATURES]
    return jnp.stack(scaled, axis=1)


FITNESS: dict[str, Fitness] = {
    f.name: f
    for f in (
        Fitness(
            "accuracy", "accuracy",
            lambda x, label, expert: (jnp.argmax(x, axis=1) == label).astype(jnp.float32),
            has_gradient=False,
        ),
        Fitness("probability", "expected accuracy", lambda x, label, expert: jnp.exp(_of_class(x, label))),
        Fitness("margin", "sigmoid of the margin", lambda x, label, expert: _margin(x, label)),
        Fitness(
            "log_likelihood", "likelihood", lambda x, label, expert: _of_class(x, label), logarithmic=True
        ),
        Fitness(
            "calibrated", "likelihood at the best temperature",
            lambda x, label, expert: _calibrated(x, label), logarithmic=True,
        ),
        Fitness(
            "expert_margin", "sigmoid of the margin of the expert's class",
            lambda x, label, expert: _margin(x, _best(expert)), needs_labels=False, needs_expert=True,
        ),
        Fitness(
            "expert_probability", "probability of the expert's class",
            lambda x, label, expert: jnp.exp(_of_class(x, _best(expert))),
            needs_labels=False, needs_expert=True,
        ),
        Fitness(
            "expert_kl", "exp(-KL) from the expert",
            lambda x, label, expert: _expectation(expert, x - expert),  # type: ignore[arg-type,operator]
            needs_labels=False, needs_expert=True, logarithmic=True,
        ),
        Fitness(
            "expert_hidden", "exp(-KL - distance of hidden states) from the expert",
            lambda x, label, expert: _expectation(expert, x - expert),  # type: ignore[arg-type,operator]
            needs_labels=False, needs_expert=True, logarithmic=True, hidden=1.0,
        ),
        Fitness(
            "entropy", "exp(-entropy)", lambda x, label, expert: _expectation(x, x),
            needs_labels=False, logarithmic=True,
        ),
    )
}  # fmt: skip
"""By name. ``entropy`` is AdaMerging's objective (Yang et al., arXiv 2310.02575), a control: nothing keeps it
from being confidently wrong. ``expert_hidden`` is Expert Merging's (Zhang et al., arXiv 2509.25712): hidden
states and logits match the expert's; here pooled states of all layers, and relative distances."""


def get(name: str) -> Fitness:
    """A fitness kind by name.

    Raises:
        UserError: unknown name.
    """
    if name not in FITNESS:
        raise UserError(f"search.fitness: unknown fitness {name!r}; {suggestion(name, FITNESS)}")
    return FITNESS[name]


def task_values(
    total: Float[Array, "..."],  # [*member task], or [*member task temperature]
    examples: Float[Array | np.ndarray, " task"],
    kind: Fitness,
) -> Float[Array, "*member task"]:
    """Mean value per task from sums over examples; of ``calibrated``, at the task's best temperature."""
    if kind.name == "calibrated":
        return (total / examples[:, None]).max(axis=-1)
    return total / examples


def normalised(
    value: Float[Array, "*member task"], expert: Float[Array, " task"], kind: Fitness
) -> Float[Array, "*member task"]:
    """Values relative to those of the tasks' own experts: 1 is as good as the unmerged adapter."""
    return jnp.exp(value - expert) if kind.logarithmic else value / expert


Objective = Literal["mean", "worst", "pareto"]


def objective(
    values: Float[Array, "*member task"], name: Objective, weights: Float[Array, " task"]
) -> Float[Array, " *member"]:
    """One number from the normalised values of all tasks, higher is better.

    ``mean`` is weighted; ``worst`` is the smallest; ``pareto`` their average, which leads a search along
    the front of both.
    """
    mean = (values * weights).sum(axis=-1) / weights.sum()
    if name == "mean":
        return mean
    worst = values.min(axis=-1)
    return worst if name == "worst" else (mean + worst) / 2


def importances(tasks: Sequence[str], given: Mapping[str, float] | None) -> np.ndarray:
    """Weights of tasks in the mean, 1 where nothing is said.

    Raises:
        UserError: an unknown task, or a weight that is not positive.
    """
    given = given or {}
    for task, weight in given.items():
        if task not in tasks:
            raise UserError(f"search.importance: unknown task {task!r}; {suggestion(task, tasks)}")
        if not 0 < weight < float("inf"):
            raise UserError(f"search.importance: the weight of {task} is {weight}: it must be positive")
    return np.asarray([given.get(task, 1.0) for task in tasks], np.float32)
