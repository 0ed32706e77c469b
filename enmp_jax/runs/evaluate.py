"""``enmp evaluate``: one split, scored with every adapter alone, the base, and merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from enmp_jax.runs import mask_file
from enmp_jax.config.run_file import RunConfig
from enmp_jax.errors import UserError
from enmp_jax.runs.search import choose_scale
from enmp_jax.evaluation.problem import Problem, Which, load
from enmp_jax.io.progress import Reporter
from enmp_jax.evaluation.scoring import Scoring, by_task


def evaluate_run(
    run: RunConfig,
    split: Which,
    mask: Path | None,
    scale: float | None,
    experts: bool,
    reporter: Reporter,
) -> dict[str, Any]:
    """Score a split; JSON-ready, accuracies in 0..1, with the keys of ``scores.json`` where they apply.

    Args:
        run: the run.
        split: what to score on.
        mask: a ``mask.json``, or None.
        scale: merge coefficient; None: the mask's, the run file's, or the best on the search split.
        experts: score the adapters alone, nothing else.
        reporter: progress.

    Raises:
        UserError: bad run file or mask.
    """
    if mask is not None and not mask.exists():
        raise UserError(f"there is no mask {mask}")
    tunes = not experts and scale is None and run.merge.scale == "auto"
    splits: list[Which] = [split]
    if tunes and mask is None and split != "search":
        splits.append("search")
    problem = load(run, splits, reporter)
    saved = None if mask is None else mask_file.load(mask, problem.stack)
    reporter.say(f"scoring {sum(problem.sizes(split)):.0f} examples of {split}")
    sizes = problem.sizes(split)
    alone = np.asarray(problem.score_experts(split).correct) / sizes
    result: dict[str, Any] = {
        "split": split,
        "tasks": list(problem.tasks),
        "examples": by_task(problem.tasks, sizes),
        "reference": by_task(problem.tasks, alone),
    }
    if experts:
        return result
    scoring = problem.scoring(split)
    result["reference"] = by_task(problem.tasks, np.asarray(scoring.reference))
    result["base"] = by_task(problem.tasks, np.asarray(problem.score_base(split).correct) / sizes)
    value = scale if scale is not None else saved.scale if saved else None
    if value is None:
        if run.merge.scale == "auto" and saved:
            raise UserError(f"{mask} holds no scale and the run file says auto: give --scale")
        value = _tuned(problem) if run.merge.scale == "auto" else float(run.merge.scale)
    keep = [problem.mask_spec.all_kept()]
    if saved is not None:
        keep.append(saved.keep)
    result |= _merged(problem, split, scoring, keep, value)
    result["pruned"] = [list(m) for m in saved.spec.pruned_modules(saved.keep)] if saved else []
    return result


def _tuned(problem: Problem) -> float:
    return choose_scale(problem, problem.fixed("search"), problem.scoring("search"))[0]


def _merged(
    problem: Problem, split: Which, scoring: Scoring, keep: list[np.ndarray], scale: float
) -> dict[str, Any]:
    fixed, found = problem.fixed(split), {}
    names = ("merged", "enmp")[: len(keep)]
    normalised = {}
    for name, mask in zip(names, keep, strict=True):
        counts = problem.score(fixed, mask[None], np.asarray([scale], np.float32))
        found[name] = by_task(problem.tasks, np.asarray(scoring.accuracy(counts))[0])
        normalised[name] = float(np.asarray(scoring.normalised(counts))[0])
    return found | {"mean_normalised": normalised, "scale": scale}
