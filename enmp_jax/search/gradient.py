"""Gradient search: Adam on the weights of a relaxed mask, stopped early on data it does not follow.

A mask keeps or prunes a module; its relaxation multiplies it by a weight. The derivative of a smooth
fitness through the merge costs about three evaluations whatever the number of modules, where local search
pays one for each. A weight of 0 is a pruned module, so the search contains pruning. This file knows
functions of weights, nothing of merges or models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Weights = Float[Array, "*module"]
Objective = Callable[..., Float[Array, ""]]
"""``objective(weights, *operands) -> fitness``, higher is better."""


class Settings(NamedTuple):
    """Of the search.

    Attributes:
        steps: most steps of Adam.
        learning_rate: of Adam.
        highest: weights lie in 0..highest.
        penalty: times the mean squared distance from the plain merge (all weights 1) is subtracted.
        jitter: standard deviation of the start around the plain merge, what tells seeds apart.
        check_every: steps between looks at the data that stop the search.
        patience: looks without a better value after which it stops.
    """

    steps: int
    learning_rate: float = 0.08
    highest: float = 3.0
    penalty: float = 0.0
    jitter: float = 0.01
    check_every: int = 2
    patience: int = 5


class State(NamedTuple):
    """Where a search is: everything that a resumed one needs."""

    weights: Weights
    optimizer: optax.OptState
    step: Int[Array, ""]


class Look(NamedTuple):
    """One look at the other data.

    Attributes:
        step: steps done.
        weights: at that point; of several folds the mean.
        fitness: of the data that the search follows, at the last step (before its update); NaN at the start;
            of several folds the mean.
        value: of the other data; of several folds the mean of what they say to each one's weights (see
            ``run``).
    """

    step: int
    weights: Float[np.ndarray, "*module"]
    fitness: float
    value: float


class Fold(NamedTuple):
    """What one search follows, and what judges it.

    Attributes:
        operands: of the objective.
        look: the value of weights on other data, higher is better.
    """

    operands: tuple[Any, ...]
    look: Callable[[Float[np.ndarray, "*module"]], float]


class Ascent(NamedTuple):
    """Compiled functions of one search; several seeds share them.

    ``init(key, present) -> State``; ``advance(state, present, *operands) -> (State, fitness)`` does
    ``check_every`` steps. ``present`` [*module] is True where a module exists: elsewhere weights stay 1.
    """

    init: Callable[[PRNGKeyArray, Bool[Array | np.ndarray, "*module"]], State]
    advance: Callable[..., tuple[State, Float[Array, ""]]]
    settings: Settings


def make_ascent(objective: Objective, settings: Settings) -> Ascent:
    """Compile gradient ascent on an objective.

    Args:
        objective: differentiable; what it needs besides weights are operands, never closed over.
        settings: see ``Settings``.
    """
    adam = optax.adam(settings.learning_rate)

    def init(key: PRNGKeyArray, present: Bool[Array, "*module"]) -> State:
        noise = settings.jitter * jax.random.normal(key, present.shape)
        weights = jnp.where(present, jnp.clip(1.0 + noise, 0.0, settings.highest), 1.0)
        return State(weights, adam.init(weights), jnp.zeros((), jnp.int32))

    def loss(weights: Weights, present: Array, *operands: Any) -> tuple[Array, Array]:
        fitness = objective(weights, *operands)
        distance = jnp.sum(jnp.where(present, (weights - 1.0) ** 2, 0.0)) / jnp.maximum(present.sum(), 1)
        return settings.penalty * distance - fitness, fitness

    def step(state: State, present: Array, *operands: Any) -> tuple[State, Array]:
        (_, fitness), gradient = jax.value_and_grad(loss, has_aux=True)(state.weights, present, *operands)
        # one module whose derivative is no number must not take the others with it
        gradient = jnp.where(present & jnp.isfinite(gradient), gradient, 0.0)
        updates, optimizer = adam.update(gradient, state.optimizer)
        weights = jnp.clip(state.weights + jnp.asarray(updates), 0.0, settings.highest)
        return State(jnp.where(present, weights, 1.0), optimizer, state.step + 1), fitness

    def advance(state: State, present: Array, *operands: Any) -> tuple[State, Array]:
        def body(_: Array, carry: tuple[State, Array]) -> tuple[State, Array]:
            return step(carry[0], present, *operands)

        count = jnp.minimum(settings.check_every, settings.steps - state.step)
        return jax.lax.fori_loop(0, count, body, (state, jnp.asarray(jnp.nan, jnp.float32)))

    return Ascent(jax.jit(init), jax.jit(advance), settings)


def fold_keys(key: PRNGKeyArray, folds: int) -> list[PRNGKeyArray]:
    """A key for every fold; the first is the key itself, so that a single fold is a search without folds."""
    return [key, *(jax.random.fold_in(key, fold) for fold in range(1, folds))]


def straight_through(logits: Float[Array, "*module"], temperature: float = 1.0) -> Float[Array, "*module"]:
    """A binary mask with a derivative: 1 where a logit is positive, else 0; derived as if it were
    ``sigmoid(logit / temperature)``.

    The straight-through estimator (Bengio et al., arXiv 1308.3432), as AdaRank uses it.
    """
    soft = jax.nn.sigmoid(logits / temperature)
    return jnp.where(logits > 0, 1.0, 0.0) + (soft - jax.lax.stop_gradient(soft))


def run(
    ascent: Ascent,
    states: Sequence[State],
    present: Bool[Array | np.ndarray, "*module"],
    folds: Sequence[Fold],
    looks: list[Look],
    on_look: Callable[[Sequence[State], list[Look]], None] | None = None,
    may_go_on: Callable[[], bool] = lambda: True,
) -> list[Look]:
    """Climb until the steps are done, or the other data say that nothing better comes.

    Several folds climb side by side, each with weights of its own, and stop together at the step where the
    mean of what their judges say is best. The mean of their weights is the result (cross-fitting): it has
    seen all the data, while no look has judged weights by data that they followed. The mean of K has a K-th
    of the variance of each, so that the best step of each comes too early for it: judges see distances from
    the plain merge divided by the root of K, as far as that noise goes.

    Args:
        ascent: see ``make_ascent``.
        states: where to begin, one for each fold.
        present: which modules exist.
        folds: what to follow, and what judges.
        looks: those of an earlier call that this one goes on with; empty for a new search.
        on_look: called after each look; the place for checkpoints and history.
        may_go_on: asked before every dispatch of steps (budgets).

    Returns:
        All looks, the start among them; the best of them is the result.
    """
    settings, looks, states = ascent.settings, list(looks), list(states)

    def look(fitness: Sequence[float]) -> None:
        weights = [np.asarray(state.weights) for state in states]
        judged = weights if len(folds) == 1 else [1 + (own - 1) / math.sqrt(len(folds)) for own in weights]
        values = [fold.look(own) for fold, own in zip(folds, judged, strict=True)]
        mean = np.mean(weights, axis=0)
        looks.append(Look(int(states[0].step), mean, float(np.mean(fitness)), float(np.mean(values))))
        if on_look is not None:
            on_look(states, looks)

    if not looks:
        look([math.nan])
    while int(states[0].step) < settings.steps and not _exhausted(looks, settings.patience) and may_go_on():
        found = [
            ascent.advance(state, present, *fold.operands) for state, fold in zip(states, folds, strict=True)
        ]
        states[:] = [state for state, _ in found]
        look([float(fitness) for _, fitness in found])
    return looks


def best(looks: list[Look]) -> Look:
    """The look of the largest value; the earlier of equal ones; NaN never wins."""
    return max(looks, key=lambda l: (-np.inf if np.isnan(l.value) else l.value, -l.step))


def _exhausted(looks: list[Look], patience: int) -> bool:
    steps = [look.step for look in looks]
    return len(looks) - 1 - steps.index(best(looks).step) >= patience
