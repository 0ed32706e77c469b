"""``enmp compare``: every merge method in every space at its best, in one table.

What is tuned, scale and first hyperparameter, is tuned on the search split; the test split is scored once
for each row, with what was chosen. All scales of a method run in one compiled call; hyperparameters are
part of the compiled program, so that each of their few values is a call of its own.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from enmp_jax import merges
from enmp_jax.config.run_file import RunConfig
from enmp_jax.config.schema import to_dict
from enmp_jax.config.sections import MergeConfig
from enmp_jax.devices.distributed import all_or_none
from enmp_jax.errors import UserError, suggestion
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.loaded_run import LoadedRun, Split, load
from enmp_jax.evaluation.population import EvalInputs
from enmp_jax.evaluation.scoring import by_task
from enmp_jax.io.checkpoints import fingerprint
from enmp_jax.io.progress import Reporter
from enmp_jax.runs.directory import RunDirectory
from enmp_jax.runs.finalists import Finalist, finite_or_none, rank
from enmp_jax.runs.provenance import fingerprints
from enmp_jax.runs.rows import Row, Rows
from enmp_jax.runs.search import check_search
from enmp_jax.runs.subsearch import search_and_select
from enmp_jax.runs.task_scores import metrics
from enmp_jax.runs.tuning import NoMerge, candidates, tune, with_ingredients


def compare_run(
    run: RunConfig,
    out: Path | None,
    reporter: Reporter,
    methods: Sequence[str] = (),
    spaces: Sequence[str] = (),
    search: bool = False,
) -> dict[str, Any]:
    """Compare merge methods on the adapters of a run; returns the content of ``compare.json``.

    Args:
        run: the run; its merge section gives the grid of scales, seed and task weights to all methods, and
            its other hyperparameters to its own.
        out: a run directory, or a new one; it keeps the rows, and those that it has are not made again. None:
            nothing is kept.
        reporter: progress.
        methods: names; default: all, of those that need statistics the run's own.
        spaces: names; default: all.
        search: also run the run file's search under every method.

    Raises:
        UserError: an unknown method or space, a row that was made with other settings, a bad run, or a method
            asked for by name that cannot merge these adapters; others are left out, and the result says so.
    """
    pairs = method_space_pairs(methods, spaces, run.merge)
    if out is None and jax.process_count() > 1:
        raise UserError("several hosts need a run directory that all of them see: give --out")
    with in_directory(out, reporter) as directory:
        splits: tuple[Split, ...] = ("search", "selection", "test") if search else ("search", "test")
        evaluator = Evaluator(all_or_none(lambda: load(run, splits, reporter)))
        evaluator.loaded.check_fitness("search.fitness", evaluator.kind, ["search"])
        if search:
            check_search(evaluator)
        rows = Rows(None if out is None else out / "compare.jsonl")
        files = of_files(evaluator.loaded)(splits)
        settings = {pair: _settings(run, *pair, search) | files for pair in pairs}
        for (method, space), given in settings.items():
            rows.check(f"{method} {space}", given)
        if directory is not None:
            all_or_none(lambda: directory.start(run))
        inputs: dict[Split, EvalInputs] = {split: evaluator.inputs(split) for split in ("search", "test")}
        found: list[Row] = []
        left_out: dict[str, str] = {}
        for (method, space), given in settings.items():
            folder = None if out is None else out / "searches" / f"{method}-{space}"
            among = candidates(run, method, space)
            make = functools.partial(_make_row, evaluator, inputs, among, search, folder, reporter)
            try:
                found.append(rows.row(f"{method} {space}", given, make))
            except NoMerge as error:
                if methods:
                    raise
                left_out[f"{method}, {space}"] = str(error)
                reporter.say(f"{method} in {space} space is left out: {error}")
        if not found:
            raise UserError(
                f"no method can merge these adapters: {'; '.join(dict.fromkeys(left_out.values()))}"
            )
        result = table_head(evaluator) | {
            "fitness": run.search.fitness,
            "rows": sorted(found, key=lambda row: -best_of(row)),
            "left_out": left_out,
        }
        if directory is not None:
            directory.write_json("compare.json", result)
    return result


def in_directory(
    out: Path | None, reporter: Reporter
) -> contextlib.AbstractContextManager[RunDirectory | None]:
    """A run directory that a table goes into, locked and not yet started; what is there is gone on with.

    Raises:
        UserError: a directory that is not empty and no run directory, or that another process works in.
    """
    if out is None:
        return contextlib.nullcontext()
    resume = (out / "config.yaml").exists()
    return all_or_none(lambda: RunDirectory(out, resume, say=reporter.say))


def of_files(loaded: LoadedRun) -> Callable[[Sequence[Split]], dict[str, str]]:
    """From the splits that a row looks at to a hash of all files that it depends on, as a setting of the row.

    The code is left out: rows outlive changes that do not change them.
    """
    made_of = fingerprints(loaded)

    def of(splits: Sequence[Split]) -> dict[str, str]:
        others = tuple(f"the {split} data" for split in loaded.examples if split not in splits)
        kept = {name: x for name, x in made_of.items() if not name.startswith(("the code", *others))}
        return {"files": fingerprint(kept)}

    return of


def table_head(evaluator: Evaluator) -> dict[str, Any]:
    """What the results of all rows of a table share, as in ``scores.json``."""
    loaded = evaluator.loaded
    return {
        "split": "test",
        "agreement": not loaded.labelled("test"),
        "tasks": list(loaded.tasks),
        "metric": metrics(evaluator, "test"),
        "reference": by_task(loaded.tasks, np.asarray(evaluator.scoring("test").reference)),
        "splits": {split: by_task(loaded.tasks, loaded.sizes(split)) for split in loaded.examples},
    }


def method_space_pairs(
    methods: Sequence[str], spaces: Sequence[str], own: MergeConfig | None = None
) -> list[tuple[str, str]]:
    """The methods in the spaces that they make sense in; default: all of both.

    Args:
        methods: names.
        spaces: names.
        own: the run's merge, which has statistics where its method needs them.

    Raises:
        UserError: an unknown name, or nothing left.
    """
    measured = [own.method.replace("-", "_")] if own and own.statistics else []
    comparable = list(dict.fromkeys([*merges.METHODS, *measured]))
    for names, known, what in ((methods, comparable, "method"), (spaces, merges.SPACES, "space")):
        for name in names:
            if name.replace("-", "_") not in known:
                raise UserError(f"unknown merge {what} {name!r}: {suggestion(name, known)}")
    chosen = [name.replace("-", "_") for name in methods] or comparable
    pairs = [(m, s) for m in chosen for s in (spaces or merges.SPACES) if (m, s) not in merges.REFUSED]
    if not pairs:
        raise UserError(f"{', '.join(methods)} in {', '.join(spaces)} space: nothing to compare")
    return list(dict.fromkeys(pairs))


def _make_row(
    evaluator: Evaluator,
    inputs: Mapping[Split, EvalInputs],
    among: Sequence[MergeConfig],
    search: bool,
    folder: Path | None,
    reporter: Reporter,
) -> Row:
    start, loaded = time.perf_counter(), evaluator.loaded
    tuned = tune(evaluator, inputs["search"], among)
    merge, spec = tuned.evaluator.loaded.run.merge, loaded.mask_spec
    finalists, note = [Finalist(0, spec.all_kept(), tuned.scale, None)], None
    if search:
        try:
            winners = search_and_select(tuned.evaluator, folder, reporter, tuned.inputs, tuned.scale)
            finalists.append(max(winners.values(), key=rank))
        except UserError as error:  # such as a method without a gradient under a gradient search
            note = str(error)
    scoring = evaluator.scoring("test")
    counts = tuned.evaluator.score(
        with_ingredients(tuned.evaluator, inputs["test"]),
        np.stack([f.keep for f in finalists]),
        np.asarray([f.scale for f in finalists], np.float32),
    )
    scores, normalised = np.asarray(scoring.scores(counts)), np.asarray(scoring.normalised(counts))
    row: Row = {
        "method": merge.method, "space": merge.space, "isotropize": merge.isotropize,
        "hyperparameters": dict(merge.hyperparameters), "scale": tuned.scale,
        "search": finite_or_none(tuned.fitness),
        "merged": by_task(loaded.tasks, scores[0]),
        "mean_normalised": {"merged": float(normalised[0])},
    }  # fmt: skip
    if note is not None:
        row["note"] = note
    if len(finalists) > 1:
        found = finalists[1]
        row["enmp"] = by_task(loaded.tasks, scores[1])
        row["mean_normalised"]["enmp"] = float(normalised[1])
        row["pruned"] = [list(module) for module in spec.pruned_modules(found.keep != 0)]
        row["enmp_scale"] = found.scale
        if found.keep.dtype != bool:
            row["weighted"] = len(spec.weighted_modules(found.keep))
    row["seconds"] = round(time.perf_counter() - start, 1)
    reporter.say(_line(row))
    return row


def _settings(run: RunConfig, method: str, space: str, search: bool) -> dict[str, Any]:
    """All that a row depends on, by the section of the run file that says it."""
    parts = {
        "base": run.base, "tasks": run.tasks, "evaluation": run.evaluation,
        "merge": candidates(run, method, space),
        "search": run.search if search else (run.search.fitness, run.search.objective, run.search.importance),
    }  # fmt: skip
    return {name: fingerprint(to_dict(part)) for name, part in parts.items()} | {"--search": search}


def best_of(row: Mapping[str, Any]) -> float:
    """The larger of a row's mean normalised accuracies: what it is sorted by."""
    return max(row["mean_normalised"].values())


def _line(row: Mapping[str, Any]) -> str:
    mean = row["mean_normalised"]
    found = f", {100 * mean['enmp']:.1f} % with what the search found" if "enmp" in mean else ""
    return (
        f"{row['method']} in {row['space']} space: scale {row['scale']:g}, "
        f"{100 * mean['merged']:.1f} % on test{found} ({row['seconds']:.0f} s)"
    )
