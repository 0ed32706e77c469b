"""Searches on llm-small over methods and seeds that draw other data, each an ordinary ``enmp search``.

    python benchmarks/generative_suite.py RUNS [--methods tsv ties] [--columns weights paper] [--seeds 3]
        [--examples 12] [--test 40] [--steps 8] [--generations 3]
    python benchmarks/generative_suite.py RUNS --table

RUNS is a folder with a run directory a row; what is finished is not run again, what was begun goes on. The
table is that of benchmarks/results/llm_small.md: mean normalised score of the test split, whose examples are
the same in every seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

COLUMNS: dict[str, dict[str, Any]] = {
    "weights": {"strategy": "gradient", "granularity": "projection", "fitness": "probability"},
    "weights, no labels": {"strategy": "gradient", "granularity": "projection", "fitness": "expert_kl"},
    "paper": {
        "strategy": "cma_es", "granularity": "layer", "fitness": "accuracy", "population": 16, "x0": -1.0,
        "sigma0": 0.5, "finalists": 2,
    },
}  # fmt: skip


def planned(args: argparse.Namespace) -> Iterator[tuple[Path, list[str]]]:
    """Run directory and settings of every row, seed by seed."""
    for seed, method, column in itertools.product(range(args.seeds), args.methods, args.columns):
        search = COLUMNS[column]
        generations = args.steps if search["strategy"] == "gradient" else args.generations
        settings = {f"search.{name}": value for name, value in search.items()} | {
            "merge.method": method, "search.generations": generations, "search.seed": seed,
            "evaluation.seed": seed, "evaluation.search_examples": args.examples,
            "evaluation.selection_examples": args.examples, "evaluation.test_examples": args.test,
        }  # fmt: skip
        folder = args.runs / f"{column.replace(', ', '-').replace(' ', '-')}_{method}_{seed}"
        yield folder, [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


def run(args: argparse.Namespace) -> None:
    """Do what is not done."""
    for folder, settings in planned(args):
        if (folder / "scores.json").exists():
            continue
        command = [
            sys.executable,
            "-m",
            "enmp_jax.cli",
            "search",
            args.suite,
            "--out",
            str(folder),
            *settings,
        ]
        if (folder / "config.yaml").exists():
            command.append("--resume")
        print(folder.name, flush=True)
        subprocess.run(command, check=True)


def table(runs: Path) -> str:
    """Rows of a Markdown table: a column and method, over its seeds."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(runs.glob("*/scores.json")):
        column, method, _ = path.parent.name.rsplit("_", 2)
        found.setdefault((method, column), []).append(json.loads(path.read_text()))
    lines = ["| merge | column | seeds | base | plain | found | gain | 95 % | seconds |", "|" + "---|" * 9]
    for (method, column), rows in sorted(found.items()):
        base, plain, ours = (
            np.array([r["mean_normalised"][n] for r in rows]) for n in ("base", "merged", "enmp")
        )
        gain, n = ours - plain, len(rows)
        half = stats.t.ppf(0.975, n - 1) * gain.std(ddof=1) / n**0.5 if n > 1 else float("nan")
        seconds = np.mean([r.get("seconds", np.nan) for r in rows])
        lines.append(
            f"| {method} | {column} | {n} | {base.mean():.3f} | {plain.mean():.3f} | {ours.mean():.3f} | "
            f"{gain.mean():+.3f} | {half:.3f} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--suite", default="llm-small")
    parser.add_argument("--methods", nargs="+", default=["tsv", "ties"])
    parser.add_argument("--columns", nargs="+", choices=list(COLUMNS), default=["weights", "paper"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=12, help="per task, to search and as many to select")
    parser.add_argument("--test", type=int, default=40, help="examples per task")
    parser.add_argument("--steps", type=int, default=8, help="of the gradient")
    parser.add_argument("--generations", type=int, default=3, help="of 16 masks, of the paper's search")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table(args.runs))
    else:
        run(args)


if __name__ == "__main__":
    main()
