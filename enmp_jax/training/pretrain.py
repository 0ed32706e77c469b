"""A base model from random weights: classification on several data sets at once, shared backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from enmp_jax.config.sections import PretrainConfig
from enmp_jax.data import Examples
from enmp_jax.evaluation.scoring import Heads, class_log_probabilities
from enmp_jax.io.checkpoints import Checkpoints
from enmp_jax.models.base import Backbone, Params
from enmp_jax.training.experts import stack_examples
from enmp_jax.training.loop import OnProgress, Schedule, train


class _Data(NamedTuple):
    inputs: dict[str, Array]  # each [task, example, ...]
    label: Array  # [task, example]
    size: Array  # [task]
    allowed: Array  # [task, class]


def pretrain(
    backbone: Backbone,
    examples: Sequence[Examples],
    config: PretrainConfig,
    on_progress: OnProgress | None = None,
    checkpoints: Checkpoints | None = None,
) -> tuple[Params, list[float]]:
    """Train all weights of ``backbone``; the heads of the pretraining tasks are thrown away.

    Args:
        backbone: architecture.
        examples: training examples, one entry per pretraining task; every step draws an equal
            share of the batch from each.
        config: hyperparameters.
        on_progress: see ``loop.train``.
        checkpoints: see ``loop.train``.
    """
    key = jax.random.key(config.seed)
    inputs, label, size = stack_examples(examples)
    classes = [int(e.labels.max()) + 1 for e in examples]
    allowed = jnp.arange(max(classes)) < jnp.asarray(classes)[:, None]
    n_tasks, share = len(examples), max(1, config.batch_size // len(examples))
    head = (jnp.zeros((n_tasks, max(classes), backbone.width)), jnp.zeros((n_tasks, max(classes))))
    weights: dict[str, Any] = {"params": backbone.init(jax.random.fold_in(key, 1)), "head": head}

    def loss(weights, data: _Data, key) -> Float[Array, ""]:
        def draw(task, size):
            return jax.random.randint(jax.random.fold_in(key, task), (share,), 0, size)

        index = jax.vmap(draw)(jnp.arange(n_tasks), data.size)
        task = jnp.repeat(jnp.arange(n_tasks), share)
        index = index.reshape(-1)
        features = backbone.features(weights["params"], {k: x[task, index] for k, x in data.inputs.items()})
        heads = Heads(weights["head"][0], weights["head"][1], data.allowed, jnp.ones(n_tasks))
        scores = class_log_probabilities(heads, features, task)
        return -jnp.take_along_axis(scores, data.label[task, index][:, None], axis=1).mean()

    schedule = Schedule(config.steps, config.learning_rate, config.warmup, config.weight_decay)
    trained, losses, _ = train(
        loss,
        weights,
        _Data(inputs, label, size, allowed),
        schedule,
        jax.random.fold_in(key, 2),
        on_progress=on_progress,
        checkpoints=checkpoints,
    )
    return trained["params"], losses
