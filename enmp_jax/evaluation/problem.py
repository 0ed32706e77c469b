"""A run file, loaded: base model, adapters, heads and data, ready to score masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Num

from enmp_jax import merges, models
from enmp_jax.adapters.peft_import import LoadedAdapters, load_adapters
from enmp_jax.config.run_file import RunConfig
from enmp_jax.data import Examples, batch, check_splits, load_examples, preprocess_for
from enmp_jax.devices.mesh import AXES, choose_shape, make_mesh, replicate
from enmp_jax.errors import UserError
from enmp_jax.evaluation import budget, delta_format, reference_cache
from enmp_jax.evaluation.heads import load_heads
from enmp_jax.evaluation.population import Fixed, make_evaluate, place
from enmp_jax.evaluation.scoring import Counts, Heads, Scoring
from enmp_jax.io.progress import SILENT, Reporter
from enmp_jax.lora import LoraStack
from enmp_jax.masks import MaskSpec
from enmp_jax.merges.base import Ingredients, Merge
from enmp_jax.models import checkpoint
from enmp_jax.models.base import Backbone, Params
from enmp_jax.models.sharding import param_sharding

Which = Literal["train", "search", "selection", "test"]


@dataclass
class Problem:
    """Everything that scoring masks needs. Build with ``load``."""

    run: RunConfig
    backbone: Backbone
    params: Params
    stack: LoraStack
    adapters: LoadedAdapters
    heads: Heads
    examples: dict[Which, list[Examples]]
    mesh: Mesh
    merge: Merge
    base: str
    """Directory or hub id of the base model, resolved."""
    compilations: int = field(default=0)
    """How often an evaluation was traced for compilation."""
    _evaluators: dict[str, Callable[..., Counts]] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names in merge order."""
        return self.stack.tasks

    @cached_property
    def mask_spec(self) -> MaskSpec:
        """How genomes become masks of these adapters."""
        search = self.run.search
        return MaskSpec.of(
            self.stack, search.granularity, search.max_pruned, search.threshold, search.search_scale
        )

    @cached_property
    def ingredients(self) -> Ingredients:
        """What the merge method made of the adapters, once."""
        return self.merge.prepare(self.stack)

    def fixed(self, which: Which) -> Fixed:
        """What all members share, on the device: weights, prepared adapters, batches of a split."""
        size = self.run.evaluation.batch_size
        buckets = batch(self.examples[which], size)
        return place(Fixed(self.params, self.ingredients, self.heads, buckets), self.mesh, self.backbone)

    def sizes(self, which: Which) -> Float[np.ndarray, " task"]:
        """Number of examples of every task in a split."""
        return np.asarray([len(e.labels) for e in self.examples[which]], np.float32)

    def evaluator(self, merge: Merge | None = None) -> Callable[..., Counts]:
        """The function ``(fixed, keep, scale) -> Counts`` of ``population.make_evaluate``, counted."""
        merge = merge or self.merge

        def counted(fixed, keep, scale):
            self.compilations += 1  # runs when traced, not when called
            formed, chunk = self.arrangement(merge, fixed)
            return make_evaluate(self.backbone, formed, len(self.tasks), self.mesh, chunk)(fixed, keep, scale)

        return counted

    def arrangement(self, merge: Merge, fixed: Fixed) -> tuple[Merge, int]:
        """The method with its deltas in their cheaper form, and how many members a device evaluates together.

        The run file's ``member_chunk``, or what fits (see ``form`` and ``plan``).
        """
        members = math.ceil(self.run.search.population / self.mesh.shape["population"])
        data = self.mesh.shape["data"]  # inside a trace nothing knows how it is divided
        buckets = [{k: _rows(v, data) for k, v in bucket.inputs.items()} for bucket in fixed.batches]
        activations = max(budget.activation_bytes(self.backbone, inputs) for inputs in buckets)
        shared = budget.n_bytes(self.params) + budget.n_bytes((fixed.ingredients, fixed.heads))
        shared += budget.n_bytes(fixed.batches) // data
        free = int(budget.USABLE * budget.device_memory()) - shared
        counts = [bucket.label.shape[0] for bucket in fixed.batches]
        formed = merge
        if self.mesh.shape["model"] == 1:  # else base weights are divided, and so would these have to be
            tokens = [next(iter(i.values())).shape[0] * budget.n_tokens(self.backbone, i) for i in buckets]
            formed = delta_format.choose(
                merge, fixed.ingredients, self.mask_spec.shape, batches=sum(counts),
                tokens=sum(n * count for n, count in zip(tokens, counts, strict=True)),
                room=free // min(members, delta_format.LEAST_MEMBERS) - activations,
            )  # fmt: skip
        if self.run.evaluation.member_chunk:
            return formed, min(members, self.run.evaluation.member_chunk)
        deltas, _ = budget.delta_bytes(merge, fixed.ingredients, self.mask_spec.shape, formed)
        return formed, budget.choose_member_chunk(members, deltas, activations, free)

    def score(
        self, fixed: Fixed, keep: Num[np.ndarray, "member ..."], scale: Float[np.ndarray, " member"]
    ) -> Counts:
        """Score any number of masks with the run's merge method, a population at a time."""
        if "merge" not in self._evaluators:
            self._evaluators["merge"] = jax.jit(self.evaluator())
        return in_populations(self._evaluators["merge"], fixed, keep, scale, self.run.search.population)

    def score_experts(self, which: Which) -> Counts:
        """Every adapter alone, unmerged, at its own scaling: the reference accuracies.

        Measured once: later calls, in this process or another, read them from the cache.
        """
        return reference_cache.remembered(self, which, lambda: self._measure_experts(which))

    def _measure_experts(self, which: Which) -> Counts:
        merge = merges.make("sum")
        fixed = self.fixed(which)
        fixed = fixed._replace(ingredients=replicate(merge.prepare(self.stack), self.mesh))
        if "experts" not in self._evaluators:
            self._evaluators["experts"] = jax.jit(self.evaluator(merge))
        n = len(self.tasks)
        keep = np.zeros((n, self.stack.n_layers, n), np.float32)
        keep[np.arange(n), :, np.arange(n)] = 1
        counts = in_populations(self._evaluators["experts"], fixed, keep, np.ones(n, np.float32), n)
        return Counts(*(np.diagonal(np.asarray(x)) for x in counts))

    def score_base(self, which: Which) -> Counts:
        """The base model with no adapter at all."""
        fixed = self.fixed(which)
        keep = np.zeros((1, self.stack.n_layers, len(self.tasks)), bool)
        counts = self.score(fixed, keep, np.ones(1, np.float32))
        return Counts(*(np.asarray(x)[0] for x in counts))

    def scoring(self, which: Which) -> Scoring:
        """Sizes and reference accuracies of a split: given in the run file, or measured here."""
        sizes = self.sizes(which)
        given = [task.reference for task in self.run.tasks]
        if all(value is not None for value in given):
            return Scoring(jnp.asarray(sizes), jnp.asarray(given, jnp.float32))
        measured = np.asarray(self.score_experts(which).correct) / sizes
        reference = [g if g is not None else m for g, m in zip(given, measured, strict=True)]
        for task, value in zip(self.tasks, reference, strict=True):
            if value == 0:
                raise UserError(
                    f"the adapter of {task!r} alone gets nothing right on {which}: check its head and labels"
                )
        return Scoring(jnp.asarray(sizes), jnp.asarray(reference, jnp.float32))


def _rows(x: Any, data: int) -> jax.ShapeDtypeStruct:
    """What a device has of one batch, of inputs [batches, row, ...]."""
    return jax.ShapeDtypeStruct((x.shape[1] // data, *x.shape[2:]), x.dtype)


def in_populations(evaluate, fixed: Fixed, keep: np.ndarray, scale: np.ndarray, size: int) -> Counts:
    """Call a compiled evaluation on any number of masks, ``size`` at a time (one shape, one compilation)."""
    parts: list[Counts] = []
    for start in range(0, len(keep), size):
        some, scales = keep[start : start + size], scale[start : start + size]
        missing = size - len(some)
        if missing:
            some = np.concatenate([some, np.repeat(some[-1:], missing, axis=0)])
            scales = np.concatenate([scales, np.repeat(scales[-1:], missing)])
        counts = evaluate(fixed, some, scales)  # numpy: every process gives the same
        parts.append(Counts(*(np.asarray(x)[: size - missing] for x in counts)))
    return Counts(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def load(
    run: RunConfig,
    splits: Sequence[Which] = ("search", "selection", "test"),
    reporter: Reporter = SILENT,
) -> Problem:
    """Load base model, adapters, heads and data of a run.

    Raises:
        UserError: anything that does not fit together; nothing has been written by then.
    """
    merge = merges.make(
        run.merge.method, run.merge.space, run.merge.isotropize, **run.merge.hyperparameters()
    )
    base = run.path(run.base.model)
    backbone = models.build(checkpoint.read_config(checkpoint.find(base)), run.base.dtype)
    mesh = choose_mesh(run, backbone)
    backbone, params = models.load(base, dtype=run.base.dtype, place=param_sharding(mesh))
    adapters = load_run_adapters(run, backbone)
    examples = load_splits(run, backbone, base, splits, reporter)
    names = {task.name: e.class_names for task, e in zip(run.tasks, examples[splits[0]], strict=True)}
    heads = load_heads(run, adapters.heads, base, backbone, class_names=names)
    check_labels(run, heads, examples)
    return Problem(run, backbone, params, adapters.stack, adapters, heads, examples, mesh, merge, base)


def load_run_adapters(run: RunConfig, backbone: Backbone) -> LoadedAdapters:
    """The adapters that a run file names, matched with its base.

    Raises:
        UserError: a missing or bad adapter, or one of another base.
    """
    return load_adapters(
        {task.name: run.path(task.adapter) for task in run.tasks},
        backbone.canonical,
        n_layers=backbone.n_layers,
        modules=backbone.modules,
        base_name=run.base.model,
        allow_base_mismatch=run.base.allow_mismatch,
    )


def choose_mesh(run: RunConfig, backbone: Backbone) -> Mesh:
    """The run file's mesh, or the one for these devices, this population and this base model.

    Raises:
        UserError: an unknown axis, too few devices, or a batch that ``data`` does not divide.
    """
    shape = run.evaluation.mesh
    if shape is None:
        model = budget.smallest_model_axis(backbone, jax.device_count())
        shape = choose_shape(jax.device_count(), run.search.population, run.evaluation.batch_size, model)
    unknown = [axis for axis in shape if axis not in AXES]
    if unknown:
        raise UserError(f"evaluation.mesh: unknown axis {unknown[0]!r}; the axes are {', '.join(AXES)}")
    mesh = make_mesh(shape.get("population", 1), shape.get("data", 1), shape.get("model", 1))
    if run.evaluation.batch_size % mesh.shape["data"]:
        raise UserError(
            f"evaluation.batch_size {run.evaluation.batch_size} does not divide over the "
            f"{mesh.shape['data']} devices of the mesh axis data"
        )
    return mesh


def load_splits(
    run: RunConfig, backbone: Backbone, base: str, splits: Sequence[Which], reporter: Reporter = SILENT
) -> dict[Which, list[Examples]]:
    """The examples of every task, by split; refused where splits share examples."""
    limits = {
        "search": run.evaluation.search_examples,
        "selection": run.evaluation.selection_examples,
        "test": run.evaluation.test_examples,
    }
    loaded: dict[str, dict[str, Examples]] = {}
    for task in run.tasks:
        preprocess = preprocess_for(base, backbone.family, task.data)
        loaded[task.name] = {
            which: load_examples(
                task.data, which, run.root, preprocess, limits.get(which),
                progress=reporter.reading(f"{task.name}, {which}"),
            )
            for which in splits
        }  # fmt: skip
    drop = [task.name for task in run.tasks if task.data.duplicates == "drop"]
    checked = check_splits(loaded, drop)
    for task in run.tasks:
        for which in splits:
            for note in checked[task.name][which].notes:  # what was truncated, left out, dropped
                reporter.say(f"{task.name}, {which}: {note}")
    return {which: [checked[task.name][which] for task in run.tasks] for which in splits}


def check_labels(run: RunConfig, heads: Heads, examples: dict[Which, list[Examples]]) -> None:
    """Every label must be a class that the task's head can answer.

    Raises:
        UserError: the first label that is not.
    """
    allowed = np.asarray(heads.allowed)
    for which, per_task in examples.items():
        for i, (task, e) in enumerate(zip(run.tasks, per_task, strict=True)):
            answerable = np.flatnonzero(allowed[i])
            wrong = e.labels[~np.isin(e.labels, answerable)]
            if len(wrong):
                raise UserError(
                    f"tasks.{task.name}.data.{which}: label {wrong[0]} is none of the head's classes "
                    f"{', '.join(map(str, answerable[:10]))}{' ...' if len(answerable) > 10 else ''}; "
                    "set data.labels to map them"
                )
