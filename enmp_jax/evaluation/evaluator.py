"""Masks of a loaded run scored on its devices: who compiles what, and how many members run together."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from enmp_jax.config.run_file import RunConfig
from enmp_jax.data import Examples, Order, arrangement, batch
from enmp_jax.deltas import Deltas
from enmp_jax.devices.distributed import put
from enmp_jax.evaluation import budget, delta_format, experts, prefix
from enmp_jax.evaluation.loaded_run import LoadedRun, Split, make_merge
from enmp_jax.evaluation.population import (
    EvalInputs,
    EvaluateMasks,
    count_all,
    make_evaluate,
    place,
    score_in_chunks,
)
from enmp_jax.evaluation.scoring import Counts, Scoring
from enmp_jax.evaluation.yardstick import Yardstick
from enmp_jax.merges.base import Ingredients, Merge

T = TypeVar("T")


class ExecutionPlan(NamedTuple):
    """How masks are evaluated: the method with its deltas in their cheapest format, and how many members
    a device evaluates together."""

    merge: Merge
    member_chunk: int


class Evaluator(Yardstick):
    """Scores the masks of one loaded run. Everything static is decided here, before anything is traced."""

    def __init__(self, loaded: LoadedRun, say: Callable[[str], None] = print):
        super().__init__(loaded)
        self.mesh, self.say = loaded.mesh, say
        self.merge = make_merge(loaded.run)
        self._plans: dict[Any, ExecutionPlan] = {}
        self._compiled: dict[ExecutionPlan, Callable[..., Counts]] = {}
        self._compiled_from: dict[ExecutionPlan, Callable[..., Counts]] = {}

    def under(self, run: RunConfig) -> Evaluator:
        """The same base, adapters and data under other settings of merge and search; the experts' answers are
        shared."""
        other = Evaluator(dataclasses.replace(self.loaded, run=run))
        other._answers = self._answers
        return other

    @functools.cached_property
    def ingredients(self) -> Ingredients:
        """What the merge method made of the adapters, once."""
        return self.merge.prepare(self.loaded.stack)

    def on(self, examples: Mapping[Split, list[Examples]]) -> Evaluator:
        """This evaluator on other examples of the same tasks; compiled functions are shared."""
        self.ingredients  # noqa: B018 (computed once for all)
        other = copy.copy(self)
        other.loaded, other._answers = dataclasses.replace(self.loaded, examples=examples), {}
        return other

    def inputs(self, split: Split, ingredients: Ingredients | None = None) -> EvalInputs:
        """What all members share, on the devices: weights, prepared adapters, batches of a split.

        Args:
            split: whose examples.
            ingredients: of another method than the run's.
        """
        loaded = self.loaded
        expert = None
        if self.kind.needs_expert:
            answers = self.expert_answers(split)
            expert = [a.likeliest if isinstance(a, experts.TokenAnswers) else a for a in answers]
        batches = batch(
            self.examples(split),
            loaded.run.evaluation.batch_size,
            expert=expert,
            order=self._order(split),
            states=experts.hidden_states(loaded, split) if self.kind.hidden else None,
            devices=math.prod(self.mesh.shape[axis] for axis in self._row_axes),
        )
        prepared = self.ingredients if ingredients is None else ingredients
        return place(EvalInputs(loaded.params, prepared, loaded.heads, batches), self.mesh, loaded.backbone)

    def arrangement(self, split: Split) -> Int[np.ndarray, " example"]:
        """Which example of a split is in which row of ``inputs``: see ``data.arrangement``."""
        size = self.loaded.run.evaluation.batch_size
        return arrangement(self.loaded.examples[split], size, order=self._order(split))

    def _order(self, split: Split) -> Order:
        racing = split == "search" and self.loaded.run.search.fidelity == "racing"
        return "stratified" if racing else "given"

    def plan(self, inputs: EvalInputs, merge: Merge | None = None) -> ExecutionPlan:
        """How masks are evaluated on these inputs (see ``delta_format`` and ``budget``); the same for the
        same shapes, so that nothing compiles twice.

        Args:
            inputs: arrays on the mesh.
            merge: default: the run's.
        """
        merge = merge or self.merge
        key = merge, tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(inputs.batches))
        if key not in self._plans:
            self._plans[key] = self._make_plan(inputs, merge)
        return self._plans[key]

    def _make_plan(self, inputs: EvalInputs, merge: Merge) -> ExecutionPlan:
        loaded = self.loaded
        population, shape = loaded.run.search.population, loaded.mask_spec.shape
        members = math.ceil(population / self.mesh.shape["population"])
        activations = budget.largest_activations(loaded.backbone, inputs.batches)
        free = budget.free_bytes(inputs)
        chosen = merge
        if self.mesh.shape["model"] == 1:  # else base weights are divided, and so would these have to be
            tokens, batches = budget.tokens_and_batches(loaded.backbone, inputs.batches)
            chosen = delta_format.choose(
                merge, inputs.ingredients, shape, tokens=tokens, batches=batches,
                free_bytes=free // min(members, delta_format.LEAST_MEMBERS) - activations,
            )  # fmt: skip
        if loaded.run.evaluation.member_chunk:
            return ExecutionPlan(chosen, min(members, loaded.run.evaluation.member_chunk))
        deltas, _ = budget.delta_bytes(merge, inputs.ingredients, shape, chosen)
        return ExecutionPlan(chosen, budget.choose_member_chunk(members, deltas, activations, free))

    def evaluate(self, plan: ExecutionPlan) -> EvaluateMasks:
        """The pure function ``(inputs, keep, scale) -> Counts`` of ``population.make_evaluate``."""
        loaded = self.loaded
        return make_evaluate(
            loaded.backbone, plan.merge, len(loaded.tasks), self.mesh, plan.member_chunk, self.kind
        )

    @property
    def _row_axes(self) -> tuple[str, ...]:
        """The axes of the mesh that the rows of a batch can be divided over."""
        axes = ("population", "data")
        fits = self.loaded.run.evaluation.batch_size % math.prod(self.mesh.shape[axis] for axis in axes) == 0
        return axes if fits else ("data",)

    def spread(self, inputs: EvalInputs) -> EvalInputs:
        """Inputs whose examples lie over all devices of the mesh but those of ``model``: for one model."""
        sharding = NamedSharding(self.mesh, PartitionSpec(None, self._row_axes))
        return inputs._replace(batches=put(inputs.batches, sharding))

    def bearing(self, plan: ExecutionPlan, work: Callable[[ExecutionPlan], T]) -> T:
        """Do work; where memory does not suffice, again with half the members together, at most three times.

        Args:
            plan: how many that are.
            work: called with the plan.
        """
        for halvings in range(budget.HALVINGS + 1):
            try:
                return work(plan)
            except Exception as error:
                # several processes cannot know of each other's
                last = halvings == budget.HALVINGS or plan.member_chunk == 1 or jax.process_count() > 1
                if last or not budget.out_of_memory(error):
                    raise
            fewer = plan.member_chunk // 2
            self.say(f"out of memory with {plan.member_chunk} members together: trying {fewer}")
            plan = plan._replace(member_chunk=fewer)
            for key, known in self._plans.items():
                self._plans[key] = known._replace(member_chunk=min(known.member_chunk, fewer))
        raise AssertionError("unreachable")

    def relaxed_fitness(self) -> Callable[..., Float[Array, ""]]:
        """``(weights [*module], inputs, scoring, scale) -> fitness``, to be differentiated.

        The fitness of one merged model; activations of a batch are computed again in the backward pass.
        """
        loaded, kind, objective = self.loaded, self.kind, self.loaded.run.search.objective

        def value(weights: Array, inputs: EvalInputs, scoring: Scoring, scale: Array) -> Array:
            deltas = self.merge.merge(inputs.ingredients, weights, scale)
            counts = count_all(loaded.backbone, inputs, deltas, len(loaded.tasks), kind, remat=True)
            return scoring.fitness(counts, kind, objective)

        return value

    def score(
        self,
        inputs: EvalInputs,
        keep: Shaped[np.ndarray, "member ..."],
        scale: Float[np.ndarray, " member"],
        plan: ExecutionPlan | None = None,
    ) -> Counts:
        """Score any number of masks; runs one forward pass a mask, the last chunk filled up.

        Args:
            inputs: of a split.
            keep: masks or relaxed masks, [layer, task] or [layer, projection, task] each.
            scale: merge coefficients.
            plan: default: that of the run's merge method.
        """

        def scored(plan: ExecutionPlan) -> Counts:
            if plan not in self._compiled:
                self._compiled[plan] = jax.jit(self.evaluate(plan))
            together = self.mesh.shape["population"] * plan.member_chunk
            return score_in_chunks(functools.partial(self._compiled[plan], inputs), keep, scale, together)

        return self.bearing(plan or self.plan(inputs), scored)

    def fitness_of(
        self,
        inputs: EvalInputs,
        scoring: Scoring,
        keep: Shaped[np.ndarray, "member ..."],
        scale: float | Float[np.ndarray, " member"],
    ) -> Float[np.ndarray, " member"]:
        """Fitness of masks or relaxed masks under the objective of the run; NaN stays NaN.

        Args:
            inputs: of a split.
            scoring: of the same split.
            keep: as for ``score``.
            scale: merge coefficients, or one for all.
        """
        scales = np.broadcast_to(np.asarray(scale, np.float32), len(keep))
        return self.fitness_from(scoring, self.score(inputs, keep, scales))

    def fitness_from(self, scoring: Scoring, counts: Counts) -> Float[np.ndarray, " member"]:
        """Counts to fitness under the objective of the run."""
        return np.asarray(scoring.fitness(counts, self.kind, self.loaded.run.search.objective))

    def score_deltas(self, inputs: EvalInputs, deltas: Deltas) -> Counts:
        """Counts of one model with these deltas."""
        loaded = self.loaded

        def counted(inputs: EvalInputs, deltas: Deltas) -> Counts:
            return count_all(loaded.backbone, inputs, deltas, len(loaded.tasks), self.kind)

        return jax.jit(counted)(self.spread(inputs), deltas)

    def score_from(
        self,
        inputs: EvalInputs,
        parent: Shaped[np.ndarray, "*module"],
        keep: Shaped[np.ndarray, "member *module"],
        scale: float,
        plan: ExecutionPlan | None = None,
    ) -> Counts:
        """Score masks that are variations of one: their layers before the first changed one run once for all.

        Where that saves nothing, or memory cannot hold it, this is ``score``.

        Args:
            inputs: of a split.
            parent: the mask that is varied; to have its score too, make it one of ``keep``.
            keep: masks or relaxed masks.
            scale: merge coefficient of all.
            plan: default: that of the run's merge method.
        """
        plan, loaded = plan or self.plan(inputs), self.loaded
        merge, chunk = plan
        most = prefix.most_members(loaded.backbone, merge, inputs, parent.shape, self.mesh, chunk)
        first = np.asarray(prefix.first_changed(parent, keep))
        if self.kind.hidden or not prefix.pays(
            first, loaded.backbone.n_layers, most, self.mesh.shape["population"], chunk
        ):
            return self.score(inputs, keep, np.full(len(keep), scale, np.float32), plan)
        if plan not in self._compiled_from:
            evaluate = prefix.make_evaluate_from(
                loaded.backbone, merge, len(loaded.tasks), self.mesh, chunk, self.kind
            )
            self._compiled_from[plan] = jax.jit(evaluate)
        score = functools.partial(self._compiled_from[plan], inputs, parent, scale)
        return prefix.in_calls(score, parent, keep, most)

    def score_base(self, split: Split) -> Counts:
        """The base model with no adapter at all."""
        nothing = ~self.loaded.mask_spec.all_kept()[None]
        counts = self.score(self.inputs(split), nothing, np.ones(1, np.float32))
        return Counts(*(np.asarray(x)[0] for x in counts))
