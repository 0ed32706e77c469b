"""``enmp demo``: the search on handwritten digits that come with the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from enmp_jax.cli import search


@dataclass(frozen=True)
class Args:
    """ENMP on real handwritten digits, on this machine, in a few minutes."""

    out: Path | None = None
    """Run directory; default: runs/demo, or the next free runs/demo-2, ..."""
    seeds: int = 3


def run(args: Args) -> None:
    """Run ``enmp demo``."""
    out = args.out or _free(Path("runs/demo"))
    search.run(search.Args("demo", out, seeds=args.seeds))
    print(f"\nOpen {out / 'report.html'} for the picture, and see the README for your own adapters.")


def _free(path: Path) -> Path:
    candidates = [path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 1000))]
    return next(p for p in candidates if not p.exists() or not any(p.iterdir()))
