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

from enmp_jax.adapters.peft_export import export_adapters, export_peft
from enmp_jax.adapters.recipe import Recipe
from enmp_jax.config.run_file import RunConfig
from enmp_jax.devices.distributed import all_or_none, barrier
from enmp_jax.errors import UserError
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.loaded_run import load
from enmp_jax.evaluation.population import EvalInputs
from enmp_jax.evaluation.scoring import Scoring, by_task
from enmp_jax.io.progress import Reporter
from enmp_jax.runs.directory import RunDirectory
from enmp_jax.runs.searcher import Searcher
from enmp_jax.search.memo import Memo


@dataclass
class Finalist:
    """A mask that the selection split decides on."""

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
    directory = all_or_none(lambda: RunDirectory(out, resume))
    reporter.say(f"loading {run.base.model} and {len(run.tasks)} adapters")
    evaluator = Evaluator(all_or_none(lambda: load(run, reporter=reporter)))
    loaded = evaluator.loaded
    searcher = Searcher(evaluator, directory, reporter)
    all_or_none(lambda: directory.start(run))

    inputs, scoring = evaluator.inputs("search"), evaluator.scoring("search")
    scale, grid = choose_scale(evaluator, inputs, scoring)
    reporter.say(f"plain merge: scale {scale:g}, fitness {grid[scale]:.4f} on the search split")
    memos = {
        seed: searcher.search(inputs, scoring, scale, seed)
        for seed in range(run.search.seed, run.search.seed + run.search.seeds)
    }
    candidates = [f for seed, memo in memos.items() for f in finalists(evaluator, memo, seed, scale)]
    winners = select(evaluator, candidates)
    best = max(winners.values(), key=_rank)
    spec = loaded.mask_spec
    scores = test(evaluator, best, winners, scale) | {
        "masks_evaluated": sum(memo.evaluated for memo in memos.values()),
        "distinct_masks": sum(len(memo) for memo in memos.values()),
        "masks_run": searcher.masks_run,
        "masks_per_second": searcher.masks / searcher.seconds if searcher.masks else None,
        "scale_grid": {f"{value:g}": _number(fitness) for value, fitness in grid.items()},
        "modules": spec.n_modules,
        "splits": {split: by_task(loaded.tasks, loaded.sizes(split)) for split in loaded.examples},
    }
    directory.write_json("mask.json", spec.to_json(best.keep, best.scale))
    directory.write_json("scores.json", scores)
    if directory.writes:
        export(evaluator, best, scores, out, reporter)
        from enmp_jax.report.write import write_plots, write_report  # matplotlib is slow to import

        write_plots(out)
        write_report(out)
        reporter.say(f"report: {out / 'report.html'}")
    barrier("results are written")
    return scores


def choose_scale(
    evaluator: Evaluator, inputs: EvalInputs, scoring: Scoring
) -> tuple[float, dict[float, float]]:
    """The merge coefficient of the plain merge, and the fitness of all tried.

    The same coefficient serves the pruned model: a gain over an untuned baseline would be none.

    Raises:
        UserError: the fitness is not a number at any of them.
    """
    run = evaluator.loaded.run
    values = run.merge.scale_grid if run.merge.scale == "auto" else (float(run.merge.scale),)
    keep = np.repeat(evaluator.loaded.mask_spec.all_kept()[None], len(values), axis=0)
    counts = evaluator.score(inputs, keep, np.asarray(values, np.float32))
    fitness = np.asarray(scoring.fitness(counts, evaluator.kind, run.search.objective))
    if np.isnan(fitness).all():
        raise UserError(
            f"the plain merge has no finite fitness at scale {', '.join(f'{v:g}' for v in values)}: check "
            "merge.scale, the adapters' heads and base.dtype"
        )
    return values[int(np.nanargmax(fitness))], dict(zip(values, map(float, fitness), strict=True))


def finalists(evaluator: Evaluator, memo: Memo, seed: int, scale: float) -> list[Finalist]:
    """The best distinct masks of a search, and the plain merge: pruning must win its place."""
    found = [
        Finalist(seed, c.keep, scale if c.scale is None else c.scale, c.fitness)
        for c in memo.finalists(evaluator.loaded.run.search.finalists)
    ]
    plain = evaluator.loaded.mask_spec.all_kept()
    if not any(f.keep.all() and f.scale == scale for f in found):
        found.append(Finalist(seed, plain, scale, None))
    return found


def select(evaluator: Evaluator, candidates: list[Finalist]) -> dict[int, Finalist]:
    """Score finalists on the selection split; the best of every seed."""
    scoring = evaluator.scoring("selection")
    keep = np.stack([f.keep for f in candidates])
    scales = np.asarray([f.scale for f in candidates], np.float32)
    counts = evaluator.score(evaluator.inputs("selection"), keep, scales)
    fitness = np.asarray(scoring.fitness(counts, evaluator.kind, evaluator.loaded.run.search.objective))
    winners: dict[int, Finalist] = {}
    for candidate, value in zip(candidates, fitness, strict=True):
        candidate.selection = float(value)
        known = winners.get(candidate.seed)
        if known is None or _rank(candidate) > _rank(known):
            winners[candidate.seed] = candidate
    return winners


def _rank(finalist: Finalist) -> tuple[float, float, float]:
    """Better on the selection split; ties: fewer modules pruned, then better on the search split. NaN is last."""
    search = float("nan") if finalist.search is None else finalist.search
    kept = float(finalist.keep.sum())
    return tuple(-np.inf if np.isnan(x) else float(x) for x in (finalist.selection, kept, search))  # type: ignore[return-value]


def _number(value: float | None) -> float | None:
    """For JSON, which has no NaN."""
    return value if value is not None and np.isfinite(value) else None


def test(evaluator: Evaluator, best: Finalist, winners: Mapping[int, Finalist], scale: float) -> dict[str, Any]:
    """The one look at the test split: experts, base, plain merge and the winner of every seed."""
    loaded, scoring, spec = evaluator.loaded, evaluator.scoring("test"), evaluator.loaded.mask_spec
    plain = spec.all_kept()
    masks = [plain, ~plain, *(f.keep for f in winners.values())]  # nothing left is the base
    scales = np.asarray([scale, scale, *(f.scale for f in winners.values())], np.float32)
    counts = evaluator.score(evaluator.inputs("test"), np.stack(masks), scales)
    accuracy, normalised = np.asarray(scoring.accuracy(counts)), np.asarray(scoring.normalised(counts))
    gains = normalised[2:] - normalised[0]
    row = 2 + list(winners).index(best.seed)
    return {
        "split": "test",
        "tasks": list(loaded.tasks),
        "reference": by_task(loaded.tasks, np.asarray(scoring.reference)),
        "base": by_task(loaded.tasks, accuracy[1]),
        "merged": by_task(loaded.tasks, accuracy[0]),
        "enmp": by_task(loaded.tasks, accuracy[row]),
        "mean_normalised": {"merged": float(normalised[0]), "enmp": float(normalised[row])},
        "seeds": [
            {
                "seed": seed, "mean_normalised": float(normalised[2 + i]), "gain": float(gains[i]),
                "pruned": len(spec.pruned_modules(f.keep)), "search": _number(f.search),
                "selection": _number(f.selection),
            }
            for i, (seed, f) in enumerate(winners.items())
        ],
        "gain": {"mean": float(gains.mean()), "std": float(gains.std(ddof=1)) if len(gains) > 1 else None},
        "pruned": [list(module) for module in spec.pruned_modules(best.keep)],
        "scale": best.scale,
        "seed": best.seed,
    }  # fmt: skip


def export(
    evaluator: Evaluator, best: Finalist, scores: Mapping[str, Any], out: Path, reporter: Reporter
) -> None:
    """Write what there is to take away: the pruned adapters, and the merge of them as one adapter."""
    merge = evaluator.loaded.run.merge
    recipe = Recipe(
        merge={
            "method": merge.method, "space": merge.space, "scale": best.scale, "isotropize": merge.isotropize,
            **merge.arguments(),
        },
        pruned=scores["pruned"],
        seed=best.seed,
        scores=scores,
    )  # fmt: skip
    adapters = evaluator.loaded.adapters
    deltas = jax.jit(evaluator.merge.merge)(evaluator.ingredients, jnp.asarray(best.keep), best.scale)
    for name, write in {
        "pruned adapters": lambda: export_adapters(out / "adapters", adapters, best.keep, recipe),
        "merged adapter": lambda: export_peft(out / "merged", adapters, deltas, recipe),
    }.items():
        try:
            write()
        except UserError as error:
            # The search is done and paid for: say what could not be written, lose nothing else.
            reporter.say(f"{name} not written: {error}")
