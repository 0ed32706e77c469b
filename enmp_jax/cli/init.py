"""``enmp init``: a commented run file for adapters, on standard output."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Args:
    """Write a commented run file for these adapters: enmp init ADAPTER... > run.yaml"""

    adapters: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER...")]
    """PEFT directories or hub ids (``name@revision``), one a task."""


def run(args: Args) -> None:
    """Run ``enmp init``."""
    from enmp_jax.runs.init import starting_run_file

    sys.stdout.write(starting_run_file(args.adapters))
