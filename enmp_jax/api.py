"""The public functions of ``import enmp_jax as enmp``: adapters in; merges, searches and exports out.

What a command prints on the way goes to the logger ``enmp_jax``; progress to ``on_progress(done, total,
best)``, called after every generation (or look at the selection split) with the best fitness so far.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Bool, Float

from enmp_jax.adapters import peft_export, peft_import
from enmp_jax.adapters.peft_export import PeftExport
from enmp_jax.adapters.peft_import import LoadedAdapters
from enmp_jax.adapters.recipe import Recipe
from enmp_jax.config import run_file
from enmp_jax.config.run_file import RunConfig
from enmp_jax.config.sections import RefineConfig
from enmp_jax.deltas import Deltas
from enmp_jax.errors import UserError
from enmp_jax.evaluation.loaded_run import make_merge
from enmp_jax.io.files import read_json
from enmp_jax.io.progress import Progress, Reporter
from enmp_jax.io.writing import write_text
from enmp_jax.masks import MaskSpec
from enmp_jax.runs.compare import compare_run
from enmp_jax.runs.controls import DEFAULT as ALL_CONTROLS
from enmp_jax.runs.controls import controls_run
from enmp_jax.runs.directory import finished
from enmp_jax.runs.evaluate import evaluate_run
from enmp_jax.runs.refine import refine_run
from enmp_jax.runs.search import search_run

__all__ = [
    "MaskSpec", "Result", "compare", "controls", "evaluate", "export_peft", "load_adapters", "load_run",
    "refine", "search",
]  # fmt: skip

OnProgress = Callable[[int, int, float], None]


def load_adapters(sources: Mapping[str, str | Path], *, allow_base_mismatch: bool = False) -> LoadedAdapters:
    """Read the PEFT LoRA adapters of several tasks, ready to merge (``.stack``) and to export.

    Args:
        sources: task -> directory or hub id (``name@revision``).
        allow_base_mismatch: accept adapters that name different base models.

    Raises:
        UserError: an adapter that is missing, damaged, no plain LoRA, or of another base.

    Examples:
        >>> from importlib.resources import files
        >>> import enmp_jax as enmp
        >>> demo = files("enmp_jax") / "suites/demo/adapters"
        >>> loaded = enmp.load_adapters({"digit": demo / "digit", "even": demo / "even"})
        >>> loaded.stack.tasks, loaded.stack.n_layers
        (('digit', 'even'), 6)
        >>> method = enmp.merges.ties(space="core", density=0.4)
        >>> ingredients = method.prepare(loaded.stack)
        >>> keep = enmp.MaskSpec.of(loaded.stack).keep_from_pruned([(0, "even")])
        >>> deltas = method.merge(ingredients, keep, 0.8)
    """
    return peft_import.load_adapters(sources, allow_base_mismatch=allow_base_mismatch)


def load_run(name_or_path: str | Path, **settings: Any) -> RunConfig:
    """Read and check a run file; nothing that it names is read yet.

    Args:
        name_or_path: a path, or the name of a packaged run file (``demo``, ``vision-small``, ...).
        settings: sections of the run file, laid over it key by key.

    Raises:
        UserError: no such file, an unknown key, or a value that cannot be.

    Examples:
        >>> import enmp_jax as enmp
        >>> run = enmp.load_run("demo", search={"population": 4, "generations": 2})
        >>> run.search.population, run.merge.method
        (4, 'tsv')
    """
    run = run_file.load(name_or_path, settings)
    make_merge(run)
    return run


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What a search found.

    Attributes:
        mask: False where a module is left out: [layer, task] or [layer, projection, task].
        weights: of the modules, in the same shape, where the search looked for weights (0 is left out).
        scale: merge coefficient.
        scores: as in ``scores.json``: accuracies in 0..1 by task, on the test split.
        history: as in ``history.jsonl``: one entry for each generation of each seed.
        modules: as in ``mask.json``: the modules by name, and the merge that the mask was found for.

    Examples:
        >>> import enmp_jax as enmp
        >>> few = {f"{split}_examples": 10 for split in ("search", "selection", "test")}
        >>> search = {"strategy": "cma_es", "population": 4, "generations": 2, "seeds": 1}
        >>> result = enmp.search(enmp.load_run("demo", search=search, evaluation=few))
        >>> result.mask.shape, result.weights, len(result.history)
        ((6, 4, 6), None, 2)
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     result.save(pathlib.Path(directory) / "mask.json")
    """

    mask: Bool[np.ndarray, "*module"]
    weights: Float[np.ndarray, "*module"] | None
    scale: float
    scores: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    modules: Mapping[str, Any]

    def save(self, path: str | Path) -> None:
        """Write ``mask.json``, which ``enmp merge --mask``, ``enmp evaluate --mask`` and ``evaluate`` take.

        Raises:
            UserError: it cannot be written.
        """
        write_text(Path(path), json.dumps(self.modules, indent=1) + "\n")


def search(
    run: RunConfig,
    out: str | Path | None = None,
    on_progress: OnProgress | None = None,
    *,
    resume: bool = False,
) -> Result:
    """Search for the modules to leave out, or for weights of modules, and score what was found once.

    Args:
        run: of ``load_run``.
        out: run directory to make, with report and exports (as ``enmp search`` does); None: none is kept.
        on_progress: see the module's docstring.
        resume: go on with the search in ``out``.

    Raises:
        UserError: bad input, or no ``out`` on several hosts.

    Examples:
        >>> import enmp_jax as enmp
        >>> few = {f"{split}_examples": 10 for split in ("search", "selection", "test")}
        >>> search = {"strategy": "cma_es", "population": 4, "generations": 2, "seeds": 1}
        >>> run = enmp.load_run("demo", search=search, evaluation=few)
        >>> result = enmp.search(run, on_progress=lambda done, total, best: print(f"{done} of {total}"))
        1 of 2
        2 of 2
        >>> sorted(result.scores["mean_normalised"])
        ['enmp', 'merged']
    """
    reporter = _reporter(on_progress)
    if out is not None:
        search_run(run, Path(out), reporter, resume)
        return _result(Path(out))
    if resume:
        raise UserError("there is nothing to resume without a run directory: give out")
    if jax.process_count() > 1:
        raise UserError("a search on several hosts needs a run directory that all of them see: give out")
    with tempfile.TemporaryDirectory(prefix="enmp-") as temporary:
        search_run(run, Path(temporary), reporter)
        return _result(Path(temporary))


def evaluate(
    run: RunConfig,
    split: Literal["search", "selection", "test"] = "test",
    mask: Result | str | Path | None = None,
    *,
    scale: float | None = None,
) -> dict[str, Any]:
    """Score the adapters alone, the base, the plain merge, and the merge under a mask.

    Args:
        run: of ``load_run``.
        split: whose examples.
        mask: what a search found, or the path of a ``mask.json``.
        scale: merge coefficient; default: the mask's, else the run file's, else the best on the search
            split.

    Returns:
        Accuracies in 0..1 by task: ``reference`` (each adapter alone), ``base``, ``merged`` and, with a
        mask, ``enmp``; ``mean_normalised``, relative to the reference; ``scale``.

    Raises:
        UserError: bad input.

    Examples:
        >>> import enmp_jax as enmp
        >>> run = enmp.load_run("demo", evaluation={"test_examples": 10})
        >>> scores = enmp.evaluate(run, scale=0.5)
        >>> sorted(scores["merged"])
        ['above-four', 'digit', 'even', 'inverted', 'mirrored', 'occluded']
    """
    with tempfile.TemporaryDirectory(prefix="enmp-") as temporary:
        if isinstance(mask, Result):
            saved = Path(temporary) / "mask.json"
            mask.save(saved)
            mask = saved
        path = None if mask is None else Path(mask)
        return evaluate_run(run, split, path, scale, False, _reporter(None))


def refine(
    run_dir: str | Path,
    on_progress: OnProgress | None = None,
    *,
    rank: int | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    fitness: str | None = None,
    cross_fit: bool | None = None,
) -> dict[str, Any]:
    """Train one LoRA for all tasks from the merge that a finished search found (as ``enmp refine`` does).

    Args:
        run_dir: of a finished search; gets ``refined/``, one PEFT adapter, and new scores.
        on_progress: see the module's docstring.
        rank: of the LoRA; default here and below: ``search.refine`` of the run file.
        steps: of training.
        learning_rate: of Adam.
        fitness: what it maximises; those of the experts (``expert_kl``, ...) need no labels.
        cross_fit: train a second LoRA with search and selection split exchanged, and add half of each.

    Returns:
        The scores, with those of the refined merge.

    Raises:
        UserError: no finished search there, one that was refined already, or a bad setting.

    Examples:
        >>> import tempfile
        >>> import enmp_jax as enmp
        >>> few = {f"{split}_examples": 10 for split in ("search", "selection", "test")}
        >>> search = {"strategy": "cma_es", "population": 4, "generations": 2, "seeds": 1}
        >>> run = enmp.load_run("demo", search=search, evaluation=few)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     result = enmp.search(run, out=directory)
        ...     scores = enmp.refine(directory, steps=2, rank=2)
        >>> sorted(scores["mean_normalised"])
        ['enmp', 'merged', 'refined']
    """
    config = finished(Path(run_dir))[0].search.refine or RefineConfig()
    settings = {"rank": rank, "steps": steps, "learning_rate": learning_rate, "fitness": fitness}
    settings |= {"cross_fit": cross_fit}
    given = {name: value for name, value in settings.items() if value is not None}
    return refine_run(Path(run_dir), dataclasses.replace(config, **given), _reporter(on_progress))


def compare(
    run: RunConfig,
    out: str | Path | None = None,
    *,
    methods: Sequence[str] = (),
    spaces: Sequence[str] = (),
    search: bool = False,
) -> dict[str, Any]:
    """Score every merge method in every space, each at its best (as ``enmp compare`` does).

    Args:
        run: of ``load_run``.
        out: a run directory that keeps the rows; those that it has are not made again. None: none is kept.
        methods: names; default: all.
        spaces: names; default: all.
        search: also run the run's search under every method.

    Returns:
        ``rows``, the best first: method, space, scale and first hyperparameter as the search split chose
        them, scores on the test split by task, ``mean_normalised``.

    Raises:
        UserError: an unknown method or space, rows of other settings in ``out``, or a bad run.

    Examples:
        >>> import enmp_jax as enmp
        >>> few = {f"{split}_examples": 10 for split in ("search", "selection", "test")}
        >>> run = enmp.load_run("demo", evaluation=few)
        >>> rows = enmp.compare(run, methods=["sum", "mean"], spaces=["core"])["rows"]
        >>> sorted((row["method"], row["space"]) for row in rows)
        [('mean', 'core'), ('sum', 'core')]
    """
    return compare_run(run, None if out is None else Path(out), _reporter(None), methods, spaces, search)


def controls(
    run_dir: str | Path, rows: Sequence[str] = (), *, masks: int = 20, seeds: int = 3
) -> dict[str, Any]:
    """Compare what a finished search found with its controls (as ``enmp controls`` does).

    Args:
        run_dir: of a finished search; keeps the rows, and those that it has are not made again.
        rows: kinds of controls, of those that ``enmp controls --help`` lists; default: all but sensitivity.
        masks: random masks.
        seeds: of what depends on one.

    Returns:
        ``rows``: ``mean_normalised`` on the test split, ``gain`` over the plain merge and ``found_better_by``
        with 95 % intervals and p-values corrected over rows; ``sentences`` that say the same.

    Raises:
        UserError: no finished search there, an unknown control, or rows of other settings.

    Examples:
        >>> import tempfile
        >>> import enmp_jax as enmp
        >>> few = {f"{split}_examples": 10 for split in ("search", "selection", "test")}
        >>> search = {"strategy": "cma_es", "population": 4, "generations": 2, "seeds": 1}
        >>> run = enmp.load_run("demo", search=search, evaluation=few)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     result = enmp.search(run, out=directory)
        ...     found = enmp.controls(directory, ["random", "norm"])
        >>> [row["row"] for row in found["rows"]]
        ['plain', 'found', 'random masks', 'by norm']
    """
    run = finished(Path(run_dir))[0]
    return controls_run(run, Path(run_dir), _reporter(None), rows or ALL_CONTROLS, masks, seeds)


def export_peft(
    out: str | Path,
    loaded: LoadedAdapters,
    deltas: Deltas,
    *,
    merge: Mapping[str, Any] | None = None,
    pruned: Sequence[Sequence[Any]] = (),
    rank: int | None = None,
    tolerance: float | None = peft_export.TOLERANCE,
    strict: bool = False,
) -> PeftExport:
    """Write merged deltas as one PEFT adapter, which PEFT, transformers and vLLM load.

    Args:
        out: a new or empty directory.
        loaded: the adapters that were merged.
        deltas: what ``merge`` of a method returned.
        merge: for the model card: method, space, scale and hyperparameters.
        pruned: for the model card: the modules left out, as ``MaskSpec.pruned_modules`` lists them.
        rank: largest rank; default: that of the deltas.
        tolerance: relative error that deltas of full rank may have (TIES in full space, ...); None: as
            little as ``rank`` allows.
        strict: refuse to write what misses the tolerance.

    Returns:
        Rank, relative error, and both in words.

    Raises:
        UserError: nothing to write, NaN or Inf in a delta, or the directory cannot be written.

    Examples:
        >>> import tempfile
        >>> from importlib.resources import files
        >>> import enmp_jax as enmp
        >>> demo = files("enmp_jax") / "suites/demo/adapters"
        >>> loaded = enmp.load_adapters({"digit": demo / "digit", "even": demo / "even"})
        >>> method, keep = enmp.merges.sum(), enmp.MaskSpec.of(loaded.stack).all_kept()
        >>> deltas = method.merge(method.prepare(loaded.stack), keep, 0.5)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     written = enmp.export_peft(directory, loaded, deltas, merge={"method": "sum", "scale": 0.5})
        >>> written.rank, written.error
        (8, 0.0)
    """
    recipe = Recipe(merge or {}, pruned)
    return peft_export.export_peft(out, loaded, deltas, recipe, rank, tolerance, strict=strict)


def _reporter(on_progress: OnProgress | None) -> Reporter:
    def advance(now: Progress) -> None:
        best = now.best if now.loss is None else -now.loss  # a refinement maximises, too
        if on_progress is not None and best is not None:
            on_progress(now.done, now.total, best)

    return Reporter(logging.getLogger("enmp_jax").info, advance)


def _result(directory: Path) -> Result:
    """What a run directory holds of a finished search."""
    modules = read_json(directory / "mask.json")
    tasks, projections = tuple(modules["tasks"]), tuple(modules.get("projections", ()))
    spec = MaskSpec(modules["layers"], projections, tasks, (), modules["granularity"], max_pruned=1.0)
    # as if every module existed: the file names none that does not
    spec = dataclasses.replace(spec, slots=tuple(range(math.prod(spec.shape))))
    weights = modules.get("weights")
    history = (directory / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return Result(
        mask=spec.keep_from_pruned(modules["pruned"]),
        weights=None if weights is None else spec.keep_from_weights(weights, modules["pruned"]),
        scale=modules["scale"],
        scores=read_json(directory / "scores.json"),
        history=[json.loads(line) for line in history],
        modules=modules,
    )
