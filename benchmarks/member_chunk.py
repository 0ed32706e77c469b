"""How many masks to score together on a CPU: masks a second, one by one and several at once.

    TFDS_DATA_DIR=DIR OPENBLAS_NUM_THREADS=1 python benchmarks/member_chunk.py [SUITE ...] [--methods tsv ...]
        [--examples 4 50] [--chunks 1 2 4] [--turns 3]

Masks of a suite's search split, so many examples of every task. All numbers together score the same masks,
as many as the largest, in turns; the best turn of each counts; compiling apart. The counts of correct
answers must be equal. What a search saves besides, because none of its chunks is filled up with copies, is
not in these figures.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import time

import jax
import numpy as np
from evidence_suite import Suite, make_data

from enmp_jax.evaluation.population import score_in_chunks


def seconds(suite: Suite, method: str, examples: int, chunks: list[int], turns: int) -> list[float]:
    """Best time for a mask, for every number of masks together."""
    data = make_data(suite, {"method": method}, suite.draw(0, examples), "search")
    evaluator, inputs = data.evaluator, data.inputs
    shape = max(chunks), *suite.layers.shape
    keep = data.written_out((np.random.default_rng(0).random(shape) > 0.1).astype(np.float32))
    scale = np.full(len(keep), 0.5, np.float32)
    plans = [evaluator.plan(inputs)._replace(member_chunk=chunk) for chunk in chunks]
    compiled = [functools.partial(jax.jit(evaluator.evaluate(plan)), inputs) for plan in plans]
    first, *others = (
        score_in_chunks(f, keep, scale, chunk).correct for f, chunk in zip(compiled, chunks, strict=True)
    )
    for correct in others:
        np.testing.assert_array_equal(first, correct)
    best = [float("inf")] * len(chunks)
    for _ in range(turns):
        for i, (evaluate, chunk) in enumerate(zip(compiled, chunks, strict=True)):
            start = time.perf_counter()
            score_in_chunks(evaluate, keep, scale, chunk)
            best[i] = min(best[i], (time.perf_counter() - start) / len(keep))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suites", nargs="*", default=["demo", "vision-small"])
    parser.add_argument("--methods", nargs="+", default=["tsv", "ties"])
    parser.add_argument("--examples", type=int, nargs="+", default=[4, 50], help="of a task")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4], help="masks together")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(
        f"{time.strftime('%Y-%m-%d')}, {jax.devices()[0].device_kind} ({cores} cores, load "
        f"{os.getloadavg()[0]:.1f}), python {platform.python_version()}, jax {jax.__version__}; "
        "milliseconds a mask\n"
    )
    print("| suite | examples | merge |", *(f"{n} together |" for n in args.chunks))
    print("|---|---|---|" + "---|" * len(args.chunks))
    for name in args.suites:
        suite = Suite(name, None)
        for examples in args.examples:
            for method in args.methods:
                found = seconds(suite, method, examples, args.chunks, args.turns)
                cells = " | ".join(f"{1000 * second:.1f}" for second in found)
                print(f"| {name} | {examples * len(suite.tasks)} | {method} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
