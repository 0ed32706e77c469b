"""``enmp verify``: prove that adapters and exports are what they say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import tyro

from enmp_jax.cli.output import Json


@dataclass(frozen=True)
class Args(Json):
    """Check adapters, exports (with the recipe beside them) or run directories with exports.

    An adapter: through the whole import and export it comes back with its own weights. An export: reloaded by
    our own reader and, where they are installed, PEFT and transformers, it is the merge that its recipe
    claims; nothing missing, nothing extra, not the base again. What vLLM serves is told, and does not count.
    The exit code is 1 if anything that counts is not ok.
    """

    directories: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR...")]
    adapter: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TASK=DIR")] = ()
    """Where an export's adapter is; default: where the run has it, here or beside the export by its name, or
    the hub."""
    base_model: str | None = None
    """Base model of a merged checkpoint: directory or hub id; default: the run's, or the hub's."""


def run(args: Args) -> int:
    """Run ``enmp verify``; returns the exit code."""
    from enmp_jax.adapters.checks import passed, table
    from enmp_jax.cli.merge import adapter_sources
    from enmp_jax.errors import UserError
    from enmp_jax.runs.verify import verify

    if not args.directories:
        raise UserError("give at least one adapter, export or run directory")
    given = adapter_sources(args.adapter)
    reports = [report for source in args.directories for report in verify(source, given, args.base_model)]
    if args.json:
        data = [{"source": r.source, "what": r.what, "ok": passed(r.checks),
                 "checks": [check._asdict() for check in r.checks]} for r in reports]  # fmt: skip
        print(json.dumps(data, indent=1))
    else:
        for report in reports:
            print(f"{report.source} ({report.what})")
            print("\n".join(f"  {line}" for line in table(report.checks)))
    return 0 if all(passed(report.checks) for report in reports) else 1
