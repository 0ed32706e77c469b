"""Masks/s, examples/s and model-FLOP utilisation of a population in one compiled call.

    python benchmarks/population_throughput.py --model vit-b-32 [--populations 1 4 16] [--layers N]
        [--dtype bfloat16] [--examples 64] [--tasks 8] [--batch 128] [--tokens 128] [--member-chunk C]

Utilisation is the FLOPs of the matrix products of the forward passes (counted from the program, deltas
included, merging not) over the time, against the rate of a large matrix product of the same type, measured
in the same run on the same device. Weights, adapters (rank 16 on the attention projections) and data are
random. Start it with ``OPENBLAS_NUM_THREADS=1``.
"""

from __future__ import annotations

import argparse
import os
import platform
import time

import jax
import jax.numpy as jnp
from random_problem import CONFIGS, random_keep, random_problem, searched_chunk, searched_form

from enmp_jax import merges
from enmp_jax.evaluation import budget
from enmp_jax.evaluation.population import make_evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=list(CONFIGS), default="vit-b-32")
    parser.add_argument("--populations", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--method", default="mean")
    parser.add_argument("--space", default="full")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--examples", type=int, default=64, help="per task")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--member-chunk", type=int, help="members at once; default: as a search")
    parser.add_argument("--room", type=int, default=1024, help="MiB a member for full matrices of its deltas")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    backbone, merge, stack, inputs = random_problem(
        args.model, merges.make(args.method, args.space), layers=args.layers, dtype=args.dtype,
        tasks=args.tasks, examples=args.examples, batch_size=args.batch, tokens=args.tokens,
    )  # fmt: skip
    examples = args.tasks * args.examples
    merge = searched_form(backbone, merge, stack, inputs, args.room * 2**20)
    flops = budget.mask_flops(backbone, merge, inputs, (stack.n_layers, stack.n_tasks))
    device = jax.devices()[0]
    print(
        f"{time.strftime('%Y-%m-%d')}, {device.device_kind} ({os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}), python {platform.python_version()}, jax {jax.__version__}; "
        f"{args.model}, {backbone.n_layers} layers, {args.dtype}, {args.method} in {args.space}, "
        f"{args.tasks} tasks x {args.examples} examples, batch {args.batch}, {flops / 1e9:.1f} GFLOP a mask, "
        f"best of {args.repeats}\n"
    )
    print("| P | masks/s | examples/s | GFLOP/s | matmul GFLOP/s | utilisation | temporaries MiB |")
    print("|---|---|---|---|---|---|---|")
    for members in args.populations:
        chunk = args.member_chunk or searched_chunk(members, backbone, inputs)
        evaluate = make_evaluate(backbone, merge, args.tasks, member_chunk=chunk)
        arguments = inputs, jnp.asarray(random_keep(members, stack)), jnp.full(members, 0.5)
        compiled = jax.jit(evaluate).lower(*arguments).compile()
        jax.block_until_ready(compiled(*arguments))
        rate, best = 0.0, float("inf")
        for _ in range(args.repeats):  # both in turn: whatever else runs on the machine meets both
            rate = max(rate, budget.matmul_rate(args.dtype))
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            best = min(best, time.perf_counter() - start)
        reached = members * flops / best
        analysis = compiled.memory_analysis()
        memory = analysis.temp_size_in_bytes / 2**20 if analysis else float("nan")
        print(
            f"| {members} | {members / best:.3g} | {members * examples / best:.4g} | {reached / 1e9:.4g} "
            f"| {rate / 1e9:.4g} | {100 * reached / rate:.0f} % | {memory:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
