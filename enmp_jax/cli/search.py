"""``enmp search``: find the negative modules of a run file's adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enmp_jax.cli.run_option import RunFile, Settings, load_run_file
from enmp_jax.config.run_file import RunConfig
from enmp_jax.errors import UserError


@dataclass(frozen=True)
class Args:
    """Find the negative modules of a run file's adapters; write mask, scores, report and exports."""

    run: RunFile
    """A run file, or the name of a packaged suite (demo, vision-small, ...)."""
    out: Path | None = None
    """Run directory to make; needed unless --dry-run or --plan."""
    resume: bool = False
    """Go on with the search in --out."""
    resume_anyway: bool = False
    """Go on although settings or files have changed: what depends on them begins anew, and what was there is
    set aside."""
    dry_run: bool = False
    """Load everything, compile, score one batch under one mask, say what would run; write no results."""
    set: Settings = ()
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


def run(args: Args) -> None:
    """Run ``enmp search``."""
    from enmp_jax.devices import distributed

    # before anything else asks JAX for its devices
    distributed.initialize(distributed.find_job(args.coordinator, args.processes, args.process_id))
    from enmp_jax.runs.search import search_run

    config = load_run_file(
        args.run, args.set, args.skip_bad, seeds=args.seeds, generations=args.generations,
        population=args.population, seed=args.seed,
    )  # fmt: skip
    if args.dry_run:
        from enmp_jax.io.progress import make_reporter
        from enmp_jax.runs.dry_run import dry_run

        with make_reporter() as reporter:
            for line in dry_run(config, reporter):
                reporter.say(line)  # process 0 alone
        return
    if args.plan:
        return _plan(config)
    if args.out is None:
        raise UserError("give --out DIR, the run directory to make (or --dry-run to see what would run)")
    out = args.out
    show(lambda reporter: search_run(config, out, reporter, args.resume, args.resume_anyway), out)


def show(job: Callable[..., dict[str, Any]], out: Path) -> None:
    """Run a search with progress, then print what it found."""
    import jax

    from enmp_jax.io.progress import make_reporter
    from enmp_jax.report.terminal import print_scores

    with make_reporter() as reporter:
        scores = job(reporter)
    if jax.process_index() == 0:
        print_scores(scores)
        print(f"results in {out}")


def _plan(config: RunConfig) -> None:
    from enmp_jax.evaluation.evaluator import Evaluator
    from enmp_jax.evaluation.loaded_run import load
    from enmp_jax.io.progress import make_reporter
    from enmp_jax.runs.plan import make_plan

    with make_reporter() as reporter:
        evaluator = Evaluator(load(config, ("search",), reporter=reporter))
        for line in make_plan(evaluator).lines():
            reporter.say(line)
