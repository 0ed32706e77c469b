"""``enmp evaluate``: one split, scored with every adapter alone, the base, and merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from enmp_jax.config.run_file import RunConfig
from enmp_jax.errors import UserError
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.loaded_run import Split, load
from enmp_jax.evaluation.scoring import by_task
from enmp_jax.io.progress import Reporter
from enmp_jax.runs import mask_file
from enmp_jax.runs.search import choose_scale
from enmp_jax.runs.task_scores import generated, metrics, task_scores


def evaluate_run(
    run: RunConfig,
    split: Split,
    mask: Path | None,
    scale: float | None,
    experts: bool,
    reporter: Reporter,
) -> dict[str, Any]:
    """Score a split; JSON-ready, scores in 0..1, with the keys of ``scores.json`` where they apply.

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
    splits: list[Split] = [split]
    if tunes and mask is None and split != "search":
        splits.append("search")
    loaded = load(run, splits, reporter)
    evaluator, tasks, sizes = Evaluator(loaded), loaded.tasks, loaded.sizes(split)
    saved = None if mask is None else mask_file.load(mask, loaded.stack)
    reporter.say(f"scoring {sum(sizes):.0f} examples of {split}")
    alone = evaluator.expert_scores(split)
    result: dict[str, Any] = {
        "split": split,
        "agreement": not loaded.labelled(split),
        "tasks": list(tasks),
        "examples": by_task(tasks, sizes),
        "metric": metrics(evaluator, split),
        "reference": by_task(tasks, alone),
        "loss": {"reference": by_task(tasks, evaluator.expert_losses(split))},
    }
    if experts:
        return result
    scoring = evaluator.scoring(split, normalises=True)
    result["reference"] = by_task(tasks, np.asarray(scoring.reference))
    value = scale if scale is not None else saved.scale if saved else None
    if value is None:
        if run.merge.scale == "auto" and saved:
            raise UserError(f"{mask} holds no scale and the run file says auto: give --scale")
        value = _tuned(evaluator) if run.merge.scale == "auto" else float(run.merge.scale)
    plain = (saved.spec if saved else loaded.mask_spec).all_kept()
    masks = {"merged": plain, "base": ~plain} | ({"enmp": saved.keep} if saved else {})
    scales = np.full(len(masks), value, np.float32)
    counts = evaluator.score(evaluator.inputs(split), np.stack(list(masks.values())), scales)
    normalised = np.asarray(scoring.normalised(counts))
    result |= task_scores(evaluator, split, {name: row for row, name in enumerate(masks)}, counts)
    result |= generated(evaluator, split, {name: (keep, value) for name, keep in masks.items()})
    mean = {name: float(x) for name, x in zip(masks, normalised, strict=True) if name != "base"}
    pruned = [list(m) for m in saved.spec.pruned_modules(saved.keep)] if saved else []
    return result | {"mean_normalised": mean, "scale": value, "pruned": pruned}


def _tuned(evaluator: Evaluator) -> float:
    evaluator.loaded.check_fitness("search.fitness", evaluator.kind, ["search"])
    return choose_scale(evaluator, evaluator.inputs("search"), evaluator.scoring("search"))[0]
