"""``enmp refine``: train one LoRA from the model that a finished search found."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from enmp_jax.cli.output import Output, print_result, reporting
from enmp_jax.config.sections import RefineConfig


@dataclass(frozen=True)
class Args(Output):
    """Train one LoRA for all tasks from the model that a search found, on its search split, stopped by its
    selection split; writes refined/ (one PEFT adapter) into the run directory and adds to its scores.

    With the experts' fitnesses it needs no labels.
    """

    run_dir: Annotated[Path, tyro.conf.Positional]
    rank: int | None = None
    """Of the LoRA; default: the run file's ``search.refine``, else 8."""
    steps: int | None = None
    learning_rate: float | None = None
    fitness: str | None = None
    """What is maximised: expert_kl, expert_probability, expert_margin, probability, margin, ..."""
    cross_fit: bool = False
    """Train a second LoRA on the selection split, judged by the search split, and add half of each: twice the
    rank and the price of a step, better with few examples; default: the run file's ``search.refine``."""
    out: Path | None = None
    """Write the adapter here instead, and leave the run as it is."""


def run(args: Args) -> None:
    """Run ``enmp refine``."""
    import jax

    from enmp_jax.devices import distributed

    distributed.initialize(distributed.find_job())
    from enmp_jax.io.lock import occupied
    from enmp_jax.report.terminal import print_scores
    from enmp_jax.report.write import write_all
    from enmp_jax.runs.directory import finished
    from enmp_jax.runs.refine import refine_run

    config = finished(args.run_dir)[0].search.refine or RefineConfig()
    names = ("rank", "steps", "learning_rate", "fitness")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    given |= {"cross_fit": True} if args.cross_fit else {}
    alone = occupied(args.run_dir) if jax.process_index() == 0 else contextlib.nullcontext()
    with reporting(args) as reporter, alone:
        scores = refine_run(args.run_dir, dataclasses.replace(config, **given), reporter, args.out)
    if jax.process_index() == 0 and args.out is None:
        write_all(args.run_dir)
    print_result(args, scores, print_scores)
