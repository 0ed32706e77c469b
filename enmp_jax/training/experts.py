"""LoRA experts, all tasks at once: one vmapped step trains every adapter on its own data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from enmp_jax.config.sections import TrainConfig
from enmp_jax.data import Examples
from enmp_jax.deltas import Deltas, LowRank
from enmp_jax.errors import UserError
from enmp_jax.evaluation.scoring import Heads, class_log_probabilities
from enmp_jax.io.checkpoints import Checkpoints
from enmp_jax.models.base import Backbone, Params
from enmp_jax.models.causal import answer_log_probabilities
from enmp_jax.training.length_buckets import LengthBuckets, Lengths, cut, sort_by_length
from enmp_jax.training.loop import STEPS_PER_DISPATCH, OnProgress, Schedule, train

ATTENTION = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj", "query", "key", "value", "c_attn",
)  # fmt: skip

LANGUAGE_STEPS_PER_DISPATCH = 10
"""A step of a language model is slow on CPUs, and nothing is said or saved within a dispatch."""


class Experts(NamedTuple):
    """Trained adapters. ``factors[template] = (A [task, layer, r, in], B [task, layer, out, r])``,
    B without alpha / r; ``heads`` are those the adapters were trained with, None of completions."""

    factors: dict[str, tuple[np.ndarray, np.ndarray]]
    heads: Heads | None
    losses: list[float]


def target_templates(backbone: Backbone, targets: Sequence[str]) -> list[str]:
    """Templates of the backbone whose last part is in ``targets`` (default: attention projections).

    Raises:
        UserError: a target names no module.
    """
    if not targets:
        return sorted(name for name in backbone.modules if name.rsplit(".", 1)[-1] in ATTENTION)
    found = []
    for target in targets:
        matching = [name for name in backbone.modules if name == target or name.endswith("." + target)]
        if not matching:
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in backbone.modules}))
            raise UserError(f"train.target_modules: {target!r} names no module; there are {known}")
        found += matching
    return sorted(set(found))


def init_factors(backbone: Backbone, templates: Sequence[str], rank: int, n_tasks: int, key: Array) -> Any:
    """PEFT's start: A uniform as torch's Linear (Kaiming with a = sqrt(5)), B zero."""
    factors = {}
    for i, name in enumerate(templates):
        out, inner = backbone.modules[name]
        bound = 1.0 / np.sqrt(inner)
        shape = (n_tasks, backbone.n_layers, rank, inner)
        a = jax.random.uniform(jax.random.fold_in(key, i), shape, jnp.float32, -bound, bound)
        factors[name] = (a, jnp.zeros((n_tasks, backbone.n_layers, out, rank), jnp.float32))
    return factors


def expert_deltas(factors: Any, scaling: float) -> Deltas:
    """Deltas of one expert from factors without a task axis; ``scaling`` is alpha / r."""
    deltas: Deltas = {}
    for name, (a, b) in factors.items():
        core = jnp.broadcast_to(jnp.eye(a.shape[1]) * scaling, (a.shape[0], a.shape[1], a.shape[1]))
        deltas[name] = LowRank(b, core, a)
    return deltas


class _Data(NamedTuple):
    params: Params
    inputs: dict[str, Array]  # each [task, example, ...], padded to the largest task
    label: Array  # [task, example]
    size: Array  # [task]
    heads: Heads | None


def stack_examples(examples: Sequence[Examples]) -> tuple[dict[str, Array], Array, Array]:
    """Inputs [task, example, ...], labels [task, example] and sizes [task], padded with zeros.

    Texts are padded to the longest of all tasks; their attention mask is zero there.
    """

    def stack(arrays: Sequence[np.ndarray]) -> Array:
        shape = tuple(map(max, zip(*(a.shape for a in arrays), strict=True)))
        stacked = np.zeros((len(arrays), *shape), arrays[0].dtype)
        for i, a in enumerate(arrays):
            stacked[(i, *map(slice, a.shape))] = a
        return jnp.asarray(stacked)

    inputs = {key: stack([np.asarray(e.inputs[key]) for e in examples]) for key in examples[0].inputs}
    labels = stack([np.asarray(e.labels) for e in examples])
    return inputs, labels, jnp.asarray([len(e.labels) for e in examples])


def answer_loss(
    backbone: Backbone, params: Params, inputs: Mapping[str, Array], deltas: Deltas
) -> Float[Array, ""]:
    """Mean negative log-likelihood of the answers' tokens of a batch of completions, in nats."""
    found = answer_log_probabilities(backbone, params, inputs, deltas)
    real = inputs["target_branch"] > 0
    return -jnp.where(real, found, 0.0).sum() / jnp.maximum(real.sum(), 1)


def completions_loss(
    backbone: Backbone, config: TrainConfig, buckets: LengthBuckets, lora: Any, data: _Data, key: Array
) -> Float[Array, ""]:
    """Sum over tasks of ``answer_loss``, each on its own examples of one part; all draw the same part."""
    tasks = jnp.arange(buckets.first.shape[1])
    part_key, key = jax.random.split(key)
    part = jax.random.randint(part_key, (), 0, len(buckets.shape))
    first, stop = jnp.asarray(buckets.first)[part], jnp.asarray(buckets.stop)[part]

    def task_loss(lengths: Lengths, task: Array, lora: Any) -> Float[Array, ""]:
        own = jax.random.fold_in(key, task)
        index = jax.random.randint(own, (config.batch_size,), first[task], stop[task])
        inputs = cut({name: x[task, index] for name, x in data.inputs.items()}, lengths)
        return answer_loss(backbone, data.params, inputs, expert_deltas(lora, config.alpha / config.rank))

    def with_lengths(lengths: Lengths) -> Callable[[Any], Float[Array, ""]]:
        return lambda lora: jax.vmap(partial(task_loss, lengths))(tasks, lora).sum()

    return jax.lax.switch(jnp.asarray(buckets.shape)[part], list(map(with_lengths, buckets.lengths)), lora)


def training_steps(config: TrainConfig, examples: Sequence[Examples]) -> int:
    """Steps of a training: those of the configuration, or of its epochs over the largest task."""
    if config.epochs is None:
        return config.steps
    return math.ceil(config.epochs * max(len(e.labels) for e in examples) / config.batch_size)


def train_experts(
    backbone: Backbone,
    params: Params,
    examples: Sequence[Examples],
    heads: Heads | None,
    config: TrainConfig,
    on_progress: OnProgress | None = None,
    checkpoints: Checkpoints | None = None,
) -> Experts:
    """Train one LoRA expert per entry of ``examples``.

    Args:
        backbone: the frozen base model.
        params: its weights.
        examples: training examples of each task: all of classification, or all completions, of which the
            answers' tokens are learnt.
        heads: start values, or with ``config.head`` other than ``train`` the fixed heads; None: completions.
        config: hyperparameters.
        on_progress: see ``loop.train``.
        checkpoints: see ``loop.train``.
    """
    buckets = None
    if heads is None:
        examples, buckets = sort_by_length(examples)
    key = jax.random.key(config.seed)
    templates = target_templates(backbone, config.target_modules)
    factors = init_factors(backbone, templates, config.rank, len(examples), jax.random.fold_in(key, 1))
    weights: dict[str, Any] = {"lora": factors}
    train_head = config.head == "train" and heads is not None
    if heads is not None and train_head:
        weights["head"] = (heads.weight, heads.bias)
    data = _Data(params, *stack_examples(examples), heads)
    scaling = config.alpha / config.rank

    def task_loss(task, lora, head, data: _Data, key) -> Float[Array, ""]:
        assert data.heads is not None
        index = jax.random.randint(key, (config.batch_size,), 0, data.size[task])
        inputs = {name: x[task, index] for name, x in data.inputs.items()}
        features = backbone.features(data.params, inputs, expert_deltas(lora, scaling))
        own = Heads(
            head[0][None], head[1][None], data.heads.allowed[task][None], data.heads.logit_scale[task][None],
            data.heads.normalise,
        )  # fmt: skip
        scores = class_log_probabilities(own, features, jnp.zeros(config.batch_size, int))
        return -jnp.take_along_axis(scores, data.label[task, index][:, None], axis=1).mean()

    def loss(weights, data: _Data, key) -> Float[Array, ""]:
        if buckets is not None:
            return completions_loss(backbone, config, buckets, weights["lora"], data, key)
        head = weights["head"] if train_head else data.heads and (data.heads.weight, data.heads.bias)
        tasks = jnp.arange(len(examples))
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(tasks)
        losses = jax.vmap(task_loss, in_axes=(0, 0, 0, None, 0))(tasks, weights["lora"], head, data, keys)
        # The sum: a task's steps must not shrink because others are trained beside it.
        return losses.sum()

    factor = {"lora": 1.0, "head": (config.head_learning_rate or config.learning_rate) / config.learning_rate}
    steps = training_steps(config, examples)
    schedule = Schedule(steps, config.learning_rate, config.warmup, config.weight_decay)
    trained, losses, _ = train(
        loss,
        weights,
        data,
        schedule,
        jax.random.fold_in(key, 2),
        rates=lambda w: {name: jax.tree.map(lambda _, f=factor[name]: f, w[name]) for name in w},
        independent=True,
        steps_per_dispatch=LANGUAGE_STEPS_PER_DISPATCH if heads is None else STEPS_PER_DISPATCH,
        on_progress=on_progress,
        checkpoints=checkpoints,
    )
    if train_head and heads is not None:
        heads = heads.replace(weight=trained["head"][0], bias=trained["head"][1])  # type: ignore[attr-defined]
    final = {name: (np.asarray(a), np.asarray(b)) for name, (a, b) in trained["lora"].items()}
    return Experts(final, heads, [value / len(examples) for value in losses])
