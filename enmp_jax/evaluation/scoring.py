"""Task heads and scores: from features to numbers per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from enmp_jax.errors import UserError
from enmp_jax.evaluation.fitness import FITNESS, Fitness, Objective, normalised, objective, task_values


@flax.struct.dataclass
class Heads:
    """The classification heads of all tasks, padded to the largest number of classes."""

    weight: Float[Array, "task class width"]
    bias: Float[Array, "task class"]
    allowed: Bool[Array, "task class"]  # False: padding, or a class never predicted
    logit_scale: Float[Array, " task"]
    normalise: bool = flax.struct.field(pytree_node=False, default=False)
    """Divide features by their norm first (CLIP's zero-shot heads)."""


class Counts(NamedTuple):
    """Sums per task over its units: examples or, of completions, tokens. Divide by their number for means.

    Or, where it is said, of every example by itself: ``task`` is an axis of examples then.
    """

    correct: Float[Array | np.ndarray, "*member task"]
    log_likelihood: Float[Array | np.ndarray, "*member task"]
    value: Float[Array | np.ndarray, "*member task"] | Float[Array | np.ndarray, "*member task temperature"]
    """Of the fitness kind that was asked for (see ``fitness``)."""

    def packed(self) -> Float[Array, "*member column"]:
        """All of it in one array, to be sent at once."""
        members = self.correct.shape[:-1]
        return jnp.concatenate([jnp.reshape(x, (*members, -1)) for x in self], axis=-1)

    @classmethod
    def unpacked(cls, columns: Float[Array, "*member column"], tasks: int) -> Counts:
        """The inverse of ``packed``."""
        correct, log_likelihood, value = jnp.split(columns, [tasks, 2 * tasks], axis=-1)
        if value.shape[-1] > tasks:  # of every temperature
            value = value.reshape(*value.shape[:-1], tasks, -1)
        return cls(correct, log_likelihood, value)


def stack_heads(
    heads: Sequence[tuple[np.ndarray, np.ndarray | None]],
    masked: Sequence[Sequence[int]] = (),
    normalise: bool = False,
    logit_scale: float = 1.0,
) -> Heads:
    """Stack one (weight [class, width], bias [class] or None) per task.

    Args:
        heads: in task order; the numbers of classes may differ.
        masked: classes that are never predicted, per task.
        normalise: see ``Heads``.
        logit_scale: factor of all logits (100 for CLIP).

    Raises:
        UserError: a masked class does not exist, or widths differ.
    """
    widths = {weight.shape[1] for weight, _ in heads}
    if len(widths) != 1:
        raise UserError(f"the task heads differ in width ({sorted(widths)}): they belong to different bases")
    classes = max(weight.shape[0] for weight, _ in heads)
    stacked = np.zeros((len(heads), classes, widths.pop()), np.float32)
    biases = np.zeros((len(heads), classes), np.float32)
    allowed = np.zeros((len(heads), classes), bool)
    for i, (weight, bias) in enumerate(heads):
        stacked[i, : len(weight)] = weight
        biases[i, : len(weight)] = 0 if bias is None else bias
        allowed[i, : len(weight)] = True
        for c in masked[i] if masked else ():
            if not 0 <= c < len(weight):
                raise UserError(f"masked class {c} does not exist: the head has {len(weight)} classes")
            allowed[i, c] = False
    scale = jnp.full(len(heads), logit_scale, jnp.float32)
    return Heads(jnp.asarray(stacked), jnp.asarray(biases), jnp.asarray(allowed), scale, normalise)


def class_log_probabilities(
    heads: Heads, features: Float[Array, "batch width"], task: Int[Array, " batch"]
) -> Float[Array, "batch class"]:
    """Log-probabilities under each example's own task head; -inf for classes not allowed."""
    features = features.astype(jnp.float32)
    if heads.normalise:
        features = features / jnp.linalg.norm(features, axis=-1, keepdims=True)
    # Every head on every example: one matmul beats gathering a [class, width] head per example.
    logits = jnp.einsum("bd,tcd->btc", features, heads.weight) * heads.logit_scale[:, None] + heads.bias
    own = jnp.take_along_axis(logits, task[:, None, None], axis=1)[:, 0]
    return jax.nn.log_softmax(jnp.where(heads.allowed[task], own, -jnp.inf), axis=-1)


def count_examples(
    log_probabilities: Float[Array, "batch class"],
    label: Int[Array, " batch"],
    mask: Bool[Array, " batch"],
    kind: Fitness = FITNESS["accuracy"],
    expert: Float[Array, "batch class"] | None = None,
    distance: Float[Array, " batch"] | float = 0.0,
) -> Counts:
    """Whether every example of a padded batch is right, its log-likelihood and its fitness value: [batch].

    Args:
        log_probabilities: of the merged model.
        label: the right class of each example.
        mask: False where a row is padding, which counts nothing.
        kind: whose values are counted.
        expert: log-probabilities of each example's own unmerged adapter, if the kind needs them.
        distance: of hidden states from the expert's, if the kind has a weight for it.
    """
    correct = jnp.argmax(log_probabilities, axis=-1) == label
    own = jnp.take_along_axis(log_probabilities, label[:, None], axis=1)[:, 0]
    value = kind.value(log_probabilities, label, expert)
    if kind.hidden:
        value -= kind.hidden * distance
    value = jnp.where(mask.reshape(-1, *[1] * (value.ndim - 1)), value, 0.0)
    return Counts((correct & mask).astype(jnp.float32), jnp.where(mask, own, 0.0), value)


def sum_by_task(examples: Counts, task: Int[Array, " batch"], n_tasks: int) -> Counts:
    """Counts of single examples [batch], added up for every task: [task]."""
    member = jax.nn.one_hot(task, n_tasks)
    return Counts(*(jnp.tensordot(member.T, x, 1) for x in examples))


class Scoring(NamedTuple):
    """What turns counts into scores and fitness.

    Attributes:
        examples: number of units of each task: examples or, of a completion, tokens of answers.
        reference: scores of the adapters alone.
        expert: values of the fitness kind of the adapters alone.
        importance: weights of tasks in the mean.
        likelihood: tasks whose score is exp(-loss), not accuracy; None: there are none.
    """

    examples: Float[Array, " task"]
    reference: Float[Array, " task"]
    expert: Float[Array, " task"]
    importance: Float[Array, " task"]
    likelihood: Bool[Array, " task"] | None = None

    def accuracy(self, counts: Counts) -> Float[Array | np.ndarray, "*member task"]:
        """Accuracies in 0..1; of completions, those of the next token, the right ones given."""
        return counts.correct / self.examples

    def loss(self, counts: Counts) -> Float[Array | np.ndarray, "*member task"]:
        """Mean negative log-likelihood of classes, choices or tokens, in nats."""
        return -counts.log_likelihood / self.examples

    def scores(self, counts: Counts) -> Float[Array | np.ndarray, "*member task"]:
        """What a task is measured by, in 0..1: accuracy, or of a completion exp(-loss).

        So score / reference of a completion is exp(expert's loss - loss): 1 is as good as the expert.
        """
        if self.likelihood is None:
            return self.accuracy(counts)
        return jnp.where(self.likelihood, jnp.exp(-self.loss(counts)), self.accuracy(counts))

    def normalised(self, counts: Counts) -> Float[Array | np.ndarray, "*member"]:
        """Mean over tasks of score / reference score."""
        return (self.scores(counts) / self.reference).mean(-1)

    def task_values(self, counts: Counts, kind: Fitness) -> Float[Array, "*member task"]:
        """Values of a fitness kind relative to the tasks' own experts."""
        return normalised(task_values(jnp.asarray(counts.value), self.examples, kind), self.expert, kind)

    def fitness(self, counts: Counts, kind: Fitness, name: Objective = "mean") -> Float[Array, " *member"]:
        """Higher is better: 1 is, in the mean, as good as the experts."""
        return objective(self.task_values(counts, kind), name, self.importance)


def by_task(tasks: Sequence[str], values: np.ndarray) -> dict[str, float]:
    """``{task: value}`` as plain floats, for JSON."""
    return {task: float(value) for task, value in zip(tasks, np.asarray(values), strict=True)}


def mean_normalised(scores: Mapping[str, float], reference: Mapping[str, float]) -> float:
    """Mean over tasks of score / reference, on plain dictionaries."""
    return float(np.mean([scores[task] / reference[task] for task in reference]))
