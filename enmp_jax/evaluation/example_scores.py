"""Scores of single examples under a merged model: what paired comparisons of models are made of.

Searches need sums over examples only (``population``); here every example keeps its own counts, so that two
models can be compared on the same ones; the sums come from them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped

from enmp_jax.data import Batches
from enmp_jax.deltas import Deltas
from enmp_jax.devices.mesh import replicate
from enmp_jax.evaluation.evaluator import Evaluator, ExecutionPlan
from enmp_jax.evaluation.kinds import score_batch
from enmp_jax.evaluation.loaded_run import Split
from enmp_jax.evaluation.population import EvalInputs, equal_chunks, score_in_chunks
from enmp_jax.evaluation.scoring import Counts
from enmp_jax.merges.base import Ingredients, Merge
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
        self._completes = likelihood[task]
        self._of_deltas = jax.jit(self._counts, out_shardings=self._whole)

    def of_masks(
        self,
        keep: Shaped[np.ndarray, "member *module"],
        scale: float | Float[np.ndarray, " member"],
        merge: Merge | None = None,
        ingredients: Ingredients | None = None,
    ) -> PerExample:
        """Of merges under masks or weights; arguments as in ``count_masks``."""
        return self.scores(self.count_masks(keep, scale, merge, ingredients))

    def of_deltas(self, deltas: Deltas) -> PerExample:
        """Of one model with these deltas."""
        return self.scores(self.count_deltas(deltas))

    def count_masks(
        self,
        keep: Shaped[np.ndarray, "member *module"],
        scale: float | Float[np.ndarray, " member"],
        merge: Merge | None = None,
        ingredients: Ingredients | None = None,
    ) -> Counts:
        """Counts [member, example] of merges under masks or weights.

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
        scales = np.broadcast_to(np.asarray(scale, np.float32), len(keep))

        def counted(plan: ExecutionPlan) -> Counts:
            if plan not in self._compiled:
                compiled = jax.jit(functools.partial(self._count, plan.merge), out_shardings=self._whole)
                self._compiled[plan] = compiled
            count = functools.partial(self._compiled[plan], inputs)
            _, size = equal_chunks(len(keep), plan.member_chunk)
            return score_in_chunks(lambda *masks: self._ordered(count(*masks)), keep, scales, size)

        return evaluator.bearing(evaluator.plan(inputs, merge), counted)

    def count_deltas(self, deltas: Deltas) -> Counts:
        """Counts [example] of one model with these deltas."""
        return self._ordered(self._of_deltas(self._inputs._replace(ingredients=None), deltas))

    def scores(self, counts: Counts) -> PerExample:
        """What an example is scored by."""
        return np.where(self._completes, counts.log_likelihood, counts.correct)

    def sums(self, counts: Counts) -> Counts:
        """Counts of examples, added up: [*member, task]."""
        axis, tasks = np.ndim(counts.correct) - 1, range(len(self.sample.weight))
        own = [self.sample.task == task for task in tasks]
        return Counts(
            *(np.stack([np.compress(rows, x, axis).sum(axis) for rows in own], axis) for x in counts)
        )

    def _count(
        self, merge: Merge, inputs: EvalInputs, keep: Shaped[Array, "member ..."], scale: Array
    ) -> tuple[Counts, ...]:
        return jax.vmap(lambda *mask: self._counts(inputs, merge.merge(inputs.ingredients, *mask)))(
            keep, scale
        )

    def _counts(self, inputs: EvalInputs, deltas: Deltas) -> tuple[Counts, ...]:
        """Of every bucket: [batches, rows]."""
        backbone, kind = self._evaluator.loaded.backbone, self._evaluator.kind

        def one(batch: Batches) -> Counts:
            return score_batch(backbone, inputs.params, inputs.heads, batch, deltas, kind)

        return tuple(jax.lax.map(one, bucket) for bucket in inputs.batches)

    def _ordered(self, buckets: tuple[Counts, ...]) -> Counts:
        """Counts of every bucket, [*member, batches, rows] each, in the order of the examples."""
        lead = (slice(None),) * (buckets[0].correct.ndim - 2)

        def arranged(*values: Array) -> np.ndarray:
            rows = [np.asarray(x)[(*lead, real)] for x, real in zip(values, self._real, strict=True)]
            return np.concatenate(rows, axis=len(lead))[(*lead, self._order)].astype(float)

        return Counts(*(arranged(*values) for values in zip(*buckets, strict=True)))
