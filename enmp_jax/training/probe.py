"""Heads fitted to the frozen base's features: multinomial logistic regression by L-BFGS."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from enmp_jax.data import Examples
from enmp_jax.data.batches import batch
from enmp_jax.evaluation.scoring import Heads, class_log_probabilities
from enmp_jax.models.base import Backbone, Params


def base_features(
    backbone: Backbone, params: Params, examples: Examples, batch_size: int = 256
) -> tuple[Float[np.ndarray, "example width"], np.ndarray]:
    """Features of the unadapted base and the labels, in the order of the batches."""
    compute = jax.jit(backbone.features)
    features, labels = [], []
    for bucket in batch([examples], batch_size):
        for i in range(bucket.label.shape[0]):
            mask = np.asarray(bucket.mask[i])
            inputs = {key: x[i] for key, x in bucket.inputs.items()}
            features.append(np.asarray(compute(params, inputs))[mask])
            labels.append(np.asarray(bucket.label[i])[mask])
    return np.concatenate(features), np.concatenate(labels)


def fit_heads(
    backbone: Backbone,
    params: Params,
    examples: Sequence[Examples],
    heads: Heads,
    l2: float = 1e-3,
    steps: int = 100,
) -> Heads:
    """Fit every task's head to the base's features; the base itself does not change.

    Args:
        backbone: the base model.
        params: its weights.
        examples: training examples of each task.
        heads: shapes (and start values).
        l2: weight of the squared norm of the head.
        steps: iterations of L-BFGS.
    """
    weights, biases = [], []
    for i, task_examples in enumerate(examples):
        features, labels = base_features(backbone, params, task_examples)
        weight, bias = _fit(jnp.asarray(features), jnp.asarray(labels), _one(heads, i), l2, steps)
        weights.append(weight)
        biases.append(bias)
    return heads.replace(weight=jnp.stack(weights), bias=jnp.stack(biases))  # type: ignore[attr-defined]


def _one(heads: Heads, i: int) -> Heads:
    return jax.tree.map(lambda x: x[i : i + 1], heads)


def _fit(features: Array, labels: Array, head: Heads, l2: float, steps: int) -> tuple[Array, Array]:
    task = jnp.zeros(len(labels), int)

    def loss(parameters):
        weight, bias = parameters
        scores = class_log_probabilities(
            head.replace(weight=weight[None], bias=bias[None]),  # type: ignore[attr-defined]
            features,
            task,
        )
        return -jnp.take_along_axis(scores, labels[:, None], 1).mean() + l2 * (weight**2).sum()

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    @jax.jit
    def step(carry, _):
        parameters, state = carry
        value, gradient = value_and_grad(parameters, state=state)
        updates, state = optimizer.update(
            gradient, state, parameters, value=value, grad=gradient, value_fn=loss
        )
        return (optax.apply_updates(parameters, updates), state), value

    start = (head.weight[0], head.bias[0])
    (parameters, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), None, length=steps)
    return parameters
