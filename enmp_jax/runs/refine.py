"""The last rung of a run: a LoRA for all tasks trained from the model that the search found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from enmp_jax.config.sections import RefineConfig
from enmp_jax.devices.distributed import barrier
from enmp_jax.errors import UserError
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.example_scores import ExampleScores, PerExample
from enmp_jax.evaluation.loaded_run import load
from enmp_jax.io import signals
from enmp_jax.io.checkpoints import Checkpoints, fingerprint
from enmp_jax.io.files import read_json, write_bytes
from enmp_jax.io.progress import Progress, Reporter
from enmp_jax.io.writing import check_unused
from enmp_jax.runs import answers, mask_file
from enmp_jax.runs.directory import finished
from enmp_jax.runs.export import merged_deltas, prepare_refined, recipe_of, test_scores, write_refined
from enmp_jax.runs.finalists import Finalist
from enmp_jax.training.refine import Refined, refine


def refine_winner(
    evaluator: Evaluator, best: Finalist, config: RefineConfig, checkpoints: Path, reporter: Reporter
) -> Refined:
    """Train from what a search found, on its search split, stopped by its selection split (cross-fitted: on
    both, each the judge of the other).

    Args:
        evaluator: of the run.
        best: where the training starts.
        config: see ``RefineConfig``.
        checkpoints: a directory for them.
        reporter: progress.

    Raises:
        UserError: a fitness without a gradient.
    """
    loaded = evaluator.loaded
    search = dataclasses.replace(loaded.run.search, fitness=config.fitness)
    own = evaluator.under(dataclasses.replace(loaded.run, search=search))
    start = merged_deltas(evaluator, best)
    settings = {"refine": dataclasses.asdict(config), "merge": loaded.run.merge.recipe(), "scale": best.scale}
    made_of = fingerprint(settings, np.asarray(best.keep))

    def advance(done: int, loss: float) -> None:
        reporter.advance(Progress(done, config.steps, unit="step", phase="refine", loss=loss))

    with Checkpoints(checkpoints, made_of, say=reporter.say) as saved, signals.saving():
        refined = refine(own, start, config, best.seed, advance, saved)
    judges = "the splits that each half did not follow" if config.cross_fit else "the selection split"
    reporter.say(
        f"refined: {refined.step} of {config.steps} steps, {config.fitness} {refined.fitness[0]:.4f} -> "
        f"{max(refined.fitness):.4f} on {judges}"
    )
    return refined


def test_refined(
    evaluator: Evaluator, single: ExampleScores, refined: Refined
) -> tuple[dict[str, Any], PerExample]:
    """Scores of a refined merge on the test split and the step that it is from; its scores of examples."""
    counted = single.count_deltas(refined.deltas)
    found = test_scores(evaluator, single.sums(counted)) | {"steps": refined.step}
    return found, single.scores(counted)


def with_refined(scores: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Scores of a search with those of its refinement."""
    mean = scores["mean_normalised"] | {"refined": found["mean_normalised"]}
    loss = scores.get("loss", {}) | {"refined": found["loss"]}
    added = {
        "refined": found["accuracy"],
        "refine_steps": found["steps"],
        "mean_normalised": mean,
        "loss": loss,
    }
    return scores | added


def refine_run(
    run_dir: Path, config: RefineConfig, reporter: Reporter, out: Path | None = None
) -> dict[str, Any]:
    """``enmp refine``: refine what a finished search found; adds to its ``scores.json`` and ``refined/``.

    Args:
        run_dir: of a finished search.
        config: see ``RefineConfig``.
        reporter: progress.
        out: write the adapter here instead, and leave the run as it is.

    Raises:
        UserError: no finished search there, or one that was refined already.
    """
    run, scores = finished(run_dir)
    if out is None and (run_dir / "refined").exists():
        raise UserError(f"{run_dir / 'refined'} is already there: remove it, or give --out, to refine again")
    target = check_unused(run_dir / "refined" if out is None else out)
    loaded = load(run, reporter=reporter)
    evaluator = Evaluator(loaded)
    saved = mask_file.load(run_dir / "mask.json", loaded.stack)
    best = Finalist(scores["seed"], saved.keep, saved.scale or 1.0, None)
    refined = refine_winner(evaluator, best, config, run_dir / "checkpoints" / "refine", reporter)
    single = ExampleScores(evaluator, "test")
    found, examples = test_refined(evaluator, single, refined)
    scores, given = with_refined(scores, found), None
    if (run_dir / answers.NAME).exists():
        before = read_json(run_dir / answers.NAME)
        given = answers.content(single, scores["reference"], {"refined": examples}, before)
        scores["interval"] = answers.intervals(given)
    one = prepare_refined(evaluator, refined)
    if one.exported:
        scores["exported"] = {**(scores.get("exported") or {}), "refined": dict(one.exported)}
    if jax.process_index() == 0:
        recipe = recipe_of(run, saved.spec, best.keep, best.scale, scores, run_dir)
        for line in write_refined(target, loaded, best, recipe, one, config):
            reporter.say(line)
        changed = {"scores.json": scores, answers.NAME: given} if out is None else {}
        for name, data in changed.items():
            if data is not None:
                text = json.dumps(data, indent=1, allow_nan=False) + "\n"
                write_bytes(run_dir / name, text.encode())
    barrier("refined")
    return scores
