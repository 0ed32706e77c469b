"""``enmp export``: any format of what a finished search found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from enmp_jax.cli.output import Output, reporting


@dataclass(frozen=True)
class Args(Output):
    """Write what a finished search found, with its mask or weights, method, hyperparameters and adapters.

    adapters, delta and checkpoint are exact (a checkpoint but for the rounding of its type). peft and gguf
    are exact where the merged deltas are of low rank, else (ties, dare, ... in full space) within the
    tolerance; one that is not is scored itself.
    """

    run_dir: Annotated[Path, tyro.conf.Positional]
    format: Literal["adapters", "peft", "checkpoint", "delta", "gguf"]
    out: Path | None = None
    """Directory to make; default: adapters, merged, model, delta or gguf in the run directory."""
    rank: int | None = None
    """peft, gguf: largest rank, whatever the error; default here and below: the run file's."""
    tolerance: float | None = None
    """peft, gguf: relative error (Frobenius norm) that a merge without low rank may have."""
    strict: bool = False
    """peft, gguf: refuse to write an adapter that misses the tolerance."""
    no_score: bool = False
    """peft, gguf: do not score an adapter that misses the tolerance (scoring needs the run's data)."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """checkpoint: type of the weights; default: the base's. gguf: of the factors; default: float32."""
    base_model: str | None = None
    """checkpoint, gguf: directory, hub id or GGUF file, if the run's base has moved."""


def run(args: Args) -> None:
    """Run ``enmp export``."""
    from enmp_jax.cli.merge import show
    from enmp_jax.runs.export import export_run

    given = {name: getattr(args, name) for name in ("rank", "tolerance", "strict", "dtype", "base_model")}
    with reporting(args) as reporter:
        written, out = export_run(
            args.run_dir, args.format, args.out, given, reporter, score=not args.no_score
        )
    show(written, out, "export", args.json)
