"""What a finished search hands over: the model that was scored, or one with its own scores beside it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from enmp_jax import merges, models
from enmp_jax.adapters.formats import ExportOptions, Merged, Written, write
from enmp_jax.adapters.lora_factors import LoraFactors, check_limits, lora_factors, low_rank_deltas
from enmp_jax.adapters.peft_import import LoadedAdapters
from enmp_jax.adapters.recipe import Recipe, plain
from enmp_jax.config.run_file import RunConfig
from enmp_jax.config.sections import RefineConfig
from enmp_jax.deltas import Deltas
from enmp_jax.errors import UserError
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.loaded_run import LoadedRun, load, load_run_adapters
from enmp_jax.evaluation.scoring import Counts
from enmp_jax.io.files import write_bytes
from enmp_jax.io.progress import Reporter
from enmp_jax.io.writing import check_unused
from enmp_jax.masks import Keep, MaskSpec
from enmp_jax.models import checkpoint
from enmp_jax.runs import mask_file
from enmp_jax.runs.directory import finished
from enmp_jax.runs.finalists import Finalist
from enmp_jax.runs.task_scores import one_model, task_scores
from enmp_jax.training.refine import Refined

FOLDERS = {
    "adapters": "adapters",
    "peft": "merged",
    "checkpoint": "model",
    "delta": "delta",
    "gguf": "gguf",
}
"""Format -> its directory in a run directory; ``refined`` is a PEFT adapter too."""
_ONE_ADAPTER = ("peft", "gguf")  # of limited rank, unlike the other formats
Score = Callable[[Deltas], Mapping[str, Any]]


class Prepared(NamedTuple):
    """One merge, ready to be written.

    Attributes:
        deltas: of the merge; None where nobody has made them yet.
        factors: of one PEFT adapter; None where none is asked for.
        exported: ``rank``, ``error`` and scores of that adapter, where it misses the tolerance.
    """

    deltas: Deltas | None
    factors: LoraFactors | None = None
    exported: Mapping[str, Any] | None = None


def prepare(loaded: LoadedAdapters, deltas: Deltas, options: ExportOptions, score: Score | None) -> Prepared:
    """Factors of one adapter, scored on the test split where they are not the merge.

    Args:
        loaded: the adapters.
        deltas: of the merge.
        options: rank and tolerance.
        score: accuracies of a model with other deltas; None: do without.

    Raises:
        UserError: NaN or Inf in a delta, or a tolerance that no rank meets.
    """
    found = lora_factors(deltas, loaded.names, options.rank, options.tolerance)
    if score is None or not found.modules or found.error <= options.tolerance or options.strict:
        return Prepared(deltas, found)
    own = score(low_rank_deltas(found.modules, loaded.names, deltas))
    return Prepared(deltas, found, {"rank": found.rank, "error": found.error, **own})


def merged_deltas(evaluator: Evaluator, best: Finalist) -> Any:
    """The deltas of a finalist."""
    return jax.jit(evaluator.merge.merge)(evaluator.ingredients, jnp.asarray(best.keep), best.scale)


def test_deltas(evaluator: Evaluator, deltas: Deltas) -> dict[str, Any]:
    """Scores of one model on the test split, as ``scores.json`` has them."""
    return test_scores(evaluator, evaluator.score_deltas(evaluator.inputs("test"), deltas))


def test_scores(evaluator: Evaluator, counts: Counts) -> dict[str, Any]:
    """Scores of one model that was counted on the test split, as ``scores.json`` has them."""
    found = task_scores(evaluator, "test", {"model": 0}, one_model(counts))
    return {
        "accuracy": found["model"],
        "loss": found["loss"]["model"],
        "mean_normalised": float(np.asarray(evaluator.scoring("test").normalised(counts))),
    }


def prepare_refined(evaluator: Evaluator, refined: Refined) -> Prepared:
    """The refined merge as one PEFT adapter; see ``prepare``."""
    score = functools.partial(test_deltas, evaluator)
    return prepare(evaluator.loaded.adapters, refined.deltas, _options(evaluator.loaded.run), score)


def prepare_search(
    evaluator: Evaluator, best: Finalist, refined: Refined | None, reporter: Reporter
) -> dict[str, Prepared]:
    """What a search exports, by directory; on several hosts all of them score together.

    What cannot be made is said and left out: the search is done and paid for.
    """
    run = evaluator.loaded.run
    jobs: dict[str, Callable[[], Prepared]] = {}
    if set(_ONE_ADAPTER) & set(run.export.formats):
        score = functools.partial(test_deltas, evaluator)
        jobs["merged"] = lambda: prepare(
            evaluator.loaded.adapters, merged_deltas(evaluator, best), _options(run), score
        )
    if refined is not None:
        jobs["refined"] = lambda: prepare_refined(evaluator, refined)
    made: dict[str, Prepared] = {}
    for folder, job in jobs.items():
        try:
            made[folder] = job()
        except UserError as error:
            reporter.say(f"{folder} not written: {error}")
    return made


def exported_scores(run: RunConfig, prepared: Mapping[str, Prepared]) -> dict[str, dict[str, Any]]:
    """Directory -> scores of the exports that miss the tolerance, as ``scores.json`` has them."""
    folders = [(FOLDERS[kind], "merged") for kind in run.export.formats if kind in _ONE_ADAPTER]
    return {
        folder: dict(prepared[name].exported or {})
        for folder, name in (*folders, ("refined", "refined"))
        if name in prepared and prepared[name].exported
    }


def write_search(
    evaluator: Evaluator,
    best: Finalist,
    scores: Mapping[str, Any],
    out: Path,
    reporter: Reporter,
    prepared: Mapping[str, Prepared],
) -> None:
    """Write what there is to take away. What an interrupted export left whole is kept."""
    loaded = evaluator.loaded
    options = dataclasses.replace(_options(loaded.run), base_model=loaded.base)
    recipe = recipe_of(loaded.run, loaded.mask_spec, best.keep, best.scale, scores, out)

    def merge(path: Path, kind: str) -> list[str]:
        one = prepared["merged"] if kind in _ONE_ADAPTER else Prepared(None)
        own = dataclasses.replace(recipe, exported=one.exported)

        def deltas() -> Deltas:
            return merged_deltas(evaluator, best) if one.deltas is None else one.deltas

        return write(path, kind, Merged(loaded.adapters, best.keep, deltas, own, one.factors), options).told

    kinds = [k for k in loaded.run.export.formats if k not in _ONE_ADAPTER or "merged" in prepared]
    jobs: dict[str, Callable[[Path], list[str]]] = {
        FOLDERS[kind]: functools.partial(merge, kind=kind) for kind in kinds
    }
    if "refined" in prepared:
        config = loaded.run.search.refine or RefineConfig()
        jobs["refined"] = lambda path: write_refined(path, loaded, best, recipe, prepared["refined"], config)
    for folder, job in jobs.items():
        if (out / folder).exists():
            continue  # written whole by the run that this one resumes
        try:
            for line in job(out / folder):
                reporter.say(f"{folder}: {line}")
        except UserError as error:
            # The search is done and paid for: say what could not be written, lose nothing else.
            reporter.say(f"{folder} not written: {error}")


def write_refined(
    path: Path, loaded: LoadedRun, best: Finalist, recipe: Recipe, one: Prepared, config: RefineConfig
) -> list[str]:
    """Write merge and trained LoRA as one PEFT adapter, their ranks added up; returns lines to print.

    Raises:
        UserError: as ``formats.write``.
    """
    deltas = one.deltas
    assert deltas is not None
    own = dataclasses.replace(recipe, refined=dataclasses.asdict(config), exported=one.exported)
    merged = Merged(loaded.adapters, best.keep, lambda: deltas, own, one.factors)
    return write(path, "peft", merged, _options(loaded.run)).told


def export_run(
    run_dir: Path,
    kind: str,
    out: Path | None,
    given: Mapping[str, Any],
    reporter: Reporter,
    score: bool = True,
) -> tuple[Written, Path]:
    """``enmp export``: any format of what a finished search found; returns what to tell, and where it is.

    Args:
        run_dir: of a finished search.
        kind: the format.
        out: a new or empty directory; None: the run directory's own place for the format.
        given: settings of ``ExportOptions`` that win over the run file's.
        reporter: progress.
        score: score an adapter that misses the tolerance (needs the run's data).

    Raises:
        UserError: no finished search, a mask of another merge, adapters or a base that are gone, or a
            directory in use.
    """
    run, scores = finished(run_dir)
    target = check_unused(run_dir / FOLDERS[kind] if out is None else out)
    base = run.path(run.base.model)
    options = dataclasses.replace(_options(run), base_model=base)
    options = dataclasses.replace(options, **{k: v for k, v in given.items() if v is not None})
    check_limits(options.rank, options.tolerance)
    adapters = load_run_adapters(run, models.build(checkpoint.read_config(checkpoint.find(base))))
    saved = mask_file.load(run_dir / "mask.json", adapters.stack)
    saved.refuse_others(run_dir / "mask.json", adapters, "put that adapter back")
    merge = saved.merge or run.merge.recipe()
    if plain(merge) != plain(run.merge.recipe()):
        raise UserError(
            f"{run_dir / 'mask.json'} was found for {_in_words(merge)}, but config.yaml there merges with "
            f"{_in_words(run.merge.recipe())}: one of them is of another run"
        )
    method, scale = merges.make(**merge), 1.0 if saved.scale is None else saved.scale

    @functools.cache
    def deltas() -> Deltas:
        return jax.jit(method.merge)(method.prepare(adapters.stack), jnp.asarray(saved.keep), scale)

    def tested(found: Deltas) -> Mapping[str, Any]:
        reporter.say("the adapter misses the tolerance: scoring it on the test split")
        return test_deltas(Evaluator(load(run, ("test",), reporter)), found)

    recipe = recipe_of(run, saved.spec, saved.keep, scale, scores, run_dir)
    one = Prepared(None)
    if kind in _ONE_ADAPTER:
        one = prepare(adapters, deltas(), options, tested if score else None)
    recipe = dataclasses.replace(recipe, exported=one.exported)
    written = write(target, kind, Merged(adapters, saved.keep, deltas, recipe, one.factors), options)
    if recipe.exported and target.parent == run_dir.resolve():
        scores["exported"] = {**(scores.get("exported") or {}), target.name: plain(recipe.exported)}
        text = json.dumps(scores, indent=1, allow_nan=False) + "\n"
        write_bytes(run_dir / "scores.json", text.encode())
    return written, target


def recipe_of(
    run: RunConfig, spec: MaskSpec, keep: Keep, scale: float, scores: Mapping[str, Any], directory: Path
) -> Recipe:
    """How a run's merge was made, with the scores that it got."""
    return Recipe(
        merge={**run.merge.recipe(), "scale": scale},
        pruned=scores["pruned"],
        weights=() if keep.dtype == bool else spec.weighted_modules(keep),
        seed=scores["seed"],
        scores=scores,
        run=directory.resolve().name,
    )


def _options(run: RunConfig) -> ExportOptions:
    return ExportOptions(run.export.rank, run.export.tolerance, dtype=run.export.dtype)


def _in_words(merge: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in merge.items() if value not in (None, False))
