"""The gradient searches of a run: weights of modules that the selection split stops."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float

from enmp_jax.config.sections import SearchConfig
from enmp_jax.devices.distributed import put, told_to_end
from enmp_jax.errors import Stopped, UserError
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.population import EvalInputs
from enmp_jax.evaluation.scoring import Scoring
from enmp_jax.io import signals
from enmp_jax.io.checkpoints import Checkpoints
from enmp_jax.io.progress import Progress, Reporter
from enmp_jax.runs.directory import RunDirectory
from enmp_jax.runs.finalists import Finalist, Searched, finite_or_none
from enmp_jax.search import gradient

STEP_COST = 3.5
"""What a step of the gradient costs in forward passes: 3.4 measured (benchmarks/results/search.md)."""


def climb(
    evaluator: Evaluator,
    directory: RunDirectory,
    reporter: Reporter,
    inputs: EvalInputs,
    scoring: Scoring,
    scale: float,
) -> Searched:
    """Search weights of modules, seed after seed; resumes from the newest checkpoints.

    Args:
        evaluator: of the run.
        directory: where history and checkpoints go.
        reporter: progress.
        inputs: of the search split, for masks.
        scoring: of the search split.
        scale: merge coefficient.

    Returns:
        The weights at the best looks of every seed, or with ``harden: prune`` masks made of them.

    Raises:
        UserError: a fitness or merge method without a useful derivative, or a budget below one step.
    """
    search, spec = evaluator.loaded.run.search, evaluator.loaded.mask_spec
    if not evaluator.kind.has_gradient:
        raise UserError(
            f"search.fitness {evaluator.kind.name} has no useful gradient: take margin or probability, or "
            "another strategy than gradient"
        )
    examples = {split: int(evaluator.loaded.sizes(split).sum()) for split in ("search", "selection")}
    cost = Cost.of(examples, search.cross_fit)
    dispatch = cost.of_steps(search.check_every, 1)
    if search.budget is not None and search.budget < dispatch:
        raise UserError(
            f"search.budget is {search.budget} example-evaluations, but {search.check_every} steps and a "
            f"look at the selection split cost {dispatch}: raise it, or set evaluation.search_examples"
        )
    settings = gradient.Settings(
        search.generations, search.learning_rate, search.max_weight, search.penalty,
        check_every=search.check_every, patience=5 if search.patience is None else search.patience,
    )  # fmt: skip
    ascent = gradient.make_ascent(evaluator.relaxed_fitness(), settings)
    whole = NamedSharding(evaluator.mesh, PartitionSpec())
    present = put(spec.present(), whole)
    other = evaluator.inputs("selection"), evaluator.scoring("selection")
    halves = [((inputs, scoring), other), (other, (inputs, scoring))]
    folds = [
        _fold(evaluator, followed, judge, scale, whole) for followed, judge in halves[: 1 + search.cross_fit]
    ]
    finalists, spent = [], 0
    for seed in range(search.seed, search.seed + search.seeds):
        keys = gradient.fold_keys(jax.random.key(seed), len(folds))
        states = [ascent.init(put(key, whole), present) for key in keys]
        path = directory.path / "checkpoints" / f"seed-{seed}"
        with Checkpoints(path, directory.fingerprint, say=reporter.say) as checkpoints, signals.saving():
            record = _Record(evaluator, directory, reporter, checkpoints, seed, cost)
            states, looks = record.restore(states)
            looks = gradient.run(ascent, states, present, folds, looks, record.on_look, record.may_go_on)
        if len(looks) > 1 and (looks[1].weights == looks[0].weights).all():
            merge = evaluator.loaded.run.merge
            raise UserError(
                f"the fitness does not change with the weights of {merge.method} in {merge.space} space (its "
                "derivative is zero): take the strategy greedy"
            )
        best = gradient.best(looks)
        spent += record.spent(looks)
        if search.harden == "prune":
            masks, scored = harden(evaluator, inputs, scoring, scale, best.weights, seed)
            finalists += masks
            spent += scored * examples["search"]
        else:
            finalists.append(Finalist(seed, best.weights, scale, None))
    return Searched(finalists, {"example_evaluations": spent})


def step_cost(search: SearchConfig) -> float:
    """What a step costs in forward passes of the search split; the selection split, where ``cross_fit``
    follows it too, is taken to be as large."""
    return STEP_COST * (1 + search.cross_fit)


class Cost(NamedTuple):
    """What a search pays for, in example-evaluations.

    Attributes:
        step: examples that a step of the gradient follows.
        look: examples that a look judges by.
    """

    step: int
    look: int

    @classmethod
    def of(cls, examples: Mapping[str, int], cross_fit: bool) -> Cost:
        """Of a run: examples of its ``search`` and ``selection`` splits."""
        both = sum(examples.values())
        return cls(both, both) if cross_fit else cls(examples["search"], examples["selection"])

    def of_steps(self, steps: int, looks: int) -> int:
        """The price of steps and looks."""
        return math.ceil(STEP_COST * steps * self.step) + looks * self.look


def harden(
    evaluator: Evaluator,
    inputs: EvalInputs,
    scoring: Scoring,
    scale: float,
    weights: Float[np.ndarray, "*module"],
    seed: int,
) -> tuple[list[Finalist], int]:
    """Masks made of weights: the k smallest pruned for every k, then the best with single modules changed.

    Returns:
        The best masks on the search split, and how many were scored.
    """
    search, spec = evaluator.loaded.run.search, evaluator.loaded.mask_spec
    slots = np.asarray(spec.slots)
    order = slots[np.argsort(weights.reshape(-1)[slots], kind="stable")]

    def score(masks: np.ndarray) -> np.ndarray:
        fitness = evaluator.fitness_of(inputs, scoring, masks, scale)
        return np.where(np.isnan(fitness), -np.inf, fitness)

    masks = np.ones((spec.max_count + 1, math.prod(spec.shape)), bool)
    for k in range(1, len(masks)):
        masks[k, order[:k]] = False
    masks = masks.reshape(-1, *spec.shape)
    fitness = score(masks)
    best = masks[int(np.argmax(fitness))]
    # modules whose place is least certain: next to the border between pruned and kept
    border = spec.n_pruned(best)
    near = order[max(0, border - search.population) : border + search.population]
    changed = np.repeat(best.reshape(1, -1), len(near), axis=0)
    changed[np.arange(len(near)), near] ^= True
    changed = changed[(~changed).sum(axis=1) <= spec.max_count].reshape(-1, *spec.shape)
    masks = np.concatenate([masks, changed])
    fitness = np.concatenate([fitness, score(changed)]) if len(changed) else fitness
    chosen = np.argsort(-fitness, kind="stable")[: search.finalists]
    return [Finalist(seed, masks[i], scale, float(fitness[i])) for i in chosen], len(masks)


def _fold(
    evaluator: Evaluator,
    followed: tuple[EvalInputs, Scoring],
    judge: tuple[EvalInputs, Scoring],
    scale: float,
    whole: NamedSharding,
) -> gradient.Fold:
    """A search that follows the fitness on one split and is judged by that on another."""

    def value(weights: Float[np.ndarray, "*module"]) -> float:
        return float(evaluator.fitness_of(*judge, weights[None], scale)[0])

    inputs, scoring = followed
    return gradient.Fold((evaluator.spread(inputs), *put((scoring, np.float32(scale)), whole)), value)


class _Record:
    """What is kept of one seed's search on disk: looks, history, checkpoints."""

    def __init__(
        self,
        evaluator: Evaluator,
        directory: RunDirectory,
        reporter: Reporter,
        checkpoints: Checkpoints,
        seed: int,
        cost: Cost,
    ):
        self.search, self.spec = evaluator.loaded.run.search, evaluator.loaded.mask_spec
        self.directory, self.reporter, self.checkpoints = directory, reporter, checkpoints
        self.seed, self.cost = seed, cost
        most = 1 + math.ceil(self.search.generations / self.search.check_every)
        self.weights = np.ones((most, *self.spec.shape), np.float32)
        self.rows = np.zeros((most, 3), np.float64)  # step, fitness, value
        self.looks: list[gradient.Look] = []

    def restore(self, states: list[gradient.State]) -> tuple[list[gradient.State], list[gradient.Look]]:
        found = self.checkpoints.latest({"states": states, "weights": self.weights, "rows": self.rows})
        done = found.step if found else 0
        self.directory.keep_history(done, self.seed)
        if found is None:
            return states, []
        self.weights, self.rows = (np.array(found.tree[name]) for name in ("weights", "rows"))
        self.looks = [
            gradient.Look(int(step), self.weights[i], float(fitness), float(value))
            for i, (step, fitness, value) in enumerate(self.rows[:done])
        ]
        self.reporter.say(f"seed {self.seed}: goes on after step {self.looks[-1].step}")
        return found.tree["states"], self.looks

    def on_look(self, states: Sequence[gradient.State], looks: list[gradient.Look]) -> None:
        self.looks, done, look = looks, len(looks), looks[-1]
        self.weights[done - 1] = look.weights
        self.rows[done - 1] = look.step, look.fitness, look.value
        best = gradient.best(looks).value
        self.directory.append_history({
            "seed": self.seed, "generation": done - 1, "step": look.step, "masks_evaluated": done,
            "example_evaluations": self.spent(looks), "best": finite_or_none(best),
            "selection": finite_or_none(look.value),
            "mean": finite_or_none(look.fitness), "fitness": [finite_or_none(look.fitness)],
            "pruned": [int((look.weights[self.spec.present()] == 0).sum())],
        })  # fmt: skip
        spent = self.spent(looks)
        self.reporter.advance(
            Progress(
                look.step, self.search.generations, best, "step", mean=look.fitness, examples=spent,
                spent=spent, budget=self.search.budget, seed=self.seed,
            )
        )  # fmt: skip
        told = told_to_end(done)
        if done % self.search.checkpoint_every == 0 or look.step >= self.search.generations or told:
            self.directory.flush_history()
            tree = {"states": list(states), "weights": self.weights, "rows": self.rows}
            self.checkpoints.save(done, tree, {}, best)
        if told:
            raise Stopped(told)

    def spent(self, looks: list[gradient.Look]) -> int:
        """Example-evaluations so far."""
        return self.cost.of_steps(looks[-1].step, len(looks))

    def may_go_on(self) -> bool:
        """Whether the budget bears another dispatch."""
        if self.search.budget is None:
            return True
        more = self.cost.of_steps(self.search.check_every, 1)
        return self.spent(self.looks) + more <= self.search.budget
