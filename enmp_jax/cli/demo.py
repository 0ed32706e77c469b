"""``enmp demo``: the search on handwritten digits that come with the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from enmp_jax.cli import search
from enmp_jax.cli.output import Tracked

QUICK = (
    "search.seeds=1", "search.generations=4", "search.granularity=layer", "merge.scale=0.6",
    "evaluation.search_examples=40", "evaluation.selection_examples=40", "evaluation.test_examples=60",
)  # fmt: skip


@dataclass(frozen=True)
class Args(Tracked):
    """ENMP on real handwritten digits, on this machine, in a few minutes."""

    out: Path | None = None
    """Run directory; default: runs/demo, or the next free runs/demo-2, ..."""
    seeds: int | None = None
    """Number of searches; default: 3."""
    quick: bool = False
    """A search of a few masks of a few images, in under a minute: does everything work here?"""


def run(args: Args) -> None:
    """Run ``enmp demo``."""
    out = args.out or _free(Path("runs/demo"))
    output = {name: getattr(args, name) for name in ("json", "quiet", "tracker")}
    search.run(search.Args("demo", out, seeds=args.seeds, set=QUICK if args.quick else (), **output))
    if not args.json:
        print(f"\nOpen {out / 'report.html'} for the picture, and see the README for your own adapters.")


def _free(path: Path) -> Path:
    candidates = [path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 1000))]
    return next(p for p in candidates if not p.exists() or not any(p.iterdir()))
