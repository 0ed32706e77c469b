"""``enmp search``: find the negative modules of a run file's adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from enmp_jax.cli.output import Output, Tracked, print_result, reporting
from enmp_jax.cli.run_option import RunFile, Settings, load_run_file
from enmp_jax.config.run_file import RunConfig
from enmp_jax.config.schema import to_dict
from enmp_jax.errors import UserError
from enmp_jax.io.trackers import tracking


@dataclass(frozen=True)
class Args(Tracked):
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
    import jax

    from enmp_jax.report.terminal import print_scores
    from enmp_jax.runs.search import search_run

    config = load_run_file(
        args.run, args.set, args.skip_bad, seeds=args.seeds, generations=args.generations,
        population=args.population, seed=args.seed,
    )  # fmt: skip
    if args.dry_run:
        from enmp_jax.runs.dry_run import dry_run

        with reporting(args) as reporter:
            lines = dry_run(config, reporter)
        return print_result(args, {"lines": lines}, _print_lines)
    if args.plan:
        return _plan(args, config)
    if args.out is None:
        raise UserError("give --out DIR, the run directory to make (or --dry-run to see what would run)")
    with reporting(args) as reporter, tracking(args.tracker, args.out, to_dict(config), reporter) as tracked:
        own = tracked.reporter if tracked else reporter
        scores = search_run(config, args.out, own, args.resume, args.resume_anyway)
        if tracked:
            tracked.final(scores)
    print_result(args, {**scores, "out": str(args.out)}, print_scores)
    if not args.json and jax.process_index() == 0:
        print(f"results in {args.out}")


def _print_lines(result: Mapping[str, Any]) -> None:
    print("\n".join(result["lines"]))


def _plan(args: Output, config: RunConfig) -> None:
    from enmp_jax.evaluation.evaluator import Evaluator
    from enmp_jax.evaluation.loaded_run import load
    from enmp_jax.runs.plan import make_plan

    with reporting(args) as reporter:
        plan = make_plan(Evaluator(load(config, ("search",), reporter=reporter)))
    result = {**asdict(plan), "total": plan.total, "seconds": plan.seconds, "lines": plan.lines()}
    print_result(args, result, _print_lines)
