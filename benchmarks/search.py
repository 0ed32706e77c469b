"""What searches find and what they cost, on suites that have data: resumable, one line of JSON a row.

    TFDS_DATA_DIR=DIR OPENBLAS_NUM_THREADS=1 python benchmarks/search.py vision-small --out FILE.jsonl
        [--methods tsv ties] [--rows plain paper ...] [--seeds 3] [--examples 200] [--test 600]
    python benchmarks/search.py --table FILE.jsonl

A row is a merge method and a way to search, over several seeds: ``--seeds`` searches with search.seed 0,
1, .. (the split is the same; weights differ by their start). Each is a whole ``enmp search`` in a temporary
directory: scale of the plain merge from the search split, finalists on the selection split, the test split
read once at the end. A row that is in the file already is not run again.

Columns: final fitness on the search split (what the search maximises), mean normalised accuracy on test of
the plain merge and of the winner (mean and standard deviation over seeds), example-evaluations per seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from enmp_jax.config import run_file
from enmp_jax.config.run_file import RunConfig
from enmp_jax.config.schema import parse
from enmp_jax.config.sections import MergeConfig, RefineConfig
from enmp_jax.io.progress import SILENT
from enmp_jax.runs.directory import environment
from enmp_jax.runs.search import search_run

METHODS: dict[str, dict[str, Any]] = {
    "sum": {"method": "sum"},
    "ties": {"method": "ties", "density": 0.4},
    "tsv": {"method": "tsv"},
    "iso": {"method": "iso"},
}
LAYER = {"granularity": "layer"}  # the paper's modules: all projections of a task in a layer
PAPER = LAYER | {"strategy": "cma_es", "population": 16, "generations": 60, "x0": -1.0, "sigma0": 0.5}
TENTH = LAYER | {"population": 8, "generations": 12}  # 96 masks instead of 960
WEIGHTS = {"strategy": "gradient", "generations": 40, "granularity": "projection"}
NO_LABELS = {"fitness": "expert_margin"}

ROWS: dict[str, dict[str, Any]] = {
    "paper": PAPER | {"fitness": "accuracy"},
    "paper, margin": PAPER | {"fitness": "margin"},
    "paper, margin, racing": PAPER | {"fitness": "margin", "fidelity": "racing"},
    "cma_es, a tenth": {"strategy": "cma_es", **TENTH},
    "greedy, leave-one-out": {"strategy": "greedy", "start": "leave_one_out", **TENTH, "generations": 6},
    "greedy, first order": {"strategy": "greedy", "start": "first_order", **TENTH, "generations": 11},
    "swap, first order": {"strategy": "swap", "start": "first_order", **TENTH, "generations": 11},
    "snes, first order": {"strategy": "snes", "start": "first_order", **TENTH, "generations": 11},
    "hardened weights": LAYER | {"strategy": "gradient", "generations": 20, "harden": "prune"},
    "weights, layer": WEIGHTS | {"granularity": "layer"},
    "weights": WEIGHTS,
    "weights, probability": WEIGHTS | {"fitness": "probability"},
    "weights, log_likelihood": WEIGHTS | {"fitness": "log_likelihood"},
    "weights, no labels": WEIGHTS | NO_LABELS,
    "weights, refined": WEIGHTS | {"refine": {"steps": 80, "fitness": "probability"}},
    "weights, refined, no labels": WEIGHTS | NO_LABELS | {"refine": {"steps": 80, "fitness": "expert_kl"}},
}


def configured(base: RunConfig, method: str, row: str, args: argparse.Namespace) -> RunConfig:
    settings = dict(ROWS[row])
    refine = settings.pop("refine", None)
    search = dataclasses.replace(
        base.search, **{"fitness": "margin", "x0": "auto", "seeds": args.seeds, "seed": 0, **settings},
        refine=None if refine is None else RefineConfig(**refine),
    )  # fmt: skip
    evaluation = dataclasses.replace(
        base.evaluation, search_examples=args.examples, selection_examples=args.examples,
        test_examples=args.test,
    )  # fmt: skip
    merge = parse(MergeConfig, METHODS[method], method)
    return dataclasses.replace(base, merge=merge, search=search, evaluation=evaluation)


def measure(base: RunConfig, method: str, row: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: the scores of a whole search."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        scores = search_run(configured(base, method, row, args), out, SILENT)
        lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    last = {line["seed"]: line for line in lines}
    return {
        "suite": args.suite, "method": method, "row": row, "seeds": args.seeds, "examples": args.examples,
        "fitness": scores["fitness"],
        "search": [line["best"] for line in last.values()],
        "plain": scores["mean_normalised"]["merged"],
        "found": [s["mean_normalised"] for s in scores["seeds"]],
        "refined": scores["mean_normalised"].get("refined"),
        "pruned": len(scores["pruned"]), "modules": scores["modules"],
        "example_evaluations": scores["example_evaluations"] / args.seeds,
        "environment": {k: environment()[k] for k in ("date", "commit", "python", "devices", "packages")},
    }  # fmt: skip


def table(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    print("| suite | merge | search | search fitness | plain | found | refined | example-evaluations |")
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        found = f"{np.mean(r['found']):.3f} ± {np.std(r['found'], ddof=1):.3f}" if len(r["found"]) > 1 else (
            f"{r['found'][0]:.3f}"
        )  # fmt: skip
        fitness = f"{np.mean(r['search']):.3f} ({r['fitness']})"
        refined = f"{r['refined']:.3f}" if r["refined"] is not None else ""
        print(
            f"| {r['suite']} | {r['method']} | {r['row']} | {fitness} | {r['plain']:.3f} | {found} "
            f"| {refined} | {r['example_evaluations']:,.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", nargs="?", default="vision-small")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["tsv", "ties"])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=200, help="per task, search and selection split")
    parser.add_argument("--test", type=int, default=600, help="examples per task of the test split")
    args = parser.parse_args()
    if args.table:
        return table(args.table)
    base = run_file.load(args.suite)
    done = set()
    if args.out.exists():
        for line in args.out.read_text().splitlines():
            row = json.loads(line)
            done.add((row["suite"], row["method"], row["row"], row["seeds"], row["examples"]))
    for row in args.rows:
        for method in args.methods:
            if (args.suite, method, row, args.seeds, args.examples) not in done:
                found = measure(base, method, row, args)
                with args.out.open("a") as file:
                    file.write(json.dumps(found) + "\n")
                print(method, row, np.round(found["found"], 4), found["refined"], flush=True)
    table(args.out)


if __name__ == "__main__":
    main()
