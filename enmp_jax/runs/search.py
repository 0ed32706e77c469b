"""``enmp search``: from a run file to a mask, its scores on the test split, a report and exports."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from enmp_jax.adapters.recipe import hashes
from enmp_jax.config.run_file import RunConfig
from enmp_jax.devices.distributed import all_or_none, barrier
from enmp_jax.errors import UserError, one_line
from enmp_jax.evaluation import budget
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.fitness import get as fitness_kind
from enmp_jax.evaluation.loaded_run import load
from enmp_jax.evaluation.population import EvalInputs
from enmp_jax.evaluation.scoring import Scoring, by_task
from enmp_jax.io.progress import Reporter
from enmp_jax.masks import MaskSpec
from enmp_jax.runs import answers
from enmp_jax.runs.climb import STEP_COST, climb
from enmp_jax.runs.directory import RunDirectory
from enmp_jax.runs.evolve import WarmStart, evolve, make_strategy
from enmp_jax.runs.export import exported_scores, prepare_search, write_search
from enmp_jax.runs.final_test import final_test, fitness_on
from enmp_jax.runs.finalists import Searched, finite_or_none, listed, rank, select, with_plain
from enmp_jax.runs.plan import out_of_memory
from enmp_jax.runs.provenance import fingerprints
from enmp_jax.runs.refine import refine_winner
from enmp_jax.runs.rehearsal import rehearse
from enmp_jax.search import controls

FEW_MASKS = 5
"""A search of fewer distinct masks has hardly looked."""


def search_run(
    run: RunConfig, out: Path, reporter: Reporter, resume: bool = False, anyway: bool = False
) -> dict[str, Any]:
    """Search, choose, test once, and write the run directory; returns the content of ``scores.json``.

    Args:
        run: the run.
        out: the run directory.
        reporter: progress.
        resume: go on with the run in ``out``.
        anyway: and begin anew the part of it whose settings or files have changed.

    Raises:
        UserError: bad input; nothing has been written by then.
    """
    with all_or_none(lambda: RunDirectory(out, resume, anyway, reporter.say)) as directory:
        return _search_in(directory, run, reporter)


def _search_in(directory: RunDirectory, run: RunConfig, reporter: Reporter) -> dict[str, Any]:
    reporter.say(f"loading {run.base.model} and {len(run.tasks)} adapters")
    evaluator = Evaluator(all_or_none(lambda: load(run, reporter=reporter)), reporter.say)
    try:
        return _search_with(evaluator, directory, reporter)
    except Exception as error:
        if not budget.out_of_memory(error):
            raise
        raise UserError(out_of_memory(evaluator, error)) from error


def _search_with(evaluator: Evaluator, directory: RunDirectory, reporter: Reporter) -> dict[str, Any]:
    run, out = evaluator.loaded.run, directory.path
    loaded = evaluator.loaded
    check_search(evaluator)
    rehearse(evaluator)
    all_or_none(lambda: directory.start(run, fingerprints(loaded)))

    inputs, scoring = evaluator.inputs("search"), evaluator.scoring("search")
    scale, grid = choose_scale(evaluator, inputs, scoring)
    reporter.say(f"plain merge: scale {scale:g}, fitness {grid[scale]:.4f} on the search split")
    found = search(evaluator, directory, reporter, inputs, scoring, scale)
    if line := few_masks(loaded.mask_spec, found.cost.get("distinct_masks")):
        reporter.say(line)
    candidates = with_plain(evaluator, found.finalists, scale)
    winners = select(evaluator, candidates)
    best = max(winners.values(), key=rank)
    refined = None
    if run.search.refine is not None:
        refined = refine_winner(
            evaluator, best, run.search.refine, directory.path / "checkpoints" / "refine", reporter
        )
    spec = loaded.mask_spec
    scores, given = final_test(evaluator, best, winners, scale, refined)
    scores |= found.cost | {
        "fitness": run.search.fitness,
        "scale_grid": {f"{value:g}": finite_or_none(fitness) for value, fitness in grid.items()},
        "modules": spec.n_modules,
        "splits": {split: by_task(loaded.tasks, loaded.sizes(split)) for split in loaded.examples},
    }  # fmt: skip
    plain = next(f.selection for f in candidates if f.plain and f.scale == scale)
    before = fitness_on(evaluator, best, (grid[scale], plain), inputs, scoring)
    scores["fitness_on"] = before | scores.get("fitness_on", {})
    made_of = run.merge.recipe(), hashes(loaded.adapters), loaded.adapters.spelling
    directory.write_json("mask.json", spec.to_json(best.keep, best.scale, *made_of))
    directory.write_json("seeds.json", {str(seed): listed(spec, f.keep) for seed, f in winners.items()})
    directory.write_json(answers.NAME, given)
    directory.write_json("scores.json", scores)
    exports = prepare_search(evaluator, best, refined, reporter)
    if own := exported_scores(run, exports):
        scores["exported"] = own
        directory.write_json("scores.json", scores)
    if directory.writes:
        write_search(evaluator, best, scores, out, reporter, exports)
        draw(out, reporter)
    barrier("results are written")
    return scores


def draw(out: Path, reporter: Reporter) -> None:
    """Write plots and report; what goes wrong is said and can be repeated, as the search is paid for."""
    from enmp_jax.report.write import write_all  # matplotlib is slow to import

    try:
        write_all(out)
    except (UserError, OSError, MemoryError) as error:
        reporter.say(
            f"report not written: {one_line(error)}; scores and mask are: try again with enmp report {out}"
        )
        return
    reporter.say(f"report: {out / 'report.html'}")


def check_search(evaluator: Evaluator) -> None:
    """Refuse settings of the search that cannot work, before anything is paid for.

    Raises:
        UserError: an unknown strategy, one that does not fit, a budget below one evaluation, or a fitness
            that needs labels where there are none.
    """
    search, sizes = evaluator.loaded.run.search, evaluator.loaded.sizes("search")
    kinds = {"search.fitness": evaluator.kind}
    if search.refine is not None:
        kinds["search.refine.fitness"] = fitness_kind(search.refine.fitness)
    for key, kind in kinds.items():
        evaluator.loaded.check_fitness(key, kind, ("search", "selection"))
    if search.fidelity == "racing" and "completion" in evaluator.loaded.kinds:
        raise UserError(
            "search.fidelity racing compares examples, and completions are scored by the token: take none"
        )
    if search.strategy != "gradient":
        make_strategy(evaluator, 1.0)
        generation = int(search.population * search.generations_per_dispatch * sizes.sum())
        if search.budget is not None and search.budget < generation:
            raise UserError(
                f"search.budget is {search.budget} example-evaluations, but one dispatch of masks costs "
                f"{generation}: raise it, or set evaluation.search_examples or search.population"
            )
    if search.start == "first_order" and not evaluator.kind.has_gradient:
        raise UserError(
            f"search.start first_order needs a gradient, and fitness {evaluator.kind.name} has none: take "
            "leave_one_out, or another fitness"
        )


def few_masks(spec: MaskSpec, distinct: int | None) -> str | None:
    """What to say of a search that saw the same few masks again and again; None where there is nothing to.

    Args:
        spec: the modules.
        distinct: masks that differ, the empty one among them; None for searches of weights.
    """
    if distinct is None or distinct >= FEW_MASKS:
        return None
    most = f"at most {spec.max_count} of {spec.n_modules} modules may be pruned (search.max_pruned"
    if not spec.max_count:
        return f"every mask of the search was the empty one: {most} {spec.max_pruned:g}): raise it"
    masks = f"{distinct} distinct mask{'s'[: distinct != 1]}"
    return (
        f"the search saw {masks} only: {most} {spec.max_pruned:g}); raise it, "
        "or search.x0, or take granularity projection"
    )


def search(
    evaluator: Evaluator,
    directory: RunDirectory,
    reporter: Reporter,
    inputs: EvalInputs,
    scoring: Scoring,
    scale: float,
) -> Searched:
    """The search that the run file asks for: of masks, or of weights.

    Args:
        evaluator: of the run.
        directory: started.
        reporter: progress.
        inputs: of the search split.
        scoring: of the search split.
        scale: merge coefficient.
    """
    given = evaluator, directory, reporter, inputs, scoring, scale
    if evaluator.loaded.run.search.strategy == "gradient":
        return climb(*given)
    known, start = known_effects(evaluator, inputs, scoring, scale), evaluator.loaded.run.search.start
    if known is not None:
        effects = evaluator.loaded.mask_spec.named(known.effects)
        directory.write_json(
            "effects.json", {"kind": start, "fitness": evaluator.kind.name, "effects": effects}
        )
    return evolve(*given, known)


def known_effects(
    evaluator: Evaluator, inputs: EvalInputs, scoring: Scoring, scale: float
) -> WarmStart | None:
    """What pruning each module alone does to the fitness, as far as ``search.start`` asks for it."""
    start, spec = evaluator.loaded.run.search.start, evaluator.loaded.mask_spec
    if start == "none":
        return None
    if start == "first_order":
        fitness = jax.jit(evaluator.relaxed_fitness())
        spread = evaluator.spread(inputs)
        effects = controls.first_order(lambda keep: -fitness(keep, spread, scoring, jnp.float32(scale)), spec)
        return WarmStart(effects, math.ceil(STEP_COST))

    def score(masks: np.ndarray) -> np.ndarray:
        counts = evaluator.score_from(inputs, spec.all_kept(), masks, scale)
        return evaluator.fitness_from(scoring, counts)

    layers = spec.n_layers
    # the passes of masks that differ from layer l on begin there, and one is the plain merge
    passes = 1 + sum((layers - slot // math.prod(spec.shape[1:])) / layers for slot in spec.slots)
    return WarmStart(controls.leave_one_out(score, spec)[0], math.ceil(passes))


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
    fitness = evaluator.fitness_of(inputs, scoring, keep, np.asarray(values, np.float32))
    if np.isnan(fitness).all():
        raise UserError(
            f"the plain merge has no finite fitness at scale {', '.join(f'{v:g}' for v in values)}: check "
            "merge.scale, the adapters' heads and base.dtype"
        )
    return values[int(np.nanargmax(fitness))], dict(zip(values, map(float, fitness), strict=True))
