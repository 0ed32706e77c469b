"""``enmp controls``: is what a search found more than luck, and more than simpler ways give?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from enmp_jax.config.run_file import RunConfig
from enmp_jax.config.schema import to_dict
from enmp_jax.devices.distributed import all_or_none
from enmp_jax.errors import UserError, suggestion
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.loaded_run import Split, load
from enmp_jax.evaluation.scoring import by_task
from enmp_jax.io.checkpoints import fingerprint
from enmp_jax.io.files import read_json
from enmp_jax.io.progress import Reporter
from enmp_jax.runs import mask_file
from enmp_jax.runs.answers import rounded
from enmp_jax.runs.compare import in_directory, of_files, table_head
from enmp_jax.runs.control_bench import Bench, Scored
from enmp_jax.runs.control_rows import KINDS
from enmp_jax.runs.directory import finished
from enmp_jax.runs.finalists import Finalist
from enmp_jax.runs.rows import Row, Rows
from enmp_jax.runs.search import search_run
from enmp_jax.search.statistics import LEVEL, RESAMPLES, Sample, holm, paired_bootstrap

DEFAULT = tuple(kind for kind in KINDS if kind != "sensitivity")
"""What is made unless told otherwise: all but the many searches of ``sensitivity``."""
LEAST_MASKS, LEAST_SEEDS = 20, 2
GAINS = ("gain", "found_better_by")
"""The two differences of a row that are tested: to the plain merge, and of the found mask to it."""


def controls_run(
    run: RunConfig,
    run_dir: Path,
    reporter: Reporter,
    kinds: Sequence[str] = DEFAULT,
    masks: int = LEAST_MASKS,
    seeds: int = 3,
    generations: int | None = None,
) -> dict[str, Any]:
    """Make the controls of a search; returns the content of ``controls.json``.

    Args:
        run: the run.
        run_dir: of its search, which is run first unless it is finished there; keeps the rows, and those
            that it has are not made again.
        reporter: progress.
        kinds: keys of ``KINDS``.
        masks: random masks to draw.
        seeds: of what depends on one.
        generations: of the searches of ``sensitivity``; default: the run's.

    Raises:
        UserError: an unknown kind, too few masks or seeds, a split that a control needs and the run lacks, a
            finished row of other settings, or a bad run.
    """
    check(run, kinds, masks, seeds)
    if not (run_dir / "scores.json").exists():
        search_run(run, run_dir, reporter, resume=(run_dir / "config.yaml").exists())
    with in_directory(run_dir, reporter) as directory:
        assert directory is not None
        all_or_none(lambda: directory.start(run))
        scores = finished(run_dir)[1]
        splits: list[Split] = list(dict.fromkeys(s for kind in kinds for s in KINDS[kind].splits))
        evaluator = Evaluator(all_or_none(lambda: load(run, splits, reporter)))
        bench = make_bench(evaluator, run_dir, scores, masks, seeds, generations, reporter)
        table = Rows(run_dir / "controls.jsonl")
        files = of_files(evaluator.loaded)
        base = _settings(run) | {"mask": fingerprint(read_json(run_dir / "mask.json"))}

        def settings(splits: Sequence[Split], *keys: str) -> dict[str, Any]:
            return base | files(splits) | {key: getattr(bench, key) for key in keys}

        made = {"plain": (_plain, settings(["test"])), "found": (_found, settings(["test"]))} | {
            name: (make, settings(KINDS[kind].splits, *KINDS[kind].settings))
            for kind in kinds
            for name, make in KINDS[kind].rows(bench).items()
        }
        for name, (_, given) in made.items():
            table.check(name, given)
        for name, (make, given) in made.items():
            table.row(name, given, functools.partial(_make_row, name, make, bench))
        # what earlier calls made of the same search belongs into the table too
        rows = {
            name: row["content"]
            for name, row in table.finished.items()
            if name in made or all(row["settings"].get(key) == value for key, value in base.items())
        }
        compared = with_differences(rows, bench.test.sample)
        result = table_head(evaluator) | {
            "resamples": RESAMPLES, "level": LEVEL, "rows": compared, "sentences": sentences(compared),
        }  # fmt: skip
        directory.write_json("controls.json", result)
    return result


def check(run: RunConfig, kinds: Sequence[str], masks: int, seeds: int) -> None:
    """Refuse what cannot work, before anything is read.

    Raises:
        UserError: see ``controls_run``.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"unknown control {kind!r}: {suggestion(kind, KINDS)}")
        for split in KINDS[kind].splits:
            lacking = [task.name for task in run.tasks if getattr(task.data, split) is None]
            if lacking:
                raise UserError(
                    f"the control {kind} needs a {split} split, which the data of {', '.join(lacking)} lack: "
                    f"add `{split}:`, or choose others with --rows"
                )
    if masks < LEAST_MASKS:
        raise UserError(f"{masks} random masks are too few to compare with: give at least {LEAST_MASKS}")
    if seeds < LEAST_SEEDS:
        raise UserError(f"{seeds} seed is too few for a deviation: give at least {LEAST_SEEDS} seeds")


def make_bench(
    evaluator: Evaluator,
    run_dir: Path,
    scores: Mapping[str, Any],
    masks: int,
    seeds: int,
    generations: int | None,
    reporter: Reporter,
) -> Bench:
    """What the rows share, of a finished search.

    Raises:
        UserError: its mask does not belong to these adapters.
    """
    loaded = evaluator.loaded
    saved = mask_file.load(run_dir / "mask.json", loaded.stack)
    found = Finalist(scores["seed"], saved.keep, saved.scale or 1.0, None)
    grid = {float(k): v for k, v in (scores.get("scale_grid") or {}).items() if v is not None}
    plain = max(grid, key=grid.__getitem__) if grid else found.scale
    paid = scores.get("example_evaluations") or 0
    examples = sum(scores["splits"]["search"].values()) * loaded.run.search.seeds
    return Bench(
        evaluator, found, plain, max(loaded.mask_spec.n_modules, int(paid / examples)),
        run_dir / "controls", masks, seeds,
        generations, reporter,
    )  # fmt: skip


def _plain(bench: Bench) -> Scored:
    return Scored(bench.test.of_masks(bench.plain[None], bench.plain_scale))


def _found(bench: Bench) -> Scored:
    return bench.score(bench.found.keep[None], pruned=bench.found.pruned)


def _settings(run: RunConfig) -> dict[str, Any]:
    """The sections of the run file that rows depend on."""
    parts = {name: getattr(run, name) for name in ("base", "tasks", "merge", "search", "evaluation")}
    return {name: fingerprint(to_dict(part)) for name, part in parts.items()}


def _make_row(name: str, make: Callable[[Bench], Scored], bench: Bench) -> Row:
    scored = make(bench)
    sample = bench.test.sample
    values = sample.mean(scored.examples)
    row = {
        "row": name,
        "scores": by_task(bench.evaluator.loaded.tasks, sample.scores(scored.examples).mean(axis=0)),
        "mean_normalised": float(values.mean()),
        **scored.details,
        **_kept(scored.examples, sample),
        "values": values.tolist(),
    }
    if len(values) > 1:
        row["std"] = float(values.std(ddof=1))
    if scored.baseline is not None:
        row["baseline"] = rounded(scored.baseline)
    bench.reporter.say(f"{name}: {100 * row['mean_normalised']:.1f} %")
    return row


def _kept(examples: Float[np.ndarray, "model example"], sample: Sample) -> dict[str, Any]:
    """Scores of single examples, as a row keeps them: of answers that are right or wrong the sum over models
    is enough, likelihoods are averaged over models by their scores."""
    if any(sample.is_likelihood(i) for i in range(len(sample.weight))):
        return {"examples": [rounded(one) for one in examples]}
    return {"correct": examples.sum(axis=0).astype(int).tolist()}


def _examples(row: Row) -> Float[np.ndarray, "*model example"]:
    """What ``_kept`` kept: of every model, or their mean."""
    if "examples" in row:
        return np.asarray(row["examples"], float)
    return np.asarray(row["correct"]) / len(row["values"])


def with_differences(rows: Mapping[str, Row], sample: Sample) -> list[Row]:
    """The rows with their differences to the plain merge and to what was found, and corrected p-values.

    A row with a plain merge of its own is compared with that alone.

    Args:
        rows: by name, as ``_make_row`` makes them, ``plain`` and ``found`` among them.
        sample: the test split's examples.
    """
    examples = {name: _examples(row) for name, row in rows.items()}
    compared = []
    for name, row in rows.items():
        own = row.get("baseline")
        row = {key: value for key, value in row.items() if key not in ("correct", "examples", "baseline")}
        if name != "plain":
            plain = examples["plain"] if own is None else np.asarray(own, float)
            row["gain"] = paired_bootstrap(examples[name], plain, sample)._asdict()
        if name not in ("plain", "found") and own is None:
            row["found_better_by"] = paired_bootstrap(examples["found"], examples[name], sample)._asdict()
        if name in ("random masks", "shuffled weights"):
            row["as_good_as_found"] = int(
                np.sum(np.asarray(row["values"]) >= rows["found"]["mean_normalised"])
            )
        compared.append(row)
    for key in GAINS:
        tested = [row[key] for row in compared if key in row]
        for difference, p in zip(tested, holm([d["p"] for d in tested]), strict=True):
            difference["p_holm"] = p
    return compared


def sentences(rows: Sequence[Row]) -> list[str]:
    """What the rows say of the found mask, for people."""
    by_name = {row["row"]: row for row in rows}
    gain = by_name["found"]["gain"]
    said = [
        f"What was found is {100 * gain['difference']:+.1f} points from the plain merge "
        f"({LEVEL:.0%} interval {100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})."
    ]
    for name in ("random masks", "shuffled weights"):
        if name in by_name:
            row = by_name[name]
            said.append(f"{row['as_good_as_found']} of {len(row['values'])} {name} are as good.")
    # by the corrected tests: one of many intervals lies beside 0 by chance
    compared = [(row["row"], d) for row in rows if (d := row.get("found_better_by"))]
    level = [name for name, d in compared if d["p_holm"] >= 1 - LEVEL]
    better = [name for name, d in compared if name not in level and d["difference"] < 0]
    if better:
        said.append(f"Better than what was found (corrected p below {1 - LEVEL:.2f}): {'; '.join(better)}.")
    if level:
        said.append(f"Not to be told from it: {'; '.join(level)}.")
    return said
