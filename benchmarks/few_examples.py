"""Few examples: batches with as few rows as they need against batches filled up to ``evaluation.batch_size``.

    TFDS_DATA_DIR=DIR OPENBLAS_NUM_THREADS=1 python benchmarks/few_examples.py [SUITE ...] [--examples 4 16]
        [--members 16] [--turns 3]

The same masks are scored on the search split of a suite, so many examples of every task, in turns; the best
turn of each counts; compiling apart. The counts of correct answers must be equal. Before batches were cut,
both columns were the second.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from typing import Any

import jax
import numpy as np
from evidence_suite import Data, Suite, make_data

from enmp_jax.data import Batches


def filled_up(batches: Batches, size: int) -> Batches:
    """Batches whose rows are so many; those added are copies of the last one and do not count."""

    def longer(x: Any) -> np.ndarray:
        return np.pad(x, ((0, 0), (0, size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)), mode="edge")

    rows = batches.mask.shape[1]
    filled = jax.tree.map(lambda x: longer(np.asarray(x)), batches)
    return jax.device_put(filled._replace(mask=filled.mask & (np.arange(size) < rows)))


def compare(data: Data, members: int, turns: int) -> tuple[int, int, float, float]:
    """Rows and seconds, cut and filled up."""
    size = data.suite.run.evaluation.batch_size
    filled = data.inputs._replace(batches=tuple(filled_up(b, size) for b in data.inputs.batches))
    sides = [data, data._replace(inputs=filled)]
    shape = members, *data.suite.layers.shape
    keep = (np.random.default_rng(0).random(shape) > 0.1).astype(np.float32)
    # the first call of each compiles
    cut, filled_up_too = (np.asarray(side.counts(keep, 0.5).correct) for side in sides)
    np.testing.assert_array_equal(cut, filled_up_too)
    best = [float("inf")] * 2
    for _ in range(turns):
        for i, side in enumerate(sides):
            start = time.perf_counter()
            side.counts(keep, 0.5)
            best[i] = min(best[i], time.perf_counter() - start)
    rows = [sum(b.mask.size for b in side.inputs.batches) for side in sides]
    return rows[0], rows[1], best[0], best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suites", nargs="*", default=["demo", "vision-small"])
    parser.add_argument("--examples", type=int, nargs="+", default=[4, 16], help="of a task")
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    print(
        f"{time.strftime('%Y-%m-%d')}, {jax.devices()[0].device_kind} ({os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}), python {platform.python_version()}, jax {jax.__version__}; "
        f"{args.members} masks, tsv\n"
    )
    print("| suite | examples | rows | rows, filled up | seconds | seconds, filled up | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name in args.suites:
        suite = Suite(name, None)
        for examples in args.examples:
            data = make_data(suite, {"method": "tsv"}, suite.draw(0, examples), "search")
            rows, all_rows, cut, filled = compare(data, args.members, args.turns)
            print(
                f"| {name} | {data.examples} | {rows} | {all_rows} | {cut:.3f} | {filled:.3f} "
                f"| {filled / cut:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
