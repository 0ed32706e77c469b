"""A compiled training loop over data that lives on the device: AdamW, warm-up and cosine decay."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

Weights = Any  # a pytree of trainable arrays
# loss(weights, data, key) -> scalar; ``data`` is passed through so that it is no compiled constant
Loss = Callable[[Weights, Any, Array], Float[Array, ""]]
OnProgress = Callable[[int, float], None]


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


def train(
    loss: Loss,
    weights: Weights,
    data: Any,
    schedule: Schedule,
    key: Array,
    rates: Callable[[Weights], Any] | None = None,
    independent: bool = False,
    steps_per_dispatch: int = 50,
    on_progress: OnProgress | None = None,
    checkpoints: Path | None = None,
) -> tuple[Weights, list[float]]:
    """Minimise ``loss``; returns the trained weights and the mean loss of every dispatch.

    Args:
        loss: see ``Loss``; the key differs at every step (``fold_in`` of the step).
        weights: start values.
        data: passed to ``loss``.
        schedule: see ``Schedule``.
        key: typed PRNG key.
        rates: see ``make_optimizer``.
        independent: every weight has a leading axis of independent models (clipped each by itself).
        steps_per_dispatch: steps in one compiled call.
        on_progress: called with (steps done, mean loss) after every call.
        checkpoints: directory to save to and to resume from; None: no checkpoints.
    """
    optimizer = make_optimizer(schedule, rates)
    if independent:
        optimizer = optax.GradientTransformation(jax.vmap(optimizer.init), jax.vmap(optimizer.update))

    @jax.jit
    def dispatch(carry, first: Array, data: Any):
        def step(carry, i):
            weights, state = carry
            value, gradient = jax.value_and_grad(loss)(weights, data, jax.random.fold_in(key, i))
            updates, state = optimizer.update(gradient, state, weights)
            return (optax.apply_updates(weights, updates), state), value

        carry, values = jax.lax.scan(step, carry, first + jnp.arange(steps_per_dispatch))
        return carry, values.mean()

    carry, start, losses = (weights, optimizer.init(weights)), 0, []
    manager = _Checkpoints(checkpoints, schedule.steps) if checkpoints else None
    # Closed whatever happens: a save still on its way would fight with those of a run that resumes.
    with manager or nullcontext():
        if manager:
            carry, start, losses = manager.restore(carry)
        for first in range(start, schedule.steps, steps_per_dispatch):
            carry, value = dispatch(carry, jnp.asarray(first), data)
            losses.append(float(value))
            done = first + steps_per_dispatch
            if on_progress:
                on_progress(min(done, schedule.steps), losses[-1])
            if manager:
                manager.save(done, carry, losses)
    return carry[0], losses


class _Checkpoints:
    """Saves about ten times in a run, keeps the newest."""

    def __init__(self, path: Path, steps: int):
        import orbax.checkpoint as ocp

        self.ocp, self.interval, self.last = ocp, max(1, steps // 10), 0
        options = ocp.CheckpointManagerOptions(max_to_keep=1)
        self.manager = ocp.CheckpointManager(path.resolve(), options=options)

    def restore(self, carry: Any) -> tuple[Any, int, list[float]]:
        step = self.manager.latest_step()
        if step is None:
            return carry, 0, []
        ocp = self.ocp
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, carry)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
        restored = self.manager.restore(step, args=args)
        self.last = step
        return restored["state"], step, restored["meta"]["losses"]

    def save(self, step: int, carry: Any, losses: list[float]) -> None:
        if step - self.last < self.interval:
            return
        self.last = step
        ocp = self.ocp
        # Saved in the background: the copy of the list must not grow meanwhile.
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(carry), meta=ocp.args.JsonSave({"losses": [*losses]})
            ),
        )

    def __enter__(self) -> _Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.manager.wait_until_finished()
        self.manager.close()
