"""A compiled training loop over data that lives on the device: AdamW, warm-up and cosine decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from enmp_jax.io import signals
from enmp_jax.io.checkpoints import Checkpoints, OtherSettings

Weights = Any  # a pytree of trainable arrays
Carry = tuple[Weights, Any]  # and the optimizer's state
# loss(weights, data, key) -> scalar; ``data`` is passed through so that it is no compiled constant
Loss = Callable[[Weights, Any, Array], Float[Array, ""]]
OnProgress = Callable[[int, float], None]


STEPS_PER_DISPATCH = 50


class Schedule(NamedTuple):
    """Length and step sizes of a training run."""

    steps: int
    learning_rate: float
    warmup: float = 0.05
    """Share of the steps."""
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest global norm of a gradient."""


def make_optimizer(schedule: Schedule, rates: Callable[[Weights], Any] | None = None):
    """AdamW with linear warm-up, cosine decay to zero and gradient clipping.

    Args:
        schedule: see ``Schedule``.
        rates: maps the weights to a pytree of factors of the learning rate, one per leaf.
    """
    warmup = max(1, round(schedule.warmup * schedule.steps))
    curve = optax.warmup_cosine_decay_schedule(
        0.0, schedule.learning_rate, warmup, max(schedule.steps, warmup + 1)
    )
    matrices_only = lambda weights: jax.tree.map(lambda x: x.ndim > 1, weights)  # noqa: E731
    parts = [
        optax.clip_by_global_norm(schedule.clip),
        optax.adamw(curve, weight_decay=schedule.weight_decay, mask=matrices_only),
    ]
    if rates is not None:
        parts.append(optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, rates(updates))))
    return optax.chain(*parts)


class EarlyStopping(NamedTuple):
    """When to stop before the last step, and which weights to return then: the best of those checked."""

    score: Callable[[int, Weights], float]
    """``score(steps done, weights)``, higher is better; the start values are scored too, with 0 steps."""
    check_every: int
    """Steps from one check to the next."""
    patience: int
    """Checks in a row without a better score that end the training."""


class Trained(NamedTuple):
    """What a training gives.

    Attributes:
        weights: the trained weights; with early stopping the best ones.
        losses: mean loss of every dispatch.
        step: steps that ``weights`` had.
    """

    weights: Weights
    losses: list[float]
    step: int


def train(
    loss: Loss,
    weights: Weights,
    data: Any,
    schedule: Schedule,
    key: Array,
    rates: Callable[[Weights], Any] | None = None,
    independent: bool = False,
    steps_per_dispatch: int = STEPS_PER_DISPATCH,
    on_progress: OnProgress | None = None,
    checkpoints: Checkpoints | None = None,
    early_stopping: EarlyStopping | None = None,
) -> Trained:
    """Minimise ``loss``.

    Args:
        loss: see ``Loss``; the key differs at every step (``fold_in`` of the step).
        weights: start values.
        data: passed to ``loss``.
        schedule: see ``Schedule``.
        key: typed PRNG key.
        rates: see ``make_optimizer``.
        independent: every weight has a leading axis of independent models (clipped each by itself).
        steps_per_dispatch: most steps in one compiled call.
        on_progress: called with (steps done, mean loss) after every call.
        checkpoints: where to save about ten times and to resume from, open; None: nowhere.
        early_stopping: see ``EarlyStopping``; None: do all steps and return the last weights.
    """
    optimizer = make_optimizer(schedule, rates)
    if independent:
        optimizer = optax.GradientTransformation(jax.vmap(optimizer.init), jax.vmap(optimizer.update))

    @jax.jit
    def dispatch(carry: Carry, first: Int[Array, ""], count: Int[Array, ""], data: Any):
        # The count is an argument, so that what remains at the end does not compile anew.
        def step(i: Array, carry_and_values: tuple[Carry, Array]) -> tuple[Carry, Array]:
            (weights, state), values = carry_and_values
            value, gradient = jax.value_and_grad(loss)(weights, data, jax.random.fold_in(key, first + i))
            updates, state = optimizer.update(gradient, state, weights)
            return (optax.apply_updates(weights, updates), state), values.at[i].set(value)

        carry, values = jax.lax.fori_loop(0, count, step, (carry, jnp.zeros(steps_per_dispatch)))
        return carry, values.sum() / count

    progress = _Progress((weights, optimizer.init(weights)))
    if early_stopping:
        progress = progress._replace(best=weights, score=early_stopping.score(0, weights))
    if checkpoints:
        progress = _restore(checkpoints, progress)
    saved, save_every = progress.step, max(1, schedule.steps // 10)
    while progress.step < schedule.steps:
        if early_stopping and progress.unimproved >= early_stopping.patience:
            break
        first = progress.step
        count = min(steps_per_dispatch, schedule.steps - first)
        if early_stopping:
            count = min(count, early_stopping.check_every - first % early_stopping.check_every)
        carry, value = dispatch(progress.carry, np.int32(first), np.int32(count), data)
        progress = progress._replace(carry=carry, step=first + count, losses=(*progress.losses, float(value)))
        if early_stopping and (
            progress.step % early_stopping.check_every == 0 or progress.step == schedule.steps
        ):
            progress = _check(early_stopping, progress)
        if on_progress:
            on_progress(progress.step, progress.losses[-1])
        told = checkpoints is not None and signals.received() and progress.step < schedule.steps
        if checkpoints and (progress.step - saved >= save_every or told):
            saved = progress.step
            _save(checkpoints, progress)
        if told:
            signals.stop_if_told()
    if early_stopping:
        return Trained(progress.best, list(progress.losses), progress.best_step)
    return Trained(progress.carry[0], list(progress.losses), progress.step)


class _Progress(NamedTuple):
    """Where a training is: all that a checkpoint holds."""

    carry: Carry
    best: Weights = ()  # with early stopping only, as what follows from there on
    step: int = 0
    losses: tuple[float, ...] = ()
    score: float = 0.0
    best_step: int = 0
    unimproved: int = 0


def _check(early_stopping: EarlyStopping, progress: _Progress) -> _Progress:
    weights = progress.carry[0]
    score = early_stopping.score(progress.step, weights)
    if score > progress.score:
        return progress._replace(best=weights, score=score, best_step=progress.step, unimproved=0)
    return progress._replace(unimproved=progress.unimproved + 1)


def _save(checkpoints: Checkpoints, progress: _Progress) -> None:
    values = progress._asdict()
    arrays = {name: values.pop(name) for name in ("carry", "best")}
    checkpoints.save(progress.step, arrays, values)


def _restore(checkpoints: Checkpoints, start: _Progress) -> _Progress:
    try:
        found = checkpoints.latest({"carry": start.carry, "best": start.best})
    except OtherSettings as error:
        checkpoints.say(f"{error}: training anew")
        checkpoints.clear()
        found = None
    if found is None:
        return start
    values: dict[str, Any] = {**found.tree, **found.meta}
    return _Progress(**values)._replace(losses=tuple(values["losses"]))
