"""Whether masks and weights found with one merge method, or on one draw of the data, serve another.

    TFDS_DATA_DIR=DIR OPENBLAS_NUM_THREADS=1 python benchmarks/transfer.py demo --rows EVIDENCE.jsonl
        --out FILE.jsonl [--columns "ours, binary" "ours, continuous"] [--test 400]
    python benchmarks/transfer.py --table FILE.jsonl

Masks and weights come from the rows that benchmarks/evidence.py wrote, nothing is searched. Each is used by
the other methods of its seed, at their own tuned setting and scale, and judged on the test split; and by the
other seeds of its method, judged on their search split, since the test split is the same for all seeds. What
is there already is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from evidence_kinds import Group
from evidence_report import Row, interval, read, rule
from evidence_suite import Suite

from enmp_jax.errors import UserError

KEYS = ("suite", "column", "examples", "method", "seed", "used_method", "used_seed")


def pairs(found: list[Row], columns: list[str]) -> Iterator[Row]:
    """Every row with the other methods of its seed, and with the other seeds of its method."""
    rows = [row for row in found if row["column"] in columns and "keep" in row]
    for a in rows:
        for b in rows:
            same = a["column"] == b["column"] and a["examples"] == b["examples"]
            if same and (a["method"] == b["method"]) != (a["seed"] == b["seed"]):
                yield {key: a[key] for key in KEYS[:5]} | {
                    "used_method": b["method"], "used_seed": b["seed"], "keep": a["keep"], "own": a,
                    "there": b,
                }  # fmt: skip


def measure(groups: dict[Any, Group], suite: Suite, row: Row) -> Row:
    """Mean normalised accuracy of what was found elsewhere, the plain merge, and what was found here."""
    place = row["used_method"], row["used_seed"], row["examples"]
    if place not in groups:
        groups[place] = Group(suite, *place)
    there = row["there"]
    split = "test" if row["method"] != row["used_method"] else "search"
    data = groups[place].data(split, there["merge"])
    masks = [data.written_out(np.asarray(x)[None])[0] for x in (row["keep"], there["keep"])]
    plain = np.ones_like(masks[0])
    scores = data.score(np.stack([masks[0], plain, masks[1]]), there["scale"], "accuracy")
    return {key: row[key] for key in KEYS} | {
        "split": split, "moved": float(scores[0]), "plain": float(scores[1]), "own": float(scores[2]),
    }  # fmt: skip


def table(rows: list[Row]) -> str:
    """Gains over the plain merge in points: method by method on test (own ones on the diagonal), by seed."""
    return "\n\n".join(
        part
        for suite, column in dict.fromkeys((row["suite"], row["column"]) for row in rows)
        for part in _tables(
            f"{suite}, {column}", [r for r in rows if (r["suite"], r["column"]) == (suite, column)]
        )
    )


def _tables(name: str, rows: list[Row]) -> Iterator[str]:
    moved, own = defaultdict(list), defaultdict(list)
    for row in rows:
        where = row["split"], row["method"], row["used_method"]
        moved[where].append(100 * (row["moved"] - row["plain"]))
        own[row["split"], row["used_method"]].append(100 * (row["own"] - row["plain"]))
    methods = list(dict.fromkeys(row["used_method"] for row in rows if row["split"] == "test"))
    if methods:
        lines = [f"| {name}: found with, used with | {' | '.join(methods)} |", rule(len(methods) + 1)]
        for a in methods:
            cells = [
                f"(own {np.mean(own['test', b]):+.1f})" if a == b
                else f"{np.mean(found):+.1f}" if (found := moved["test", a, b]) else ""
                for b in methods
            ]  # fmt: skip
            lines.append(f"| {a} | {' | '.join(cells)} |")
        yield "\n".join(lines)
    seeds = [(where, found) for where, found in moved.items() if where[0] == "search"]
    if seeds:
        lines = [
            f"| {name}: on another seed's search split | pairs | gain | 95 % | gain of its own |",
            rule(5),
        ]
        for (_, method, _), found in seeds:
            gain, _, half = interval(found)
            shown = "" if np.isnan(half) else f"{half:.1f}"
            home = np.mean(own["search", method])
            lines.append(f"| {method} | {len(found)} | {gain:+.1f} | {shown} | {home:+.1f} |")
        yield "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Measure what is not measured."""
    found = [row for row in read(args.rows) if row["suite"] == args.suite]
    wanted = list(pairs(found, args.columns))
    if not wanted:
        raise UserError(
            f"{args.rows.name} has no two rows of {args.suite} that could be exchanged: run "
            "benchmarks/evidence.py with several methods or seeds first"
        )
    done = read(args.out) if args.out.exists() else []
    known = {tuple(row[key] for key in KEYS) for row in done}
    suite, groups = Suite(args.suite, args.test), {}
    for row in wanted:
        if tuple(row[key] for key in KEYS) not in known:
            made = measure(groups, suite, row)
            with args.out.open("a") as file:
                file.write(json.dumps(made) + "\n")
            done.append(made)
    print(table(done))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", nargs="?", default="demo")
    parser.add_argument("--rows", type=Path, help="of benchmarks/evidence.py")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--columns", nargs="+", default=["ours, binary", "ours, continuous"])
    parser.add_argument("--test", type=int, default=600, help="examples per task of the test split")
    args = parser.parse_args()
    try:
        if args.table:
            print(table(read(args.table)))
        elif args.rows is None or args.out is None:
            raise UserError("give --rows EVIDENCE.jsonl and --out FILE.jsonl")
        else:
            run(args)
    except (UserError, OSError) as error:
        sys.exit(f"transfer: {error}")


if __name__ == "__main__":
    main()
