"""What a step of the gradient search costs in forward passes, and what a generation costs beside evaluation.

    TFDS_DATA_DIR=DIR OPENBLAS_NUM_THREADS=1 python benchmarks/gradient_step.py [--suite vision-small]
        [--examples 200] [--turns 5]

Step: one derivative of the fitness with respect to the weights of all modules and one step of Adam, against
the fitness of one merged model, compiled, in turns in one process; the best of each (wanted: at most 3.5).
Overhead: ask, decode, look up and tell of a generation of 16 masks whose fitness costs nothing, at the 96
modules of ViT-B/32 with 8 tasks; benchmarks/results/generation.md has the evaluation that goes with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from enmp_jax.config import run_file
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.loaded_run import load
from enmp_jax.masks import MaskSpec
from enmp_jax.search import device_memo, gradient, loop, strategies


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def step(suite: str, examples: int, turns: int) -> None:
    run = run_file.load(suite)
    run = dataclasses.replace(
        run,
        search=dataclasses.replace(run.search, strategy="gradient", granularity="projection"),
        evaluation=dataclasses.replace(run.evaluation, search_examples=examples),
    )
    evaluator = Evaluator(load(run, ("search",)))
    inputs, scoring = evaluator.spread(evaluator.inputs("search")), evaluator.scoring("search")
    present = jnp.asarray(evaluator.loaded.mask_spec.present())
    value = evaluator.relaxed_fitness()
    ascent = gradient.make_ascent(value, gradient.Settings(10**6, check_every=1))
    state, forward = ascent.init(jax.random.key(0), present), jax.jit(value)
    operands = inputs, scoring, np.float32(0.5)
    sides = {
        "forward": lambda: forward(state.weights, *operands),
        "step": lambda: ascent.advance(state, present, *operands)[0].weights,
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, side in sides.items():
            taken = seconds(side)
            if turn:  # the first compiles
                times[name].append(taken)
    one, both = min(times["forward"]), min(times["step"])
    size = int(evaluator.loaded.sizes("search").sum())
    print(f"{suite}, {run.merge.method}, {size} examples: forward {one:.2f} s, step {both:.2f} s")
    print(f"a step costs {both / one:.2f} forward passes")


def cost_nothing(keep: Any, scale: Any) -> device_memo.Scored:
    return device_memo.Scored(keep.sum((1, 2)).astype(jnp.float32), jnp.ones(len(keep), bool))


def overhead(turns: int) -> None:
    spec = MaskSpec(12, ("q",), tuple(f"t{i}" for i in range(8)), tuple(range(96)))
    strategy = strategies.build("cma_es", 96, 16, 0.5, max_count=spec.max_count)

    def score(genomes: Any, memo: Any) -> Any:
        keep = jax.vmap(spec.decode)(genomes)
        cheap = device_memo.once(cost_nothing, 4)
        return device_memo.remembering(cheap)(memo, keep, jnp.ones(len(keep)))

    made = loop.make_step(strategy, score, 10)
    state = made.init(jax.random.key(0), jnp.full(96, -1.0))
    best = float("inf")
    for turn in range(turns + 1):
        carried = jax.tree.map(jnp.copy, (state, device_memo.start(960, spec.shape)))
        taken = seconds(
            lambda c=carried: made.advance(jax.random.key(1), np.int32(0), np.int32(10), c, ())[1]
        )
        best = min(best, taken) if turn else best
    print(f"a generation of 16 masks without evaluation: {100 * best:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--suite", default="vision-small")
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    overhead(args.turns)
    step(args.suite, args.examples, args.turns)


if __name__ == "__main__":
    main()
