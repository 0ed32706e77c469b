"""Which examples a merged model answers rightly: what paired comparisons of models are made of.

Searches need sums over examples only (``population``); here every example keeps its own score, so that two
models can be compared on the same ones.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped

from enmp_jax.data.batches import Batches
from enmp_jax.deltas import Deltas
from enmp_jax.devices.mesh import replicate
from enmp_jax.errors import UserError
from enmp_jax.evaluation.evaluator import Evaluator, ExecutionPlan
from enmp_jax.evaluation.kinds import option_log_probabilities
from enmp_jax.evaluation.loaded_run import Split
from enmp_jax.evaluation.population import EvalInputs
from enmp_jax.merges.base import Ingredients, Merge
from enmp_jax.models.base import Backbone

PerExample = Float[np.ndarray, "*member example"]
"""1 where the answer is right, 0 where it is wrong; in the mean over models, a share."""


class Correctness:
    """Scores the examples of one split, one by one, under any merge of a run's adapters.

    Attributes:
        task: the task of each example, in the order of the scores: [example].
        weight: of each task's accuracy in the mean normalised accuracy, 1 / (tasks * reference): [task].
    """

    def __init__(self, evaluator: Evaluator, split: Split):
        """Put the examples on the devices.

        Raises:
            UserError: a completion task, whose answers are not simply right or wrong.
        """
        for task, kind in zip(evaluator.loaded.tasks, evaluator.loaded.kinds, strict=True):
            if kind == "completion":
                raise UserError(
                    f"the task {task} completes texts: only classes and choices are compared one by one"
                )
        self._evaluator = evaluator
        self._inputs = evaluator.spread(evaluator.inputs(split))
        self._compiled: dict[ExecutionPlan, Any] = {}
        self._whole = NamedSharding(evaluator.mesh, PartitionSpec())  # on every process of several
        rows = [(bucket.task, bucket.mask) for bucket in self._inputs.batches]
        everywhere = jax.jit(lambda rows: rows, out_shardings=self._whole)(rows)
        self._real = [np.asarray(mask) for _, mask in everywhere]  # no padding: [batches rows] of each bucket
        tasks = [np.asarray(task)[real] for (task, _), real in zip(everywhere, self._real, strict=True)]
        self._order = np.argsort(np.concatenate(tasks), kind="stable")
        self.task = np.concatenate(tasks)[self._order]
        scoring = evaluator.scoring(split, normalises=True)
        self.reference = np.asarray(scoring.reference, float)
        self.weight = 1 / (len(self.reference) * self.reference)
        backbone = evaluator.loaded.backbone
        self._of_deltas = jax.jit(
            lambda inputs, deltas: _answers(backbone, inputs, deltas), out_shardings=self._whole
        )

    def of_masks(
        self,
        keep: Shaped[np.ndarray, "member *module"],
        scale: float | Float[np.ndarray, " member"],
        merge: Merge | None = None,
        ingredients: Ingredients | None = None,
    ) -> PerExample:
        """Of merges under masks or weights.

        Args:
            keep: the masks.
            scale: merge coefficients, or one for all.
            merge: default: the run's.
            ingredients: what its ``prepare`` made; default: of the run's adapters.
        """
        evaluator, inputs = self._evaluator, self._inputs
        merge = merge or evaluator.merge
        if ingredients is not None:
            inputs = inputs._replace(ingredients=replicate(ingredients, evaluator.mesh))
        plan = evaluator.plan(inputs, merge)
        if plan not in self._compiled:
            backbone = evaluator.loaded.backbone

            def answers(inputs: EvalInputs, keep: Array, scale: Array) -> tuple[Array, ...]:
                def member(given: tuple[Array, Array]) -> tuple[Array, ...]:
                    return _answers(backbone, inputs, plan.merge.merge(inputs.ingredients, *given))

                return jax.lax.map(member, (keep, scale), batch_size=min(plan.member_chunk, len(keep)))

            self._compiled[plan] = jax.jit(answers, out_shardings=self._whole)
        scales = np.broadcast_to(np.asarray(scale, np.float32), len(keep))
        return self._ordered(self._compiled[plan](inputs, keep, scales))

    def of_deltas(self, deltas: Deltas) -> PerExample:
        """Of one model with these deltas."""
        return self._ordered(self._of_deltas(self._inputs._replace(ingredients=None), deltas))

    def accuracy(self, correct: PerExample) -> Float[np.ndarray, "*member task"]:
        """Accuracies by task, in 0..1."""
        sums = [correct[..., self.task == i].mean(axis=-1) for i in range(len(self.weight))]
        return np.stack(sums, axis=-1)

    def normalised(self, correct: PerExample) -> Float[np.ndarray, "*member"]:
        """Mean over tasks of accuracy / accuracy of the task's own adapter."""
        return np.asarray(self.accuracy(correct) @ self.weight)

    def _ordered(self, answers: tuple[Array, ...]) -> PerExample:
        rows = [np.asarray(x)[..., real] for x, real in zip(answers, self._real, strict=True)]
        return np.concatenate(rows, axis=-1)[..., self._order].astype(float)


def _answers(backbone: Backbone, inputs: EvalInputs, deltas: Deltas) -> tuple[Array, ...]:
    """Whether each row is answered rightly, of every bucket: [batches, rows]."""

    def one(batch: Batches) -> Array:
        scores = option_log_probabilities(backbone, inputs.params, inputs.heads, batch, deltas)
        return jnp.argmax(scores, axis=-1) == batch.label

    return tuple(jax.lax.map(one, bucket) for bucket in inputs.batches)
