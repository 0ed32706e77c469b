"""What the commands that report progress and print a result share: ``--json``, ``--quiet``, ``--tracker``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from enmp_jax.io.progress import Reporter, make_reporter


@dataclass(frozen=True, kw_only=True)
class Json:
    """Of commands that print a result."""

    json: bool = False
    """Print the result as JSON on standard output, and everything else on standard error."""


@dataclass(frozen=True, kw_only=True)
class Output(Json):
    """Of commands that also take their time."""

    quiet: bool = False
    """No progress: the result, warnings and errors only."""


@dataclass(frozen=True, kw_only=True)
class Tracked(Output):
    """Of commands whose steps are worth a curve."""

    tracker: Literal["tensorboard", "wandb", "trackio", "mlflow"] | None = None
    """Log every generation or step and the final scores there, too; it must be installed."""


def reporting(args: Output) -> AbstractContextManager[Reporter]:
    """The reporter of a command."""
    return make_reporter(args.quiet, results_on_stdout=args.json)


def print_result(args: Json, result: Mapping[str, Any], show: Callable[[Mapping[str, Any]], None]) -> None:
    """Print a result, as JSON or as ``show`` does; on process 0 only."""
    import jax

    if jax.process_index():
        return
    if args.json:
        print(json.dumps(result, indent=1, default=str))
    else:
        show(result)
