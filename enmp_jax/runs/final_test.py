"""What a search found, on data that it never saw, and beside the data that it did see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.example_scores import ExampleScores
from enmp_jax.evaluation.population import EvalInputs
from enmp_jax.evaluation.scoring import Scoring, by_task
from enmp_jax.runs import answers
from enmp_jax.runs.finalists import Finalist, finite_or_none
from enmp_jax.runs.refine import test_refined, with_refined
from enmp_jax.runs.task_scores import generated, task_scores
from enmp_jax.training.refine import Refined


def final_test(
    evaluator: Evaluator,
    best: Finalist,
    winners: Mapping[int, Finalist],
    scale: float,
    refined: Refined | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The one look at the test split: experts, base, plain merge, the seeds' winners, the refined one.

    Returns:
        The scores, and the content of ``test-answers.json``.
    """
    loaded, scoring, spec = evaluator.loaded, evaluator.scoring("test"), evaluator.loaded.mask_spec
    plain = spec.all_kept()
    masks = np.stack([plain, ~plain, *(f.keep for f in winners.values())])  # nothing left is the base
    scales = np.asarray([scale, scale, *(f.scale for f in winners.values())], np.float32)
    single = ExampleScores(evaluator, "test")
    counted = single.count_masks(masks, scales)
    counts, examples = single.sums(counted), single.scores(counted)
    normalised = np.asarray(scoring.normalised(counts))
    gains = normalised[2:] - normalised[0]
    row = 2 + list(winners).index(best.seed)
    found = {
        "split": "test",
        "agreement": not loaded.labelled("test"),
        "tasks": list(loaded.tasks),
        "reference": by_task(loaded.tasks, np.asarray(scoring.reference)),
        **task_scores(evaluator, "test", {"base": 1, "merged": 0, "enmp": row}, counts),
        "mean_normalised": {"merged": float(normalised[0]), "enmp": float(normalised[row])},
        "seeds": [
            {
                "seed": seed, "mean_normalised": float(normalised[2 + i]), "gain": float(gains[i]),
                "pruned": f.pruned, "search": finite_or_none(f.search),
                "selection": finite_or_none(f.selection),
            }
            for i, (seed, f) in enumerate(winners.items())
        ],
        "gain": {"mean": float(gains.mean()), "std": float(gains.std(ddof=1)) if len(gains) > 1 else None},
        "pruned": [list(module) for module in spec.pruned_modules(best.keep != 0)],
        "scale": best.scale,
        "seed": best.seed,
    }  # fmt: skip
    if loaded.labelled("test") or not evaluator.kind.needs_labels:
        fitness = [float(value) for value in evaluator.fitness_from(scoring, counts)]
        found["fitness_on"] = {
            "test": {"merged": finite_or_none(fitness[0]), "enmp": finite_or_none(fitness[row])}
        }
    compared = {"base": (~plain, scale), "merged": (plain, scale), "enmp": (best.keep, best.scale)}
    found |= generated(evaluator, "test", compared)
    if best.keep.dtype != bool:
        found["weighted"] = len(spec.weighted_modules(best.keep))
    models = {"merged": examples[0], "enmp": examples[row]}
    if refined is not None:
        scores, models["refined"] = test_refined(evaluator, single, refined)
        found = with_refined(found, scores)
    given = answers.content(single, found["reference"], models)
    return found | {"interval": answers.intervals(given)}, given


def fitness_on(
    evaluator: Evaluator, best: Finalist, plain: tuple[float, float], inputs: EvalInputs, scoring: Scoring
) -> dict[str, dict[str, float | None]]:
    """Fitness of the plain merge and of what was found where the search looked and where it was chosen.

    Args:
        evaluator: of the run.
        best: what was found.
        plain: fitness of the plain merge on the search and on the selection split.
        inputs: of the search split.
        scoring: of the search split.
    """
    found = best.search
    if found is None:  # the plain merge, or weights, which a gradient search scores only on its way there
        found = plain[0]
        if not best.plain:
            found = float(evaluator.fitness_of(inputs, scoring, best.keep[None], best.scale)[0])
    rows = {"search": (plain[0], found), "selection": (plain[1], best.selection)}
    return {
        split: {"merged": finite_or_none(before), "enmp": finite_or_none(after)}
        for split, (before, after) in rows.items()
    }
