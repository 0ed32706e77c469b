"""``enmp train``: LoRA experts, and a small base if there is none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from enmp_jax.cli.run_option import RunFile, Settings, load_run_file


@dataclass(frozen=True)
class Args:
    """Train one LoRA expert per task, and with a `pretrain` section first their base model."""

    run: RunFile
    out: Path
    """Directory for base/ and adapters/TASK/; what is there already is kept."""
    set: Settings = ()
    skip_bad: bool = False
    """Leave out images that do not decode, instead of stopping."""


def run(args: Args) -> None:
    """Run ``enmp train``."""
    from enmp_jax.io.progress import make_reporter
    from enmp_jax.runs.train import train_run

    with make_reporter() as reporter:
        train_run(load_run_file(args.run, args.set, args.skip_bad), args.out, reporter.say)
