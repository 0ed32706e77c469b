"""What the columns of benchmarks/evidence.py do: from a suite, a method, a seed and a column to one row."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from evidence_columns import METHODS, NO_METHOD
from evidence_suite import SUM, Data, Setting, Suite, dense, make_data, merge_components

from enmp_jax.config.sections import RefineConfig
from enmp_jax.errors import UserError
from enmp_jax.evaluation.fitness import FITNESS
from enmp_jax.evaluation.scoring import Counts
from enmp_jax.runs.climb import STEP_COST
from enmp_jax.search import controls, gradient, strategies
from enmp_jax.search.memo import Memo
from enmp_jax.training.refine import refine

Rows = Mapping[str, Any]
"""The rows of a group that are there already, by column."""
Incumbents = list[tuple[float, np.ndarray]]
"""Example-evaluations, and the mask or weights that a search would have returned after them."""
FINALISTS = 8
"""Masks that the selection split decides between."""


class Skipped(Exception):
    """Why a column has no value for this method."""


class Found(NamedTuple):
    """What a column found, before the one look at the test split.

    Attributes:
        keep: masks or weights whose mean test score is the row's (random: many), or None with ``deltas``.
        scale: merge coefficient.
        passes: forward passes of the search split, and of the selection split.
        incumbents: (example-evaluations, mask or weights) while the search went on.
        extra: further keys of the row.
        deltas: of the model, where it is no mask or weights.
    """

    keep: np.ndarray | None
    scale: float
    passes: tuple[float, float]
    incumbents: Incumbents = []  # noqa: RUF012
    extra: Mapping[str, Any] = {}
    deltas: Any = None


class Group:
    """All columns of one suite, method, seed and number of examples."""

    def __init__(self, suite: Suite, method: str, seed: int, examples: int):
        self.suite, self.method, self.seed = suite, method, seed
        self.examples = suite.draw(seed, examples)
        self._data: dict[str, Data] = {}
        self._plain: dict[str, Counts] = {}
        self._tuned: dict[str, tuple[Setting, float]] = {}

    def data(self, split: str, setting: Setting, hidden: bool = False) -> Data:
        """A split under a merge setting, with all fitnesses or with ``expert_hidden``."""
        key = json.dumps([split, setting, hidden])
        if key not in self._data:
            self._data[key] = make_data(self.suite, setting, self.examples, split, hidden)
        return self._data[key]

    def tuned(self, fitness: str) -> tuple[Setting, float]:
        """Setting and scale of the plain merge that are best on the search split.

        By ``margin``, for columns without labels by ``expert_margin``: one baseline for each.
        """
        judge = "margin" if FITNESS[fitness].needs_labels else "expert_margin"
        if judge not in self._tuned:
            found: list[tuple[float, Setting, float]] = []
            for setting in METHODS[self.method]:
                grid, counts = self.plain(setting)
                values = self.data("search", setting).fitness(counts, judge)
                best = int(np.nanargmax(values))
                found.append((float(values[best]), setting, grid[best]))
            _, *self._tuned[judge] = max(found, key=lambda f: f[0])  # type: ignore[assignment]
        return self._tuned[judge]  # type: ignore[return-value]

    def plain(self, setting: Setting) -> tuple[Sequence[float], Counts]:
        """Scales of the grid, and the plain merge's counts on the search split; made once for both judges."""
        data, key = self.data("search", setting), json.dumps(setting)
        grid = data.evaluator.loaded.run.merge.scale_grid
        if key not in self._plain:
            plain = self.suite.layers.all_kept()
            self._plain[key] = data.counts(np.repeat(plain[None], len(grid), axis=0), np.asarray(grid))
        return grid, self._plain[key]

    def start(self, column: Setting) -> tuple[Data, Data, float]:
        """Search split, selection split and scale that a column works with."""
        if column["kind"] in NO_METHOD:
            setting, scale = SUM, 1.0
        else:
            setting, scale = self.tuned(column["fitness"])
        search, selection = (
            self.data(split, setting, FITNESS[column["fitness"]].hidden > 0)
            for split in ("search", "selection")
        )
        return search, selection, column.get("scale", scale)


def first_order(data: Data, scale: float, fitness: str) -> np.ndarray:
    """What pruning each module [layer, task] does to the fitness, to first order; NaN where there is none."""
    spec = data.suite.layers
    _, found = data.gradient(np.ones(data.suite.projections.shape, np.float32), scale, fitness)
    return np.where(spec.present(), found.sum(axis=1, dtype=float), np.nan)


def plain(group: Group, column: Setting, rows: Rows) -> Found:
    """The plain merge, tuned."""
    return Found(group.suite.layers.all_kept()[None], group.start(column)[2], (0, 0))


def random(group: Group, column: Setting, rows: Rows) -> Found:
    """Masks that prune as many modules as another column's, at the same scale."""
    count = len(rows[column["like"]]["pruned"])
    keep = controls.random_masks(jax.random.key(group.seed), group.suite.layers, count, column["masks"])
    return Found(keep, group.start(column)[2], (0, 0))


def one_shot(group: Group, column: Setting, rows: Rows) -> Found:
    """The modules of largest first-order effect."""
    data, _, scale = group.start(column)
    effects, spec = first_order(data, scale, column["fitness"]), group.suite.layers
    return Found(controls.prune_largest(effects, spec, spec.max_count)[None], scale, (STEP_COST, 0))


def greedy(group: Group, column: Setting, rows: Rows) -> Found:
    """Greedy removal in the order of leave-one-out scores."""
    data, _, scale = group.start(column)
    spec, score = group.suite.layers, lambda keep: data.score(keep, scale, column["fitness"])
    effects, _ = controls.leave_one_out(score, spec)
    spent = 1 + spec.n_modules
    found = controls.greedy_removal(score, spec, max(column["passes"] - spent, 1), column["width"], effects)
    return Found(found.keep[None], scale, (spent + found.evaluations, 0))


def masks(group: Group, column: Setting, rows: Rows) -> Found:
    """A search of masks; the selection split chooses among its finalists and the plain merge."""
    data, selection, scale = group.start(column)
    fitness, spent, effects = column["fitness"], 0.0, None
    spec = dataclasses.replace(group.suite.layers, **{k: column[k] for k in ("max_pruned",) if k in column})
    if column.get("start") == "first_order":
        effects, spent = first_order(data, scale, fitness).reshape(-1)[list(spec.slots)], STEP_COST
    elif column.get("start") == "leave_one_out":
        alone, _ = controls.leave_one_out(lambda keep: data.score(keep, scale, fitness), spec)
        effects, spent = alone.reshape(-1)[list(spec.slots)], 1 + spec.n_modules
    sigma0, population = column.get("sigma0", 0.5), column["population"]
    space = strategies.Space(spec.genome_size, population, sigma0, spec.threshold, 0, spec.max_count, effects)
    strategy = strategies.build(
        column["strategy"], spec.genome_size, population, sigma0,
        threshold=spec.threshold, max_count=spec.max_count, effects=effects,
    )  # fmt: skip
    ask, tell, decode = jax.jit(strategy.ask), jax.jit(strategy.tell), jax.jit(jax.vmap(spec.decode))
    # no mask is paid for twice; a search that proposes nothing new must end all the same
    generations = column.get("generations") or 2 * column["passes"] // population
    most = column["passes"] - FINALISTS - 1 if "passes" in column else math.inf
    keys = jax.random.split(jax.random.key(group.seed), 1 + 2 * generations)
    mean = spec.start(strategies.start_mean(space, column.get("x0", "auto")))
    state, memo, incumbents = strategy.init(keys[0], jnp.asarray(mean)), Memo(), []
    known: dict[bytes, float] = {}
    for generation in range(generations):
        genomes, state = ask(keys[1 + 2 * generation], state)
        keep = np.asarray(decode(genomes))
        new = list({mask.tobytes(): mask for mask in keep if mask.tobytes() not in known}.values())
        if spent + len(new) > most:
            break
        if new:
            scored = data.score(np.stack(new), scale, fitness)
            known |= {mask.tobytes(): float(f) for mask, f in zip(new, scored, strict=True)}
            spent += len(new)
        values = np.asarray([known[mask.tobytes()] for mask in keep], np.float32)
        memo.add(keep, values)
        state = tell(keys[2 + 2 * generation], genomes, jnp.asarray(values), state)
        incumbents.append((spent * data.examples, memo.finalists(1)[0].keep))
    best = [c.keep for c in memo.finalists(FINALISTS)]
    if not any(mask.all() for mask in best):
        best.append(spec.all_kept())
    values = selection.score(np.stack(best), scale, fitness)
    # ties: fewer modules pruned
    order = sorted(range(len(best)), key=lambda i: (-values[i], (~best[i]).sum()))
    extra = {"distinct_masks": len(known), "fitness": memo.best, "selection": float(values[order[0]])}
    return Found(best[order[0]][None], scale, (spent, len(best)), incumbents, extra)


def weights(group: Group, column: Setting, rows: Rows) -> Found:
    """Gradient ascent on weights of modules."""
    data, selection, scale = group.start(column)
    fitness, present = column["fitness"], group.suite.projections.present()

    def look(judge: Data, w: np.ndarray) -> float:
        return float(judge.score(w[None], scale, fitness)[0])

    best, found = climb(group, column, (data, selection), present, "modules", scale, look)
    return found._replace(keep=best[None])


def components(group: Group, column: Setting, rows: Rows) -> Found:
    """Gradient ascent on a straight-through mask of singular components and coefficients of modules."""
    data, selection, scale = group.start(column)
    modules, ingredients = group.suite.projections.present(), group.suite.components
    rank = max(pair.a.shape[2] for pair in group.suite.loaded.stack.pairs.values())
    present = np.repeat(modules[..., None], rank + 1, axis=-1)
    merged = jax.jit(lambda w: dense(merge_components(ingredients, w, scale)))

    def look(judge: Data, w: np.ndarray) -> float:
        counts = group.suite.count_deltas(judge.inputs, merged(w))
        return float(judge.fitness(counts, column["fitness"]))

    best, found = climb(group, column, (data, selection), present, "components", scale, look)
    kept = float((best[..., :-1] > 0.9)[modules].mean())
    return found._replace(
        deltas=merged(best), scale=math.nan, extra={**found.extra, "kept": kept}, incumbents=[]
    )


def climb(
    group: Group, column: Setting, data: tuple[Data, Data], present: np.ndarray, merge: str, scale: float,
    look: Callable[[Data, np.ndarray], float],
) -> tuple[np.ndarray, Found]:  # fmt: skip
    """Gradient ascent stopped by the selection split or the budget: the best weights, and what it cost.

    With ``cross_fit`` a second one follows the selection split, stopped by the search split.
    """
    folds = [data, data[::-1]][: 1 + column.get("cross_fit", False)]
    settings = gradient.Settings(
        column["passes"], column["learning_rate"], check_every=column.get("check_every", 2)
    )
    incumbents: Incumbents = []
    looks: list[gradient.Look] = []

    def cost(steps: int, looks: int) -> float:
        passes = paid(steps, looks, len(folds) > 1)
        return sum(n * split.examples for n, split in zip(passes, data, strict=True))

    def on_look(_: Any, seen: list[gradient.Look]) -> None:
        looks[:] = seen
        if len(seen) == 2 and (seen[0].weights == seen[1].weights).all():
            raise Skipped("the fitness does not change with the weights")
        incumbents.append((cost(seen[-1].step, len(seen)), gradient.best(seen).weights))

    def may_go_on() -> bool:
        most = column["passes"] * data[0].examples
        return cost(looks[-1].step + settings.check_every, len(looks) + 1) <= most

    ascent = stepwise(lambda w, split: split.gradient(w, scale, column["fitness"], merge), settings)
    keys = gradient.fold_keys(jax.random.key(group.seed), len(folds))
    states = [ascent.init(key, present) for key in keys]
    made = [gradient.Fold((split,), functools.partial(look, judge)) for split, judge in folds]
    gradient.run(ascent, states, present, made, [], on_look, may_go_on)
    best = gradient.best(looks)
    extra = {
        "steps": looks[-1].step, "best_step": best.step, "selection": best.value,
        "fitness": max((x.fitness for x in looks[1:]), default=math.nan),
    }  # fmt: skip
    passes = paid(looks[-1].step, len(looks), len(folds) > 1)
    return best.weights, Found(None, scale, passes, incumbents, extra)


def paid(steps: int, looks: int, cross_fit: bool) -> tuple[float, float]:
    """Forward passes of the search split and of the selection split; cross-fitted, both do both."""
    cost = STEP_COST * steps
    return (cost + looks, cost + looks) if cross_fit else (cost, float(looks))


def stepwise(value_and_gradient: Callable[..., tuple[float, np.ndarray]], settings: Any) -> Any:
    """The search of ``gradient.make_ascent`` on a gradient that is compiled already: one step a call."""
    adam = optax.adam(settings.learning_rate)

    @jax.jit
    def step(state: gradient.State, found: jax.Array, present: jax.Array) -> gradient.State:
        found = jnp.where(present & jnp.isfinite(found), found, 0.0)
        updates, optimizer = adam.update(-found, state.optimizer)
        moved = jnp.clip(state.weights + jnp.asarray(updates), 0.0, settings.highest)
        return gradient.State(jnp.where(present, moved, 1.0), optimizer, state.step + 1)

    def advance(state: gradient.State, present: np.ndarray, split: Data) -> tuple[gradient.State, float]:
        fitness = math.nan
        for _ in range(min(settings.check_every, settings.steps - int(state.step))):
            fitness, found = value_and_gradient(np.asarray(state.weights), split)
            state = step(state, jnp.asarray(found), jnp.asarray(present))
        return state, fitness

    init = gradient.make_ascent(lambda weights: weights.sum(), settings).init
    return gradient.Ascent(init, advance, settings)  # type: ignore[arg-type]


def refined(group: Group, column: Setting, rows: Rows) -> Found:
    """One LoRA trained from what another column found, or (``joint``) from the base."""
    config = RefineConfig(
        steps=column.get("steps", 80),  # the default when the first rows were made
        fitness=column["fitness"],
        cross_fit=column.get("cross_fit", False),
    )
    start, before = {}, (0.0, 0.0)
    if column["kind"] == "refined":
        row = rows[column["from"]]
        if "skipped" in row:
            row = rows[column["from"].replace("continuous", "binary").replace("cross-fit", "binary")]
        before, data = tuple(row["passes"]), group.data("search", row["merge"])
        start = data.merged(np.asarray(row["keep"]), row["scale"])
    trainer = group.suite.evaluator(SUM, column["fitness"]).on(group.examples)
    found = refine(trainer, start, config, group.seed)
    looks = len(found.fitness)
    passes = paid(config.check_every * (looks - 1), looks, config.cross_fit)
    passes = passes[0] + before[0], passes[1] + before[1]
    extra = {"steps": found.step, "selection": max(found.fitness)}
    return Found(None, math.nan, passes, extra=extra, deltas=dense(found.deltas))


KINDS: dict[str, Callable[..., Found]] = {
    "plain": plain, "random": random, "one-shot": one_shot, "greedy": greedy, "masks": masks,
    "weights": weights, "components": components, "refined": refined, "joint": refined,
}  # fmt: skip


def measure(group: Group, column: Setting, rows: Mapping[str, Any]) -> dict[str, Any]:
    """One row: what the column finds, scored on the search split, and the one look at the test split.

    Args:
        group: the suite, method, seed and number of examples.
        column: settings of the column.
        rows: those of the same group that are there already, by column.
    """
    begin = time.perf_counter()
    needs = [name for name in (column.get("like"), column.get("from")) if name]
    missing = [name for name in needs if name not in rows]
    if missing:
        raise UserError(f"the column needs the row {missing[0]!r} of the same group: name that column too")
    try:
        found = KINDS[column["kind"]](group, column, rows)
    except Skipped as reason:
        return {"skipped": str(reason)}
    setting = SUM if column["kind"] in NO_METHOD else group.tuned(column["fitness"])[0]
    search, selection, test = (group.data(split, setting) for split in ("search", "selection", "test"))
    cost = found.passes[0] * search.examples + found.passes[1] * selection.examples
    row: dict[str, Any] = {
        "merge": setting, "scale": None if math.isnan(found.scale) else found.scale,
        "passes": list(found.passes), "example_evaluations": math.ceil(cost), **found.extra,
    }  # fmt: skip
    if found.keep is None:
        for name, data in (("search", search), ("test", test)):
            row[name] = float(data.accuracy(group.suite.count_deltas(data.inputs, found.deltas)))
        return row | {"seconds": time.perf_counter() - begin}
    # tested along the way only where a figure asks for it: many test splits cost more than a search
    n, curve = len(found.keep), _thinned(found.incumbents) if column.get("curve") else []
    row["search"] = float(search.score(found.keep, found.scale, "accuracy").mean())
    every = np.concatenate([found.keep, *(keep[None] for _, keep in curve)])
    on_test = test.score(every, found.scale, "accuracy")  # the only look
    row["test"] = float(on_test[:n].mean())
    if n > 1:
        row["masks"] = on_test[:n].tolist()
    else:
        row["keep"] = found.keep[0].tolist()
        row["pruned"] = np.argwhere(np.asarray(found.keep[0]) == 0).tolist()
    if curve:
        row["curve"] = [[cost, float(x)] for (cost, _), x in zip(curve, on_test[n:], strict=True)]
    return row | {"seconds": time.perf_counter() - begin}


def _thinned(incumbents: Incumbents, factor: float = 1.5) -> Incumbents:
    """The incumbents at costs that grow by a factor, the last one among them."""
    kept: Incumbents = []
    for cost, keep in incumbents[::-1]:
        if not kept or cost * factor <= kept[-1][0]:
            kept.append((cost, keep))
    return kept[::-1]
