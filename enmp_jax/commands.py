"""The commands around a run file: their options, and the calls they stand for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from enmp_jax import config
from enmp_jax.errors import UserError

RunFile = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN.yaml")]


@dataclass(frozen=True)
class Search:
    """Find the negative modules of a run file's adapters; write mask, scores, report and exports."""

    run: RunFile
    """A run file, or the name of a packaged suite (demo, vision-small, ...)."""
    out: Path | None = None
    """Run directory to make; needed unless --dry-run or --plan."""
    resume: bool = False
    """Go on with the search in --out."""
    dry_run: bool = False
    """Load everything, compile, score one batch under one mask, say what would run; write no results."""
    skip_bad: bool = False
    """Leave out images that do not decode, instead of stopping."""
    seeds: int | None = None
    """Number of searches, with seeds following search.seed."""
    generations: int | None = None
    population: int | None = None
    seed: int | None = None
    plan: bool = False
    """Print the mesh, bytes on a device, FLOPs of a mask and the time they take; search and write nothing."""
    coordinator: str | None = None
    """HOST:PORT of process 0, for a search on several hosts (see docs/pods.md); SLURM needs none of these."""
    processes: int | None = None
    """Number of processes of the search."""
    process_id: int | None = None
    """This process, from 0."""


@dataclass(frozen=True)
class Demo:
    """ENMP on real handwritten digits, on this machine, in a few minutes."""

    out: Path | None = None
    """Run directory; default: runs/demo, or the next free runs/demo-2, ..."""
    seeds: int = 3


@dataclass(frozen=True)
class Evaluate:
    """Score on a split: every adapter alone, the base, the plain merge, or the merge under a mask.

    On several hosts it runs as a search does, told so by the environment (see docs/pods.md).
    """

    run: RunFile
    split: Literal["search", "selection", "test"] = "test"
    mask: Path | None = None
    """A mask.json; also scores the merge under it."""
    scale: float | None = None
    """Merge coefficient; default: the mask's, else the run file's, else chosen on the search split."""
    experts: bool = False
    """Score only the adapters alone (the reference accuracies)."""
    skip_bad: bool = False
    """Leave out images that do not decode, instead of stopping."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Train:
    """Train one LoRA expert per task, and with a `pretrain` section first their base model."""

    run: RunFile
    out: Path
    """Directory for base/ and adapters/TASK/; what is there already is kept."""
    skip_bad: bool = False
    """Leave out images that do not decode, instead of stopping."""


@dataclass(frozen=True)
class Report:
    """Write plots and report.html of a run directory again."""

    run_dir: Annotated[Path, tyro.conf.Positional]


def run(args: Any) -> None:
    """Run a parsed command."""
    _RUNNERS[type(args)](args)


def _load(name: str, skip_bad: bool = False, **overrides: Any) -> config.RunConfig:
    path = Path(name)
    packaged = config.SUITES / f"{name}.yaml"
    loaded = config.load(packaged if not path.exists() and packaged.exists() else path)
    if skip_bad:
        loaded = config.skip_bad_images(loaded)
    given = {key: value for key, value in overrides.items() if value is not None}
    return config.check(dataclasses.replace(loaded, search=dataclasses.replace(loaded.search, **given)))


def _search(args: Search) -> None:
    from enmp_jax import distributed

    # before anything else asks JAX for its devices
    distributed.initialize(distributed.find_job(args.coordinator, args.processes, args.process_id))
    from enmp_jax.pipeline import search_run

    run = _load(args.run, args.skip_bad, seeds=args.seeds, generations=args.generations,
                population=args.population, seed=args.seed)  # fmt: skip
    if args.dry_run:
        from enmp_jax.dry_run import dry_run
        from enmp_jax.progress import make_reporter

        with make_reporter() as reporter:
            lines = dry_run(run, reporter)
        print("\n".join(lines))
        return
    if args.plan:
        return _plan(run)
    if args.out is None:
        raise UserError("give --out DIR, the run directory to make (or --dry-run to see what would run)")
    out = args.out
    _show(lambda reporter: search_run(run, out, reporter, args.resume), out)


def _plan(run: config.RunConfig) -> None:
    from enmp_jax.plan import make_plan
    from enmp_jax.problem import load
    from enmp_jax.progress import make_reporter

    with make_reporter() as reporter:
        problem = load(run, ("search",), reporter=reporter)
        for line in make_plan(problem).lines():
            reporter.say(line)


def _demo(args: Demo) -> None:
    out = args.out or _free(Path("runs/demo"))
    _search(Search("demo", out, seeds=args.seeds))
    print(f"\nOpen {out / 'report.html'} for the picture, and see the README for your own adapters.")


def _show(job: Callable[..., dict[str, Any]], out: Path) -> None:
    import jax

    from enmp_jax.progress import make_reporter
    from enmp_jax.report import print_scores

    with make_reporter() as reporter:
        scores = job(reporter)
    if jax.process_index() == 0:
        print_scores(scores)
        print(f"results in {out}")


def _free(path: Path) -> Path:
    candidates = [path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 1000))]
    return next(p for p in candidates if not p.exists() or not any(p.iterdir()))


def _evaluate(args: Evaluate) -> None:
    from enmp_jax import distributed

    distributed.initialize(distributed.find_job())
    import jax

    from enmp_jax.evaluate import evaluate_run
    from enmp_jax.progress import make_reporter
    from enmp_jax.report import print_evaluation

    with make_reporter() as reporter:
        run = _load(args.run, args.skip_bad)
        result = evaluate_run(run, args.split, args.mask, args.scale, args.experts, reporter)
    if jax.process_index():
        return
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print_evaluation(result)


def _train(args: Train) -> None:
    from enmp_jax.progress import make_reporter
    from enmp_jax.training.command import train_run

    with make_reporter() as reporter:
        train_run(_load(args.run, args.skip_bad), args.out, reporter.say)


def _report(args: Report) -> None:
    from enmp_jax.report import write_plots, write_report

    write_plots(args.run_dir)
    print(write_report(args.run_dir))


_RUNNERS: dict[type, Callable[[Any], None]] = {
    Search: _search,
    Demo: _demo,
    Evaluate: _evaluate,
    Train: _train,
    Report: _report,
}
