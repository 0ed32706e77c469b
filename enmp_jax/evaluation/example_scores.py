"""Scores of single examples under a merged model: what paired comparisons of models are made of.

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

from enmp_jax.data import Batches, kind_of
from enmp_jax.deltas import Deltas
from enmp_jax.devices.mesh import replicate
from enmp_jax.evaluation.evaluator import Evaluator, ExecutionPlan
from enmp_jax.evaluation.kinds import option_log_probabilities, target_log_probabilities
from enmp_jax.evaluation.loaded_run import Split
from enmp_jax.evaluation.population import EvalInputs
from enmp_jax.merges.base import Ingredients, Merge
from enmp_jax.models.base import Backbone
from enmp_jax.search.statistics import Sample

PerExample = Float[np.ndarray, "*member example"]
"""1 where the class or choice is right, 0 where it is wrong; of a completion the log-likelihood of the
answer, in nats."""


class ExampleScores:
    """Scores the examples of one split, one by one, under any merge of a run's adapters.

    Attributes:
        sample: the examples, task by task in the order of the data, as their scores are, and how these make
            the mean normalised accuracy (of completions, likelihood).
    """

    def __init__(self, evaluator: Evaluator, split: Split):
        """Put the examples on the devices."""
        self._evaluator = evaluator
        self._inputs = evaluator.spread(evaluator.inputs(split))
        self._compiled: dict[ExecutionPlan, Any] = {}
        self._whole = NamedSharding(evaluator.mesh, PartitionSpec())  # on every process of several
        masks = [bucket.mask for bucket in self._inputs.batches]
        everywhere = jax.jit(lambda masks: masks, out_shardings=self._whole)(masks)
        self._real = [np.asarray(mask) for mask in everywhere]  # no padding: [batches rows] of each bucket
        self._order = np.argsort(evaluator.arrangement(split))
        loaded = evaluator.loaded
        units = loaded.example_units(split)
        task = np.repeat(np.arange(len(units)), [len(own) for own in units])
        reference = np.asarray(evaluator.scoring(split, normalises=True).reference, float)
        likelihood = np.asarray([kind == "completion" for kind in loaded.kinds])
        self.sample = Sample(task, 1 / (len(reference) * reference), np.concatenate(units), likelihood)
        backbone = loaded.backbone
        self._of_deltas = jax.jit(
            lambda inputs, deltas: _values(backbone, inputs, deltas), out_shardings=self._whole
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

            def values(inputs: EvalInputs, keep: Array, scale: Array) -> tuple[Array, ...]:
                def member(given: tuple[Array, Array]) -> tuple[Array, ...]:
                    return _values(backbone, inputs, plan.merge.merge(inputs.ingredients, *given))

                return jax.lax.map(member, (keep, scale), batch_size=min(plan.member_chunk, len(keep)))

            self._compiled[plan] = jax.jit(values, out_shardings=self._whole)
        scales = np.broadcast_to(np.asarray(scale, np.float32), len(keep))
        return self._ordered(self._compiled[plan](inputs, keep, scales))

    def of_deltas(self, deltas: Deltas) -> PerExample:
        """Of one model with these deltas."""
        return self._ordered(self._of_deltas(self._inputs._replace(ingredients=None), deltas))

    def _ordered(self, values: tuple[Array, ...]) -> PerExample:
        """Values of every bucket, [*member, batches, rows] each, in the order of the examples."""
        rows = [np.asarray(x)[..., real] for x, real in zip(values, self._real, strict=True)]
        return np.concatenate(rows, axis=-1)[..., self._order].astype(float)


def _values(backbone: Backbone, inputs: EvalInputs, deltas: Deltas) -> tuple[Array, ...]:
    """``PerExample`` of every bucket: [batches, rows]."""

    def one(batch: Batches) -> Array:
        if kind_of(batch.inputs) == "completion":
            found = target_log_probabilities(backbone, inputs.params, batch, deltas)
            return jnp.where(batch.inputs["target_branch"] > 0, found, 0.0).sum(axis=1)
        scores = option_log_probabilities(backbone, inputs.params, inputs.heads, batch, deltas)
        return (jnp.argmax(scores, axis=-1) == batch.label).astype(jnp.float32)

    return tuple(jax.lax.map(one, bucket) for bucket in inputs.batches)
