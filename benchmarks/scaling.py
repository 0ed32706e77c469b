"""How the cost of a generation grows, and how evenly devices share it.

    OPENBLAS_NUM_THREADS=1 python benchmarks/scaling.py [--model vit-b-32] [--layers 2]

Work per device: multiply-adds of the program that each of 1, 2, 4 or 8 devices runs (traced, not run; eight
CPU devices are simulated), for populations and meshes; 100 % means that nothing is done twice and nobody
waits. Growth: seconds of one generation when members, tasks, layers or examples double twice, and the
exponent of the power law through the three times (1: linear).
"""

from __future__ import annotations

import argparse
import os
import platform
import time

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
from random_problem import CONFIGS, random_keep, random_problem, searched_chunk, searched_form

from enmp_jax import merges
from enmp_jax.devices.flops import count_flops
from enmp_jax.evaluation.population import make_evaluate, make_mesh

MESHES = ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (4, 2), (1, 8))  # population, data
POPULATIONS = (7, 8, 16, 20, 64)


def work(args: argparse.Namespace) -> None:
    """Counted work per device."""
    backbone, merge, stack, inputs = random_problem(
        args.model, layers=1, tasks=4, examples=32, batch_size=16, tokens=32
    )
    print("| members | " + " | ".join(f"{p} x {d}" for p, d in MESHES) + " |")
    print("|---" * (len(MESHES) + 1) + "|")
    for members in POPULATIONS:
        operands = inputs, jnp.asarray(random_keep(members, stack)), jnp.ones(members)
        flops = [
            count_flops(make_evaluate(backbone, merge, 4, make_mesh(p, d, 1), 4), *operands)
            for p, d in MESHES
        ]
        cells = [f"{flops[0] / (p * d * f):.0%}" for (p, d), f in zip(MESHES, flops, strict=True)]
        print(f"| {members} | " + " | ".join(cells) + " |", flush=True)


def seconds(args: argparse.Namespace, members: int, tasks: int, layers: int, examples: int) -> float:
    """One generation, the best of three, after compilation."""
    backbone, merge, stack, inputs = random_problem(
        args.model, merges.make(args.method, args.space), layers=layers, tasks=tasks, examples=examples,
        batch_size=16, tokens=32,
    )  # fmt: skip
    merge = searched_form(backbone, merge, stack, inputs, room=10**9)
    chunk = searched_chunk(members, backbone, inputs)
    evaluate = jax.jit(make_evaluate(backbone, merge, tasks, member_chunk=chunk))
    operands = inputs, jnp.asarray(random_keep(members, stack)), jnp.full(members, 0.3)
    jax.block_until_ready(evaluate(*operands))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(evaluate(*operands))
        times.append(time.perf_counter() - start)
    return min(times)


def growth(args: argparse.Namespace) -> None:
    """Fitted exponents."""
    base = {"members": 4, "tasks": 4, "layers": args.layers, "examples": 16}
    print("| what grows | x 1: s | x 2: s | x 4: s | exponent |\n|---|---|---|---|---|")
    for name, least in base.items():
        times = [seconds(args, **base | {name: least * k}) for k in (1, 2, 4)]
        exponent = np.polyfit(np.log([1, 2, 4]), np.log(times), 1)[0]
        values = f"{name} ({least}, {2 * least}, {4 * least})"
        print(f"| {values} | " + " | ".join(f"{t:.2f}" for t in times) + f" | {exponent:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=list(CONFIGS), default="vit-b-32")
    parser.add_argument("--layers", type=int, default=2, help="of the smallest model timed")
    parser.add_argument("--method", default="sum")
    parser.add_argument("--space", default="full")
    args = parser.parse_args()
    print(
        f"{time.strftime('%Y-%m-%d')}, {jax.devices()[0].device_kind} ({os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}), python {platform.python_version()}, jax {jax.__version__}; "
        f"{args.model}, {args.method} in {args.space}\n"
    )
    work(args)
    print()
    growth(args)


if __name__ == "__main__":
    main()
