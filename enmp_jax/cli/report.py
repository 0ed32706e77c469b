"""``enmp report``: the plots and the page of a run directory again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Args:
    """Write plots and report.html of a run directory again."""

    run_dir: Annotated[Path, tyro.conf.Positional]


def run(args: Args) -> None:
    """Run ``enmp report``."""
    from enmp_jax.report.write import write_plots, write_report

    write_plots(args.run_dir)
    print(write_report(args.run_dir))
