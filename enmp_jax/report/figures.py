"""From the files of a run to its charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from enmp_jax.errors import UserError
from enmp_jax.report.charts import Chart, Curve, Dots, Heat, Lines, Mark, Role
from enmp_jax.report.comparison import Result, row_name
from enmp_jax.report.data import Generation, RunData
from enmp_jax.report.limits import CLOUD
from enmp_jax.report.tables import mean_measure, measure

COLUMNS: tuple[tuple[str, Role, str], ...] = (
    ("base", "base", "base model"),
    ("merged", "merged", "merged"),
    ("enmp", "found", "merged + ENMP"),
    ("refined", "refined", "refined"),
    ("reference", "expert", "own adapter alone"),
)
"""Key in ``scores.json``, role, name."""


def figures(data: RunData) -> dict[str, Chart]:
    """The charts that every run has, by name."""
    kind = "weights" if data.has_weights else "mask"
    return {"tasks": tasks(data), kind: modules(data), "convergence": convergence(data)}


def tasks(data: RunData) -> Dots:
    """Every task under each model, and the mean over tasks."""
    scores = data.scores
    present = [column for column in COLUMNS if column[0] in scores]
    rows = [(str(task), marks({key: scores[key][task] for key, *_ in present})) for task in data.tasks]
    mean = {key: float(np.mean([scores[key][task] for task in scores[key]])) for key, *_ in present}
    split = scores.get("split", "test")
    return Dots(
        f"{measure(scores).capitalize()} of each task on the {split} split: the base model, the plain merge, "
        "the merge that the search chose, and the task's own adapter, not merged.",
        f"{measure(scores)}, %",
        (*rows, ("mean", marks(mean))),
        {role: name for key, role, name in COLUMNS if key in scores},
    )


def marks(values: Mapping[str, float]) -> tuple[Mark, ...]:
    """Shares of models by their keys in ``scores.json``, as marks in per cent."""
    return tuple(Mark(role, 100 * values[key]) for key, role, _ in COLUMNS if key in values)


def modules(data: RunData, finer: bool = True) -> Heat:
    """The mask, or the weights of modules.

    Args:
        data: of the run.
        finer: give projections rows of their own, where they are modules.
    """
    weights = data.weights_of(data.mask)  # [layer, projection, task]
    names = data.projections if finer else []
    if names:
        values = weights.transpose(2, 1, 0).reshape(-1, len(weights))
        rows = tuple((task, short_name(name)) for task in data.mask["tasks"] for name in names)
        pruned, of = (values == 0).astype(float), 1
    else:
        values, of = weights.mean(1).T, weights.shape[1]
        rows = tuple((task, "") for task in data.mask["tasks"])
        pruned = (weights == 0).sum(1).T.astype(float)
    cell = "(layer, task, projection)" if names else "(layer, task)"
    caption = (
        f"The weight of each module in the merge: a cell for each {cell}, layers from left to right."
        if data.has_weights
        else f"Which modules are left out of the merge: a cell for each {cell}, layers from left to right."
    )
    if of > 1:
        caption += " A cell stands for all projections of its layer: the number says how many are left out."
    return Heat(caption, rows, values, pruned, of, data.has_weights)


def short_name(projection: str) -> str:
    """The last part of a projection's template."""
    return projection.rsplit(".", 1)[-1]


def progress(data: RunData) -> tuple[str, str]:
    """What all lines of the history count: the field of ``Generation`` and how to call it."""
    masks = ("masks_evaluated", "masks evaluated")
    if not data.history:
        return masks
    steps = ("step", "steps")
    # a search counts steps or not: a history of both kinds is of two searches
    if len({generation.step is None for generation in data.history}) > 1:
        raise UserError("history.jsonl mixes searches that count different things")
    for name, label in (("example_evaluations", "example-evaluations"), steps, masks):
        if all(getattr(generation, name) is not None for generation in data.history):
            return name, label
    raise UserError("history.jsonl mixes searches that count different things")


def convergence(data: RunData) -> Lines:
    """Fitness against what was paid for it: members, their mean, the best so far, the selection split."""
    seeds, (count, x_label) = data.by_seed(), progress(data)
    gradient = bool(data.history) and data.history[0].step is not None
    several = len(seeds) > 1
    kept = max(1, -(-sum(len(g.fitness) for g in data.history) // CLOUD))
    chosen = {seed.get("seed"): seed.get("selection") for seed in data.scores.get("seeds") or []}
    clouds, means, bests, looks = [], [], [], []
    for seed, history in seeds.items():
        x = np.array([getattr(g, count) for g in history], float)
        if not gradient:
            members = [g.fitness for g in history]
            at = np.repeat(x, [len(m) for m in members])
            clouds.append((at[::kept], np.concatenate(members)[::kept]))
        means.append((x, _means(history)))
        bests.append((x, np.array([g.best for g in history])))
        looks.append((x, np.array([g.selection for g in history])))
        if not np.isfinite(looks[-1][1]).any() and chosen.get(seed) is not None:
            looks[-1] = (x[-1:], np.array([chosen[seed]], float))
    look = "selection split" if gradient else "chosen, on the selection split"
    names = (
        ("at each step (search split)", "best so far (selection split)")
        if gradient
        else ("mean", "best so far")
    )
    curves = [
        *_curves("random", "cloud", "a mask", clouds),
        *_curves("merged", "thin" if several else "line", names[0], means),
        *_curves("found", "thin" if several else "line", names[1], bests),
        *_curves("expert", "cloud" if gradient else "squares", look, looks),
    ]
    if data.plain_fitness is not None and data.history:
        plain = np.array([data.plain_fitness])
        curves.append(Curve("merged", "rule", "plain merge (search split)", bests[0][0][:1], plain))
    return Lines(
        f"Fitness of the search against what it paid{', each of several seeds' if several else ''}: 100 % is "
        "as good as the tasks' own adapters. What rises on the search split need not rise on another.",
        x_label + (" (per seed)" if several else ""),
        f"{data.fitness_label}, % of the experts",
        tuple(curves),
    )


def _curves(
    role: Role, shape: Any, name: str, points: Sequence[tuple[np.ndarray, np.ndarray]]
) -> list[Curve]:
    """Curves of several seeds, named once."""
    shown = [(x, y) for x, y in points if np.isfinite(y).any()]
    return [Curve(role, shape, "" if i else name, x, y) for i, (x, y) in enumerate(shown)]


def _means(history: Sequence[Generation]) -> np.ndarray:
    rows = [g.fitness[np.isfinite(g.fitness)] for g in history]
    return np.array([row.mean() if len(row) else math.nan for row in rows])


def comparison(result: Result) -> Dots:
    """The mean of every method in every space, and of what the searches found."""
    rows = tuple((row_name(row), marks(row["mean_normalised"])) for row in result["rows"])
    found: dict[Role, str] = {"found": "merged + ENMP"} if any(len(marks) > 1 for _, marks in rows) else {}
    return Dots(
        f"{mean_measure(result).capitalize()} on the test split of every merge method in every space, with "
        "scale and first hyperparameter chosen on the search split.",
        f"{mean_measure(result)}, %",
        rows,
        {"merged": "merged", **found},
    )


def controls(result: Result) -> Dots:
    """Every row's difference to its plain merge, with the interval over examples."""
    rows = [row for row in result["rows"] if row.get("gain") is not None]
    return Dots(
        f"What other ways of choosing modules gain over the plain merge on the test split, in points of "
        f"{mean_measure(result)}, with the {result.get('level', 0.95):.0%} interval over examples. Left of "
        "zero: worse than the plain merge.",
        "gain, points",
        tuple(
            (row["row"], (_gain("found" if row["row"] == "found" else "random", row["gain"]),))
            for row in rows
        ),
        {"found": "what the search found", "random": "a control"},
        zero=0.0,
    )


def _gain(role: Role, gain: Mapping[str, float]) -> Mark:
    return Mark(role, *(100 * gain[key] for key in ("difference", "low", "high")))
