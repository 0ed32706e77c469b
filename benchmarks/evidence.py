"""Evidence: ways to search, rivals and controls, on suites, over methods and seeds that draw other data.

    TFDS_DATA_DIR=DIR OPENBLAS_NUM_THREADS=1 python benchmarks/evidence.py vision-small --out FILE.jsonl
        [--set main | rungs | strategies | fitness] [--columns NAME ...] [--methods tsv ...] [--seeds 5]
        [--examples 200 ...] [--test 600]
    python benchmarks/evidence.py --table FILE.jsonl
    python benchmarks/evidence.py --overview FILE.jsonl
    python benchmarks/evidence.py --figures DIR FILE.jsonl

One line of JSON a row: suite x method x seed x column x examples. What is there already is not run again, so
a killed run goes on where it was; a row whose settings have changed since is refused. A seed draws its own
search and selection splits from data that the experts were not trained on; the test split is fixed, and is
read once a row. ``--examples`` a task are searched with, and as many again select.

Costs are example-evaluations: forward passes of one example, a step of the gradient counted as ``STEP_COST``.
Those that tune scale and density of the plain merge are the same for all columns and not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from evidence_columns import COLUMNS, METHODS, NO_METHOD, SETS
from evidence_figures import figures
from evidence_kinds import Group, measure
from evidence_overview import overview
from evidence_report import read, table
from evidence_suite import Suite

from enmp_jax.errors import UserError
from enmp_jax.runs.directory import environment

KEYS = ("suite", "method", "seed", "column", "examples")
SIZES = (4, 16, 50, 200, 500)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells rows apart."""
    return tuple(row[name] for name in KEYS)


def planned(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows that are asked for, group by group: those of a group share their data."""
    examples = args.examples or (SIZES if args.set == "rungs" else (200,))
    # those of no method last: a group that is left and entered again would tune its plain merge twice
    columns = sorted(args.columns or SETS[args.set], key=lambda name: COLUMNS[name]["kind"] in NO_METHOD)
    groups = [
        (seed, n, str(method)) for seed in range(args.seeds) for n in examples for method in args.methods
    ]
    for seed, n, method in groups:
        for column in columns:
            alone = COLUMNS[column]["kind"] in NO_METHOD
            settings = {**COLUMNS[column], "test": args.test, "grid": [] if alone else METHODS[method]}
            yield {
                "suite": args.suite, "method": "-" if alone else method, "seed": seed, "column": column,
                "examples": n, "settings": settings,
            }  # fmt: skip


def remaining(rows: list[dict[str, Any]], done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The planned rows that are not done.

    Raises:
        UserError: a row that is done, with other settings.
    """
    known = {key(row): row["settings"] for row in done}
    for row in rows:
        if key(row) in known and known[key(row)] != row["settings"]:
            raise UserError(
                f"{', '.join(map(str, key(row)))}: the file has this row with other settings: write to "
                "another file, or remove the row"
            )
    distinct = {key(row): row for row in rows if key(row) not in known}
    return list(distinct.values())


def run(args: argparse.Namespace) -> None:
    """Do what is not done, one row after the other."""
    done = read(args.out) if args.out.exists() else []
    if args.out.exists() and not args.out.read_bytes().endswith(b"\n"):
        with args.out.open("a") as file:
            file.write("\n")  # a kill cut the last line short: the next row begins its own
    todo = remaining(list(planned(args)), done)
    print(f"{len(todo)} rows to do", flush=True)
    if not todo:
        return
    suite = Suite(args.suite, args.test)
    made = {name: environment()[name] for name in ("date", "commit", "python", "devices", "packages")}
    for (seed, n, method), rows in itertools.groupby(
        todo, lambda row: (row["seed"], row["examples"], row["method"])
    ):
        group = Group(suite, args.methods[0] if method == "-" else method, seed, n)
        known = {
            row["column"]: row
            for row in done
            if (row["suite"], row["seed"], row["examples"], row["method"]) == (args.suite, seed, n, method)
        }
        for row in rows:
            column = row["column"]
            row |= measure(group, row["settings"], known) | {"environment": made}
            known[column] = row
            done.append(row)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            shown = row.get("skipped") or f"{row['test']:.4f} ({row['seconds']:.1f} s)"
            print(f"{args.suite} {method} seed {seed}, {n} examples, {column}: {shown}", flush=True)


def main(description: str | None = __doc__, default: str = "main") -> None:
    """The command line; ``default`` is the set of columns."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", nargs="?", default="demo")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--overview", type=Path, help="gains over the plain merge, side by side")
    parser.add_argument("--figures", nargs=2, type=Path, metavar=("DIR", "FILE"))
    parser.add_argument("--set", choices=list(SETS), default=default)
    parser.add_argument("--columns", nargs="+", choices=list(COLUMNS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--examples", type=int, nargs="+", help="per task, to search and as many to select")
    parser.add_argument("--test", type=int, default=600, help="examples per task of the test split")
    args = parser.parse_args()
    # programs of earlier rows and runs are read back instead of compiled again
    folder = os.environ.get("ENMP_XLA_CACHE", str(Path(tempfile.gettempdir()) / "enmp-evidence-xla"))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    try:
        if args.table:
            print(table(read(args.table)))
        elif args.overview:
            print(overview(read(args.overview)))
        elif args.figures:
            print(*figures(read(args.figures[1]), args.figures[0]), sep="\n")
        elif args.out is None:
            raise UserError("give --out FILE.jsonl, where the rows go")
        else:
            run(args)
    except UserError as error:
        sys.exit(f"evidence: {error}")


if __name__ == "__main__":
    main()
