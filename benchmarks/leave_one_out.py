"""Leave-one-out of all modules: from the parent's hidden states against whole forward passes.

    OPENBLAS_NUM_THREADS=1 python benchmarks/leave_one_out.py [--model vit-b-32] [--layers N] [--tasks 4]
        [--examples 4] [--batch 16] [--turns 2] [--method mean] [--room 1024]

Both score the same masks (each of the layers x tasks modules pruned alone) on the same data in one process,
in turns, the best of each counts; compiling apart. Weights, adapters (rank 16 on the attention projections)
and data are random. Target: at most 0.6 of the whole passes.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import time

import jax
import numpy as np
from random_problem import CONFIGS, random_problem, searched_chunk, searched_form

from enmp_jax import merges
from enmp_jax.evaluation.population import make_evaluate, score_in_chunks
from enmp_jax.evaluation.prefix import in_calls, make_evaluate_from


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=list(CONFIGS), default="vit-b-32")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--method", default="mean")
    parser.add_argument("--space", default="full")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--examples", type=int, default=4, help="per task")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--room", type=int, default=1024, help="MiB a member for full matrices of its deltas")
    args = parser.parse_args()
    backbone, merge, stack, inputs = random_problem(
        args.model, merges.make(args.method, args.space), layers=args.layers, dtype=args.dtype,
        tasks=args.tasks, examples=args.examples, batch_size=args.batch,
    )  # fmt: skip
    merge = searched_form(backbone, merge, stack, inputs, args.room * 2**20)
    parent = np.ones((stack.n_layers, stack.n_tasks), bool)
    keep = ~np.eye(parent.size, dtype=bool).reshape(-1, *parent.shape)
    scale = np.full(len(keep), 0.5, np.float32)
    chunk = searched_chunk(len(keep), backbone, inputs)

    shared = jax.jit(make_evaluate_from(backbone, merge, args.tasks, member_chunk=chunk))
    whole = jax.jit(make_evaluate(backbone, merge, args.tasks, member_chunk=chunk))
    sides = {
        "whole passes": lambda masks: score_in_chunks(functools.partial(whole, inputs), masks, scale, chunk),
        "reused hidden states": lambda masks: in_calls(
            functools.partial(shared, inputs, parent, 0.5), parent, masks, 64
        ),
    }
    print(
        f"{time.strftime('%Y-%m-%d')}, {jax.devices()[0].device_kind} ({os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}), python {platform.python_version()}, jax {jax.__version__}; "
        f"{args.model}, {backbone.n_layers} layers, {args.dtype}, {args.method} in {args.space}, "
        f"{len(keep)} masks, {args.tasks} tasks x {args.examples} examples, batch {args.batch}, "
        f"chunks of {chunk}"
    )
    # a call of the shape that will be timed, all its masks the parent: that one runs hardly a layer
    for name, masks in (("whole passes", keep[:chunk]), ("reused hidden states", keep | True)):
        sides[name](masks)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    counts = {}
    for _ in range(args.turns):
        for name, score in sides.items():
            start = time.perf_counter()
            counts[name] = score(keep)
            seconds[name].append(time.perf_counter() - start)
            print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    full, reused = (min(seconds[name]) for name in sides)
    ours, theirs = (c.log_likelihood for c in reversed(counts.values()))
    print(
        "\n| masks | whole passes s | reused s | ratio | largest relative difference |"
        "\n|---|---|---|---|---|\n"
        f"| {len(keep)} | {full:.1f} | {reused:.1f} | {reused / full:.2f} "
        f"| {np.max(np.abs(ours / theirs - 1)):.2g} |"
    )


if __name__ == "__main__":
    main()
