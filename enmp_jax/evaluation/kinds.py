"""What is counted on a batch, by kind of task: classes, choices, or the tokens of an answer.

Classification and choice give log-probabilities of classes or choices of every example. A completion
gives log-probabilities of the whole vocabulary at every target: its scored units are the tokens of answers,
with the vocabulary as their classes, so that every fitness means there what it means elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from enmp_jax.data.batches import Batches, LikeliestTokens
from enmp_jax.data.layout import kind_of
from enmp_jax.deltas import Deltas
from enmp_jax.evaluation.fitness import Fitness, state_distance
from enmp_jax.evaluation.scoring import Counts, Heads, class_log_probabilities, count_examples, sum_by_task
from enmp_jax.models.base import Backbone, Params
from enmp_jax.models.causal import at_answers, choice_scores, log_probability

LIKELIEST = 20
"""Tokens of an expert's distribution that fitnesses compare with; all others count as one."""


class Start(NamedTuple):
    """Hidden states that a pass begins with instead of the embeddings (see ``Backbone``)."""

    hidden: Float[Array, "row token width"]
    first: int | Array


def count_batch(
    backbone: Backbone,
    params: Params,
    heads: Heads,
    batch: Batches,
    deltas: Deltas,
    n_tasks: int,
    kind: Fitness,
    start: Start | None = None,
) -> Counts:
    """Counts of one batch under one merged model, by task.

    Args:
        n_tasks: number of tasks.

    The others: see ``score_batch``.
    """
    examples = score_batch(backbone, params, heads, batch, deltas, kind, start)
    return sum_by_task(examples, batch.task, n_tasks)


def score_batch(
    backbone: Backbone,
    params: Params,
    heads: Heads,
    batch: Batches,
    deltas: Deltas,
    kind: Fitness,
    start: Start | None = None,
) -> Counts:
    """Counts of every example of one batch (no leading axis) under one merged model: [row].

    Args:
        backbone: the base model.
        params: its weights.
        heads: of the classification tasks.
        batch: examples of tasks of one kind.
        deltas: of the merged model.
        kind: the fitness whose values are counted.
        start: where to begin; default: from the embeddings.
    """
    if kind.hidden:
        states = pooled_states(backbone, params, batch, deltas)
        scores = class_log_probabilities(heads, states[:, -1], batch.task)
        expert = batch.expert
        assert batch.states is not None, "this fitness needs the experts' hidden states"
        assert not isinstance(expert, LikeliestTokens), "hidden states are compared for classification only"
        distance = state_distance(states, batch.states)
        return count_examples(scores, batch.label, batch.mask, kind, expert, distance)
    if kind_of(batch.inputs) != "completion":
        scores = option_log_probabilities(backbone, params, heads, batch, deltas, start)
        assert not isinstance(batch.expert, LikeliestTokens)
        return count_examples(scores, batch.label, batch.mask, kind, batch.expert)
    read = partial(read_tokens, kind=kind)
    correct, found, value = at_targets(backbone, params, batch, deltas, read, batch.expert, start)
    real = (batch.inputs["target_branch"] > 0) & batch.mask[:, None]

    def summed(x: Array) -> Array:
        return jnp.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, 0.0).sum(axis=1)

    return Counts(summed(correct.astype(jnp.float32)), summed(found), summed(value))


def pooled_states(
    backbone: Backbone, params: Params, batch: Batches, deltas: Deltas
) -> Float[Array, "row layer width"]:
    """What the pooling makes of the hidden states after every layer; the last are the features."""
    hidden = backbone.hidden_states(params, batch.inputs, deltas)[1:]
    pooled = jax.lax.map(lambda h: backbone.pool(params, h, batch.inputs), hidden)
    return jnp.swapaxes(pooled, 0, 1)


def option_log_probabilities(
    backbone: Backbone,
    params: Params,
    heads: Heads,
    batch: Batches,
    deltas: Deltas,
    start: Start | None = None,
) -> Float[Array, "row option"]:
    """Log-probabilities of the classes or choices of every example; arguments as in ``score_batch``.

    Those of choices are their log-likelihoods, each divided by its length, made to sum to one.
    """
    if kind_of(batch.inputs) == "classification":
        if start is None:
            features = backbone.features(params, batch.inputs, deltas)
        else:
            features = backbone.features_from(params, batch.inputs, start.hidden, start.first, deltas)
        return class_log_probabilities(heads, features, batch.task)
    inputs = batch.inputs
    found = target_log_probabilities(backbone, params, batch, deltas, start)
    scores = choice_scores(found, inputs["target_branch"], inputs["choice_length"])
    return jax.nn.log_softmax(scores, axis=-1)


def target_log_probabilities(
    backbone: Backbone, params: Params, batch: Batches, deltas: Deltas, start: Start | None = None
) -> Float[Array, "row target"]:
    """Log-probabilities (nats) of the targets of a generative task; arguments as in ``score_batch``."""
    read = lambda x, target, _: log_probability(x, target)  # noqa: E731
    return at_targets(backbone, params, batch, deltas, read, start=start)


def at_targets(
    backbone: Backbone,
    params: Params,
    batch: Batches,
    deltas: Deltas,
    read: Callable[..., Any],
    expert: Any = None,
    start: Start | None = None,
) -> Any:
    """``read(logits [n, vocabulary], target [n], expert [n])`` at the targets of every row.

    Args:
        backbone: the base model.
        params: its weights.
        batch: of a generative task.
        deltas: of the merged model.
        read: returns arrays [n, ...].
        expert: a pytree of arrays [row, target, ...].
        start: see ``score_batch``.

    Returns:
        What ``read`` returns, [row, target, ...].
    """
    parts, shape = jax.tree.flatten(expert)

    def read_parts(logits: Array, target: Array, *parts: Array) -> Any:
        return read(logits, target, jax.tree.unflatten(shape, parts))

    begin = {} if start is None else start._asdict()
    targets = batch.inputs["target_ids"]
    return at_answers(backbone, params, batch.inputs, read_parts, targets, *parts, deltas=deltas, **begin)


def read_tokens(
    logits: Float[Array, "token vocabulary"],
    target: Int[Array, " token"],
    expert: LikeliestTokens | None,
    kind: Fitness,
) -> tuple[Bool[Array, " token"], Float[Array, " token"], Float[Array, "token *temperature"]]:
    """Whether each target is the likeliest token, its log-probability, and the value of a fitness."""
    x = jax.nn.log_softmax(logits, axis=1)
    found = jnp.take_along_axis(x, target[:, None], axis=1)[:, 0]
    if kind.needs_expert:
        assert expert is not None, "this fitness needs the experts' answers"
        value = kind.value(*_compared(x, target, expert, kind))
    else:
        value = kind.value(x, target, None)
    return jnp.argmax(x, axis=1) == target, found, value


def likeliest(log_probabilities: Float[Array, "token vocabulary"]) -> LikeliestTokens:
    """The ``LIKELIEST`` tokens of every distribution."""
    k = min(LIKELIEST, log_probabilities.shape[1])
    found, ids = jax.lax.top_k(log_probabilities, k)
    return LikeliestTokens(ids, found)


def _compared(
    x: Float[Array, "token vocabulary"], target: Int[Array, " token"], expert: LikeliestTokens, kind: Fitness
) -> tuple[Array, Array, Array]:
    """Both distributions over the expert's likeliest tokens and, as one more, all others.

    What the KL divergence loses by that is never negative. Other fitnesses ask for the expert's first choice,
    which is never among the others, and compare it with the best of those.
    """
    rows = jnp.arange(x.shape[0])[:, None]
    others = x.at[rows, expert.ids].set(-jnp.inf)
    if kind.name == "expert_kl":
        rest = jax.nn.logsumexp(others, axis=1)
        remaining = jnp.log(jnp.maximum(1 - jnp.exp(expert.log_probability).sum(axis=1), 0.0))
    else:
        rest, remaining = others.max(axis=1), jnp.full(x.shape[0], -jnp.inf)
    own = jnp.concatenate([jnp.take_along_axis(x, expert.ids, axis=1), rest[:, None]], axis=1)
    return own, target, jnp.concatenate([expert.log_probability, remaining[:, None]], axis=1)
