"""``enmp evaluate``: score adapters alone, merged, or merged under a mask."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from enmp_jax.cli.output import Output, print_result, reporting
from enmp_jax.cli.run_option import RunFile, Settings, load_run_file


@dataclass(frozen=True)
class Args(Output):
    """Score on a split: every adapter alone, the base, the plain merge, or the merge under a mask.

    On several hosts it runs as a search does, told so by the environment (see docs/pods.md).
    """

    run: RunFile
    split: Literal["search", "selection", "test"] = "test"
    mask: Path | None = None
    """A mask.json; also scores the merge under it."""
    scale: float | None = None
    """Merge coefficient; default: the mask's, else the run file's, else chosen on the search split."""
    experts: bool = False
    """Score only the adapters alone (the reference accuracies)."""
    lm_eval: tuple[str, ...] = ()
    """Score the merge (under the mask) on these tasks of lm-eval instead, by name or task file (.yaml)."""
    set: Settings = ()
    skip_bad: bool = False
    """Leave out images that do not decode, instead of stopping."""


def run(args: Args) -> None:
    """Run ``enmp evaluate``."""
    from enmp_jax.devices import distributed

    distributed.initialize(distributed.find_job())
    from enmp_jax.report.terminal import print_evaluation
    from enmp_jax.runs.evaluate import evaluate_run

    if args.lm_eval:
        from enmp_jax.integrations.lm_eval import EnmpLM, evaluate_tasks

        model = EnmpLM.from_run(load_run_file(args.run, args.set), args.mask, args.scale)
        print(json.dumps({"lm_eval": evaluate_tasks(model, args.lm_eval)}, indent=1))
        return
    with reporting(args) as reporter:
        config = load_run_file(args.run, args.set, args.skip_bad)
        result = evaluate_run(config, args.split, args.mask, args.scale, args.experts, reporter)
    print_result(args, result, print_evaluation)
