"""``enmp report``: the plots and the page of a run directory again, or several runs on one page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from enmp_jax.cli.output import Json, print_result
from enmp_jax.errors import UserError


@dataclass(frozen=True)
class Args(Json):
    """Write plots and report.html of a run directory again, or compare several runs on one page."""

    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR...")]
    """The first of several is what the others are compared with."""
    out: Path | None = None
    """Of several runs, the page to write; default: comparison.html."""


def run(args: Args) -> None:
    """Run ``enmp report``."""
    from enmp_jax.report.write import write_all, write_comparison

    if not args.run_dirs:
        raise UserError("give the directory of a finished search, or several to compare them")
    if len(args.run_dirs) == 1:
        if args.out is not None:
            raise UserError("the report of one run goes into its directory: leave out --out")
        return _show(args, write_all(args.run_dirs[0]))
    from enmp_jax.runs.answers import to_first

    out = args.out or Path("comparison.html")
    _show(args, write_comparison(args.run_dirs, to_first(args.run_dirs), out))


def _show(args: Args, page: Path) -> None:
    print_result(args, {"page": str(page)}, lambda result: print(result["page"]))
