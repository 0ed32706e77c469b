"""``enmp search``: from a run file to a mask, its scores on the test split, a report and exports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from enmp_jax.devices import distributed
from enmp_jax.adapters.peft_export import export_adapters, export_peft
from enmp_jax.adapters.recipe import Recipe
from enmp_jax.config.run_file import RunConfig
from enmp_jax.errors import UserError
from enmp_jax.evaluation.population import Fixed
from enmp_jax.evaluation.problem import Problem, load
from enmp_jax.io.progress import Reporter
from enmp_jax.runs.directory import RunDirectory
from enmp_jax.search.memo import Memo
from enmp_jax.runs.searcher import Searcher
from enmp_jax.evaluation.scoring import Scoring, by_task


@dataclass
class Finalist:
    """A mask that the selection split decided on."""

    seed: int
    keep: Bool[np.ndarray, "*module"]
    scale: float
    search: float | None  # fitness on the search split; None: the search never scored it
    selection: float = float("nan")


def search_run(run: RunConfig, out: Path, reporter: Reporter, resume: bool = False) -> dict[str, Any]:
    """Search, choose, test once, and write the run directory; returns the content of ``scores.json``.

    Raises:
        UserError: bad input; nothing has been written by then.
    """
    directory = distributed.together(lambda: RunDirectory(out, resume))
    reporter.say(f"loading {run.base.model} and {len(run.tasks)} adapters")
    problem = distributed.together(lambda: load(run, reporter=reporter))
    searcher = Searcher(problem, directory, reporter)
    distributed.together(lambda: directory.start(run))

    fixed, scoring = problem.fixed("search"), problem.scoring("search")
    scale, grid = choose_scale(problem, fixed, scoring)
    reporter.say(f"plain merge: scale {scale:g}, fitness {grid[scale]:.4f} on the search split")
    memos = {
        seed: searcher.search(fixed, scoring, scale, seed)
        for seed in range(run.search.seed, run.search.seed + run.search.seeds)
    }
    candidates = [f for seed, memo in memos.items() for f in finalists(problem, memo, seed, scale)]
    winners = select(problem, candidates)
    best = max(winners.values(), key=_rank)
    scores = test(problem, best, winners, scale) | {
        "masks_evaluated": sum(memo.evaluated for memo in memos.values()),
        "distinct_masks": sum(len(memo) for memo in memos.values()),
        "masks_run": searcher.masks_run,
        "masks_per_second": searcher.masks / searcher.seconds if searcher.masks else None,
        "scale_grid": {f"{value:g}": fitness for value, fitness in grid.items()},
        "modules": problem.mask_spec.n_modules,
        "splits": {which: by_task(problem.tasks, problem.sizes(which)) for which in problem.examples},
    }
    directory.write_json("mask.json", problem.mask_spec.to_json(best.keep, best.scale))
    directory.write_json("scores.json", scores)
    if directory.writes:
        export(problem, best, scores, out, reporter)
        from enmp_jax.report.write import write_plots, write_report  # matplotlib is slow to import

        write_plots(out)
        write_report(out)
        reporter.say(f"report: {out / 'report.html'}")
    distributed.barrier("results are written")
    return scores


def choose_scale(problem: Problem, fixed: Fixed, scoring: Scoring) -> tuple[float, dict[float, float]]:
    """The merge coefficient of the plain merge, and the fitness of all tried.

    The same coefficient serves the pruned model: a gain over an untuned baseline would be none.
    """
    merge = problem.run.merge
    values = merge.scale_grid if merge.scale == "auto" else (float(merge.scale),)
    keep = np.repeat(problem.mask_spec.all_kept()[None], len(values), axis=0)
    counts = problem.score(fixed, keep, np.asarray(values, np.float32))
    fitness = np.asarray(scoring.fitness(counts, problem.run.search.fitness))
    return values[int(np.argmax(fitness))], dict(zip(values, map(float, fitness), strict=True))


def finalists(problem: Problem, memo: Memo, seed: int, scale: float) -> list[Finalist]:
    """The best distinct masks of a search, and the plain merge: pruning must win its place."""
    found = [
        Finalist(seed, c.keep, scale if c.scale is None else c.scale, c.fitness)
        for c in memo.finalists(problem.run.search.finalists)
    ]
    plain = problem.mask_spec.all_kept()
    if not any(f.keep.all() and f.scale == scale for f in found):
        found.append(Finalist(seed, plain, scale, None))
    return found


def select(problem: Problem, candidates: list[Finalist]) -> dict[int, Finalist]:
    """Score finalists on the selection split; the best of every seed (ties: better on the search split)."""
    scoring = problem.scoring("selection")
    keep = np.stack([f.keep for f in candidates])
    counts = problem.score(
        problem.fixed("selection"), keep, np.asarray([f.scale for f in candidates], np.float32)
    )
    fitness = np.asarray(scoring.fitness(counts, problem.run.search.fitness))
    winners: dict[int, Finalist] = {}
    for candidate, value in zip(candidates, fitness, strict=True):
        candidate.selection = float(value)
        known = winners.get(candidate.seed)
        if known is None or _rank(candidate) > _rank(known):
            winners[candidate.seed] = candidate
    return winners


def _rank(finalist: Finalist) -> tuple[float, float]:
    return finalist.selection, -np.inf if finalist.search is None else finalist.search


def test(problem: Problem, best: Finalist, winners: Mapping[int, Finalist], scale: float) -> dict[str, Any]:
    """The one look at the test split: experts, base, plain merge and the winner of every seed."""
    scoring, fixed, spec = problem.scoring("test"), problem.fixed("test"), problem.mask_spec
    masks = [spec.all_kept(), best.keep, *(f.keep for f in winners.values())]
    scales = np.asarray([scale, best.scale, *(f.scale for f in winners.values())], np.float32)
    counts = problem.score(fixed, np.stack(masks), scales)
    accuracy, normalised = np.asarray(scoring.accuracy(counts)), np.asarray(scoring.normalised(counts))
    base = np.asarray(problem.score_base("test").correct) / problem.sizes("test")
    gains = normalised[2:] - normalised[0]
    return {
        "split": "test",
        "tasks": list(problem.tasks),
        "reference": by_task(problem.tasks, np.asarray(scoring.reference)),
        "base": by_task(problem.tasks, base),
        "merged": by_task(problem.tasks, accuracy[0]),
        "enmp": by_task(problem.tasks, accuracy[1]),
        "mean_normalised": {"merged": float(normalised[0]), "enmp": float(normalised[1])},
        "seeds": [
            {
                "seed": seed, "mean_normalised": float(normalised[2 + i]), "gain": float(gains[i]),
                "pruned": len(spec.pruned_modules(f.keep)), "search": f.search, "selection": f.selection,
            }
            for i, (seed, f) in enumerate(winners.items())
        ],
        "gain": {"mean": float(gains.mean()), "std": float(gains.std(ddof=1)) if len(gains) > 1 else None},
        "pruned": [list(module) for module in spec.pruned_modules(best.keep)],
        "scale": best.scale,
        "seed": best.seed,
    }  # fmt: skip


def export(
    problem: Problem, best: Finalist, scores: Mapping[str, Any], out: Path, reporter: Reporter
) -> None:
    """Write what there is to take away: the pruned adapters, and the merge of them as one adapter."""
    merge = problem.run.merge
    recipe = Recipe(
        merge={
            "method": merge.method, "space": merge.space, "scale": best.scale, "isotropize": merge.isotropize,
            **merge.arguments(),
        },
        pruned=scores["pruned"],
        seed=best.seed,
        scores=scores,
    )  # fmt: skip
    loaded = problem.adapters
    deltas = jax.jit(problem.merge.merge)(problem.ingredients, jnp.asarray(best.keep), best.scale)
    for name, write in {
        "pruned adapters": lambda: export_adapters(out / "adapters", loaded, best.keep, recipe),
        "merged adapter": lambda: export_peft(out / "merged", loaded, deltas, recipe),
    }.items():
        try:
            write()
        except UserError as error:
            # The search is done and paid for: say what could not be written, lose nothing else.
            reporter.say(f"{name} not written: {error}")
