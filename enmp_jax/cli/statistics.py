"""``enmp statistics``: measure what regmean and fisher need to know of the tasks' data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from enmp_jax.cli.output import Output, print_result, reporting
from enmp_jax.cli.run_option import RunFile, Settings, load_run_file


@dataclass(frozen=True)
class Args(Output):
    """Measure statistics of every task's data under its own adapter, for merge methods that weigh by them.

    Then ``merge: {method: regmean, statistics: FILE}`` in a run file, or ``enmp merge --method regmean
    --statistics FILE``.
    """

    run: RunFile
    out: Path
    """File to make (.safetensors): one matrix a task and module, as large as the square of a module's inputs
    (gram) or as its weight (fisher)."""
    kind: Literal["gram", "fisher"]
    """gram: second moments of the modules' inputs, for regmean; fisher: squared gradients, for fisher."""
    split: Literal["search", "selection", "test"] = "search"
    set: Settings = ()
    skip_bad: bool = False
    """Leave out images that do not decode, instead of stopping."""


def run(args: Args) -> None:
    """Run ``enmp statistics``."""
    from enmp_jax.runs.statistics import write_run_statistics

    config = load_run_file(args.run, args.set, args.skip_bad)
    with reporting(args) as reporter:
        examples = write_run_statistics(config, args.out, args.kind, args.split, reporter)
    result = {"out": str(args.out), "kind": args.kind, "examples": examples}
    print_result(args, result, lambda result: print(f"wrote {result['out']}"))
