"""A run file, loaded: base model, adapters, heads and examples. Data only; ``Evaluator`` scores masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from enmp_jax import merges, models
from enmp_jax.adapters.peft_import import LoadedAdapters, load_adapters
from enmp_jax.config.run_file import RunConfig
from enmp_jax.config.sections import TaskConfig
from enmp_jax.data import (
    Examples,
    Kind,
    check_splits,
    kind_of,
    load_examples,
    preprocess_for,
    redraw,
    task_kind,
)
from enmp_jax.devices.mesh import AXES, choose_shape, make_mesh
from enmp_jax.errors import UserError
from enmp_jax.evaluation import budget
from enmp_jax.evaluation.fitness import Fitness
from enmp_jax.evaluation.heads import load_heads
from enmp_jax.evaluation.scoring import Heads
from enmp_jax.io.files import is_file
from enmp_jax.io.progress import SILENT, Reporter
from enmp_jax.lora import LoraStack
from enmp_jax.masks import MaskSpec
from enmp_jax.merges.base import Merge
from enmp_jax.models import checkpoint
from enmp_jax.models.base import Backbone, Params
from enmp_jax.models.sharding import param_sharding

Split = Literal["train", "search", "selection", "test"]


@dataclass(frozen=True)
class LoadedRun:
    """Everything that scoring masks needs. Build with ``load``.

    Attributes:
        run: the run file.
        base: directory or hub id of the base model, resolved.
        backbone: the base model.
        params: its weights, on ``mesh``.
        mesh: the devices of the run.
        adapters: the LoRA adapters, as imported.
        heads: the tasks' classification heads (of generative tasks a row of zeros).
        examples: split -> examples of every task, in the order of the tasks.
        programs: compiled functions that depend on base and mesh alone, by name; copies share them.
    """

    run: RunConfig
    base: str
    backbone: Backbone
    params: Params
    mesh: Mesh
    adapters: LoadedAdapters
    heads: Heads
    examples: Mapping[Split, list[Examples]]
    programs: dict[str, Callable[..., Any]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def stack(self) -> LoraStack:
        """The adapters, stacked."""
        return self.adapters.stack

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names in merge order."""
        return self.stack.tasks

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of every task."""
        return tuple(kind_of(e.inputs) for e in next(iter(self.examples.values())))

    @cached_property
    def mask_spec(self) -> MaskSpec:
        """How genomes become masks of these adapters."""
        search = self.run.search
        return MaskSpec.of(
            self.stack, search.granularity, search.max_pruned, search.threshold, search.search_scale
        )

    def sizes(self, split: Split) -> Float[np.ndarray, " task"]:
        """Number of examples of every task in a split."""
        return np.asarray([len(e.labels) for e in self.examples[split]], np.float32)

    def example_units(self, split: Split) -> list[Float[np.ndarray, " example"]]:
        """What each example counts in its task's mean: 1 or, of a completion, the tokens of its answer."""
        return [
            (e.inputs["target_branch"] > 0).sum(axis=1).astype(float)
            if kind == "completion"
            else np.ones(len(e.labels))
            for e, kind in zip(self.examples[split], self.kinds, strict=True)
        ]

    def units(self, split: Split) -> Float[np.ndarray, " task"]:
        """What scores are means over: number of examples or, of completions, of the tokens of answers."""
        return np.asarray([own.sum() for own in self.example_units(split)], np.float32)

    def labelled(self, split: Split) -> bool:
        """Whether a split has labels, for all tasks; scores without are agreement with the experts.

        Completions always have their answers.

        Raises:
            UserError: only some tasks have.
        """
        return _labelled(self.tasks, split, self.examples[split])

    def check_fitness(self, key: str, kind: Fitness, splits: Sequence[Split]) -> None:
        """Refuse a fitness that needs what is not there.

        Args:
            key: what sets it in the run file.
            kind: the fitness.
            splits: where it will be computed.

        Raises:
            UserError: the first split without labels, if the fitness needs them; or generative tasks, if it
                looks at hidden states.
        """
        if kind.hidden and set(self.kinds) != {"classification"}:
            raise UserError(
                f"{key} {kind.name} compares hidden states of classification tasks only: take expert_kl"
            )
        for split in splits:
            if kind.needs_labels and not self.labelled(split):
                raise UserError(
                    f"{key} {kind.name} needs labels, and the {split} split has none: take expert_margin, "
                    "which asks the experts instead"
                )


def load(
    run: RunConfig,
    splits: Sequence[Split] = ("search", "selection", "test"),
    reporter: Reporter = SILENT,
) -> LoadedRun:
    """Load base model, adapters, heads and data of a run.

    Raises:
        UserError: anything that does not fit together; nothing has been written by then.
    """
    make_merge(run)  # a bad method is said before anything is read
    if run.merge.statistics is not None and not is_file(Path(run.merge.statistics)):
        raise UserError(
            f"merge.statistics: there is no file {run.merge.statistics}: make it by enmp statistics"
        )
    base = run.path(run.base.model)
    dtype, quantization = run.base.dtype, run.base.quantization
    config = checkpoint.read_config(checkpoint.find(base))
    backbone = models.build(config, dtype, quantization=quantization)
    mesh = choose_mesh(run, backbone)
    backbone, params = models.load(base, dtype, param_sharding(mesh), quantization=quantization)
    adapters = load_run_adapters(run, backbone)
    examples = load_splits(run, backbone, base, splits, reporter)
    names = {task.name: e.class_names for task, e in zip(run.tasks, examples[splits[0]], strict=True)}
    first = zip(run.tasks, examples[splits[0]], strict=True)
    kinds: dict[str, Kind] = {task.name: kind_of(e.inputs) for task, e in first}
    _check_task_types(run, adapters, kinds)
    heads = load_heads(run, adapters.heads, base, backbone, class_names=names, kinds=kinds)
    check_labels(run, heads, examples)
    return LoadedRun(run, base, backbone, params, mesh, adapters, heads, examples)


def _check_task_types(run: RunConfig, adapters: LoadedAdapters, kinds: Mapping[str, Kind]) -> None:
    """Refuse adapters of causal language models where classes are asked for, and no head is given."""
    for task in run.tasks:
        adapter = adapters.adapters[task.name]
        causal = adapter.settings.task_type == "CAUSAL_LM" and not adapter.heads
        if causal and kinds[task.name] == "classification" and task.head.source == "adapter":
            raise UserError(
                f"the adapter of {task.name!r} is of a causal language model (CAUSAL_LM) and has no head to "
                f"classify with: give data with choices or answers, or set tasks.{task.name}.head.source"
            )


def make_merge(run: RunConfig) -> Merge:
    """The merge method of a run file.

    Raises:
        UserError: an unknown method or hyperparameter, or a value out of range.
    """
    merge = run.merge
    return merges.make(merge.method, merge.space, merge.isotropize, **merge.arguments())


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
        base=run.path(run.base.model),
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
    run: RunConfig, backbone: Backbone, base: str, splits: Sequence[Split], reporter: Reporter = SILENT
) -> dict[Split, list[Examples]]:
    """The examples of every task, by split; refused where splits share examples."""
    limits = {
        "search": run.evaluation.search_examples,
        "selection": run.evaluation.selection_examples,
        "test": run.evaluation.test_examples,
    }
    loaded: dict[str, dict[str, Examples]] = {}
    seed, wanted = run.evaluation.seed, splits
    both: tuple[Split, ...] = ("search", "selection")
    drawn = both if seed and any(split in splits for split in both) else ()
    splits = tuple(dict.fromkeys((*splits, *drawn)))
    for task in run.tasks:
        kind = checked_kind(task, run.root, backbone, run.base.model)
        preprocess = preprocess_for(base, backbone.family, task.data, kind)
        loaded[task.name] = {
            split: load_examples(
                task.data, split, run.root, preprocess, None if split in drawn else limits.get(split),
                progress=reporter.reading(f"{task.name}, {split}"),
            )
            for split in splits
        }  # fmt: skip
    drop = [task.name for task in run.tasks if task.data.duplicates == "drop"]
    checked = check_splits(loaded, drop)
    for task in run.tasks:
        for split in splits:
            for note in checked[task.name][split].notes:  # what was truncated, left out, dropped
                reporter.say(f"{task.name}, {split}: {note}")
    if drawn:
        checked = redraw(checked, seed, limits)
    return {split: [checked[task.name][split] for task in run.tasks] for split in wanted}


def checked_kind(task: TaskConfig, root: Path, backbone: Backbone, base: str) -> Kind:
    """The kind of a task, which the base model must be able to do.

    Raises:
        UserError: a generative task for a base model without next-token logits, or as ``task_kind``.
    """
    kind = task_kind(task, root)
    if task.metrics and kind != "completion":
        raise UserError(f"tasks.{task.name}.metrics: nothing is generated in a {kind} task; leave them out")
    headless = backbone.logits is None or getattr(backbone.config, "head", "") is None
    if kind != "classification" and headless:
        raise UserError(
            f"tasks.{task.name} is a {kind} task, and the base model {base} ({backbone.family}) has no "
            "language-model head: take a causal language model, not a classifier or encoder"
        )
    return kind


def check_labels(run: RunConfig, heads: Heads, examples: Mapping[Split, list[Examples]]) -> None:
    """Every label must be a class that the task's head can answer; splits without labels have none to check.

    Raises:
        UserError: the first label that is not, or a split in which only some tasks have labels.
    """
    allowed = np.asarray(heads.allowed)
    for split, per_task in examples.items():
        if not _labelled([task.name for task in run.tasks], split, per_task):
            continue
        for i, (task, e) in enumerate(zip(run.tasks, per_task, strict=True)):
            if kind_of(e.inputs) != "classification":
                continue  # checked where they were read: every example has choices of its own
            answerable = np.flatnonzero(allowed[i])
            wrong = e.labels[~np.isin(e.labels, answerable)]
            if len(wrong):
                raise UserError(
                    f"tasks.{task.name}.data.{split}: label {wrong[0]} is none of the head's classes "
                    f"{', '.join(map(str, answerable[:10]))}{' ...' if len(answerable) > 10 else ''}; "
                    "set data.labels to map them"
                )


def _labelled(tasks: Sequence[str], split: Split, examples: Sequence[Examples]) -> bool:
    asked = [(t, e) for t, e in zip(tasks, examples, strict=True) if kind_of(e.inputs) != "completion"]
    having = [task for task, e in asked if e.labelled]
    lacking = [task for task, e in asked if not e.labelled]
    if having and lacking:
        raise UserError(
            f"the {split} split has labels for {', '.join(having)} but none for {', '.join(lacking)}: set "
            "data.label: null for those that have, so that all scores mean the same"
        )
    return not lacking
