"""A suite loaded once for benchmarks/evidence.py: all its columns and seeds share compiled programs.

Compiling is what rows of small models cost. So one program a merge setting scores masks under every fitness
at once, layer masks are written out for all projections, and the gradient takes the fitness that it follows
as an operand.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from enmp_jax import merges
from enmp_jax.config import run_file
from enmp_jax.config.schema import parse
from enmp_jax.config.sections import MergeConfig, SearchConfig
from enmp_jax.data import redraw
from enmp_jax.deltas import Deltas, Dense
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.fitness import FITNESS, Fitness, normalised
from enmp_jax.evaluation.loaded_run import load
from enmp_jax.evaluation.population import EvalInputs, count_all
from enmp_jax.evaluation.scoring import Counts
from enmp_jax.io.progress import SILENT
from enmp_jax.masks import MaskSpec
from enmp_jax.merges.components import singular_components
from enmp_jax.search.gradient import straight_through

Setting = dict[str, Any]

# accuracy and log_likelihood are counted anyway; calibrated has no value per example
VALUES = [
    kind
    for name, kind in FITNESS.items()
    if name not in ("accuracy", "log_likelihood", "calibrated") and not kind.hidden
]
ALL = Fitness(
    "all", "all", lambda x, *others: jnp.stack([kind.value(x, *others) for kind in VALUES], axis=1),
    needs_expert=True,
)  # fmt: skip
SMOOTH = [FITNESS["log_likelihood"], *VALUES]
HIDDEN = FITNESS["expert_hidden"]  # needs the hidden states, so a program of its own
SUM = {"method": "sum"}


class Suite:
    """A run file, loaded, and the programs made for its merge settings.

    Args:
        name: of a run file.
        test_examples: most examples of a task in the test split.
    """

    def __init__(self, name: str, test_examples: int | None):
        run = run_file.load(name)
        # one mask at a time: no chunk is filled up with copies, and larger models are no slower for it
        evaluation = dataclasses.replace(
            run.evaluation, search_examples=None, selection_examples=None, test_examples=test_examples,
            seed=0, member_chunk=1,
        )  # fmt: skip
        self.run = dataclasses.replace(run, evaluation=evaluation)
        self.loaded = load(self.run, reporter=SILENT)
        self.tasks, stack = self.loaded.tasks, self.loaded.stack
        self.layers, self.projections = (
            MaskSpec.of(stack, granularity, run.search.max_pruned) for granularity in ("layer", "projection")
        )
        self._evaluators: dict[str, Evaluator] = {}
        self._gradients: dict[str, Callable[..., Any]] = {}
        self._merged: dict[str, Callable[..., Deltas]] = {}
        self.count_deltas = jax.jit(self._count_deltas)

    @functools.cached_property
    def components(self) -> Any:
        """Ingredients of the sum of the adapters' singular components."""
        return merges.make("sum").prepare(singular_components(self.loaded.stack))

    def draw(self, seed: int, examples: int) -> dict[Any, Any]:
        """Search and selection splits of a seed, at most so many examples a task each, and the test split."""
        tasks = {
            task: {split: found[i] for split, found in self.loaded.examples.items()}
            for i, task in enumerate(self.tasks)
        }
        # 0 would be the run file's own splits
        drawn = redraw(tasks, seed + 1, {"search": examples, "selection": examples})
        return {split: [drawn[task][split] for task in self.tasks] for split in self.loaded.examples}

    def evaluator(self, setting: Setting, fitness: str | None = None) -> Evaluator:
        """Of a merge setting, for masks of projections; made once. Default: of all fitness kinds at once."""
        key = json.dumps([setting, fitness], sort_keys=True)
        if key not in self._evaluators:
            search = {"population": 16, "fitness": fitness or "margin", "granularity": "projection"}
            run = dataclasses.replace(
                self.run,
                merge=parse(MergeConfig, setting, "merge"),
                search=parse(SearchConfig, search, "search"),
            )
            made = Evaluator(dataclasses.replace(self.loaded, run=run))
            made.kind = FITNESS[fitness] if fitness else ALL
            self._evaluators[key] = made
        return self._evaluators[key]

    def gradient(self, merge: str, setting: Setting, hidden: bool = False) -> Callable[..., Any]:
        """``(weights, inputs, size, own, scale, pick) -> (fitness, gradient)``, compiled.

        ``pick`` is 1 at the kind (of ``SMOOTH`` or, with ``hidden``, ``HIDDEN`` alone) that is followed and 0
        at the others. ``merge`` is ``modules``, or ``components``: see ``merge_components``.
        """
        key = json.dumps([merge, setting, hidden], sort_keys=True)
        if key not in self._gradients:
            backbone, tasks, counted = self.loaded.backbone, len(self.tasks), HIDDEN if hidden else ALL
            merged = merge_components if merge == "components" else self.evaluator(setting).merge.merge
            kinds = [HIDDEN] if hidden else SMOOTH

            def value(weights: Any, inputs: EvalInputs, size: Any, own: Any, scale: Any, pick: Any) -> Any:
                deltas = merged(inputs.ingredients, weights, scale)
                counts = count_all(backbone, inputs, deltas, tasks, counted, remat=True)
                found = [
                    normalised(total / size, own[i], kind).mean()
                    for i, (total, kind) in enumerate(zip(sums(counts, kinds), kinds, strict=True))
                ]
                return jnp.stack(found) @ pick

            self._gradients[key] = jax.jit(jax.value_and_grad(value))
        return self._gradients[key]

    def merged(self, setting: Setting) -> Callable[..., Deltas]:
        """``(ingredients, weights, scale) -> deltas`` as full matrices, compiled."""
        key = json.dumps(setting, sort_keys=True)
        if key not in self._merged:
            merge = self.evaluator(setting).merge.merge
            self._merged[key] = jax.jit(lambda *operands: dense(merge(*operands)))
        return self._merged[key]

    def _count_deltas(self, inputs: EvalInputs, deltas: Deltas) -> Counts:
        return count_all(self.loaded.backbone, inputs, deltas, len(self.tasks), ALL)


def sums(counts: Counts, kinds: Sequence[Fitness]) -> list[Any]:
    """Sums over examples of every kind, [*member task] each."""
    if len(kinds) == 1:
        return [counts.value]
    value = jnp.asarray(counts.value)
    return [counts.log_likelihood, *(value[..., i] for i in range(value.shape[-1]))]


def merge_components(ingredients: Any, weights: Any, scale: Any) -> Deltas:
    """The sum of singular components that a straight-through mask keeps, times a coefficient a module.

    Args:
        ingredients: of the sum of ``singular_components``.
        weights: [layer, projection, task, rank + 1], 1 at the start: the logits of the mask are those of the
            components less 0.9, the coefficient is the last one times ``scale``.
        scale: the coefficient at the start.
    """
    # start 0.1 and temperature 10 are those of AdaRank's published code
    keep = straight_through(weights[..., :-1] - 0.9, 10.0) * weights[..., -1:]
    return merges.make("sum").merge(ingredients, keep.reshape(*keep.shape[:2], -1), scale)


class Data(NamedTuple):
    """A split of one draw, ready to score masks of one merge setting.

    Attributes:
        suite: the suite.
        setting: the merge setting.
        evaluator: of both, on this draw.
        inputs: of the split.
        size: examples of every task.
        reference: accuracies of the tasks' own adapters.
        kinds: the fitnesses that are counted.
        own: their values of the tasks' own adapters, [kind, task].
    """

    suite: Suite
    setting: Setting
    evaluator: Evaluator
    inputs: EvalInputs
    size: np.ndarray
    reference: np.ndarray
    kinds: Sequence[Fitness]
    own: np.ndarray

    @property
    def examples(self) -> int:
        """Of all tasks together."""
        return int(self.size.sum())

    def counts(self, keep: np.ndarray, scale: float | np.ndarray) -> Counts:
        """Of masks or weights [member, layer, task] or [member, layer, projection, task]."""
        if len(keep) == 1 and HIDDEN not in self.kinds:  # by a program that all merge settings share
            found = self.suite.count_deltas(self.inputs, self.merged(keep[0], float(np.ravel(scale)[0])))
            return Counts(*(np.asarray(x)[None] for x in found))
        scales = np.broadcast_to(np.asarray(scale, np.float32), len(keep))
        return self.evaluator.score(self.inputs, self.written_out(keep), scales)

    def merged(self, keep: np.ndarray, scale: float) -> Deltas:
        """The merge under one mask or weights, as full matrices."""
        keep = self.written_out(keep[None])[0]
        return self.suite.merged(self.setting)(self.evaluator.ingredients, keep, np.float32(scale))

    def written_out(self, keep: np.ndarray) -> np.ndarray:
        """Masks or weights for every projection, as floats."""
        keep = np.asarray(keep, np.float32)
        if keep.ndim == 3:
            keep = np.repeat(keep[:, :, None], len(self.suite.projections.projections), axis=2)
        return keep

    def fitness(self, counts: Counts, name: str) -> np.ndarray:
        """The mean over tasks of the values of a kind, relative to the experts'."""
        if name == "accuracy":
            return self.accuracy(counts)
        i = [kind.name for kind in self.kinds].index(name)
        total = jnp.asarray(sums(counts, self.kinds)[i]) / self.size
        return np.asarray(normalised(total, jnp.asarray(self.own[i]), self.kinds[i])).mean(-1)

    def accuracy(self, counts: Counts) -> np.ndarray:
        """Mean normalised accuracy."""
        return (np.asarray(counts.correct) / self.size / self.reference).mean(-1)

    def score(self, keep: np.ndarray, scale: float | np.ndarray, name: str) -> np.ndarray:
        """The fitness of masks or weights."""
        return self.fitness(self.counts(keep, scale), name)

    def gradient(
        self, weights: np.ndarray, scale: float, name: str, merge: str = "modules"
    ) -> tuple[float, np.ndarray]:
        """Fitness of weights [layer, projection, task] (of components: see ``merge_components``), and its
        gradient."""
        pick = np.asarray([kind.name == name for kind in self.kinds], np.float32)
        inputs = self.evaluator.spread(self.inputs)
        if merge == "components":
            inputs = inputs._replace(ingredients=self.suite.components)
        gradient = self.suite.gradient(merge, self.setting, HIDDEN in self.kinds)
        value, found = gradient(weights, inputs, self.size, self.own, np.float32(scale), pick)
        return float(value), np.asarray(found)


def make_data(
    suite: Suite, setting: Setting, examples: Mapping[Any, Any], split: Any, hidden: bool = False
) -> Data:
    """A split of a draw under a merge setting."""
    evaluator = suite.evaluator(setting, HIDDEN.name if hidden else None).on(examples)
    kinds = [HIDDEN] if hidden else SMOOTH
    answers = [jnp.asarray(a) for a in evaluator.expert_answers(split)]
    labels = [jnp.asarray(e.labels) for e in evaluator.examples(split)]
    own = [
        [float(kind.value(a, y, a).mean()) for a, y in zip(answers, labels, strict=True)] for kind in kinds
    ]
    return Data(
        suite, setting, evaluator, evaluator.inputs(split), evaluator.loaded.sizes(split),
        evaluator.expert_scores(split), kinds, np.asarray(own, np.float32),
    )  # fmt: skip


def dense(deltas: Deltas) -> Deltas:
    """The deltas as full matrices: models of all methods then have the same shapes."""
    return {name: Dense(delta.materialise()) for name, delta in deltas.items()}
