"""``enmp train``: LoRA experts, and a small base if there is none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from enmp_jax.cli.output import Tracked, print_result, reporting
from enmp_jax.cli.run_option import RunFile, Settings, load_run_file


@dataclass(frozen=True)
class Args(Tracked):
    """Train one LoRA expert per task, and with a `pretrain` section first their base model."""

    run: RunFile
    out: Path
    """Directory for base/ and adapters/TASK/; what is there already is kept."""
    set: Settings = ()
    skip_bad: bool = False
    """Leave out images that do not decode, instead of stopping."""


def run(args: Args) -> None:
    """Run ``enmp train``."""
    from enmp_jax.config.schema import to_dict
    from enmp_jax.io.files import read_json
    from enmp_jax.io.trackers import tracking
    from enmp_jax.runs.train import train_run

    config = load_run_file(args.run, args.set, args.skip_bad)
    with reporting(args) as reporter, tracking(args.tracker, args.out, to_dict(config), reporter) as tracked:
        train_run(config, args.out, reporter.say, (tracked.reporter if tracked else reporter).advance)
    record = read_json(args.out / "training.json")
    print_result(
        args, {"out": str(args.out), "trained": record}, lambda result: print(f"results in {args.out}")
    )
