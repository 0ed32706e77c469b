"""Which strategy finds good masks with few evaluations, on a toy whose truth is known?

    OPENBLAS_NUM_THREADS=1 JAX_PLATFORMS=cpu python benchmarks/search_efficiency.py

96 modules, at most 32 pruned (the paper's decode with threshold 0), value = effects of single
modules + pairwise interactions. Two variants: fitness with Gaussian noise of standard deviation 1,
and fitness quantised to steps of 2 (accuracies on a few hundred examples tie just so). Reported is
the true value of the mask whose observed fitness was best: what a user would get without a
selection split. All strategies and pycma's CMA-ES (``pip install cma``) start from genes of -1.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import cma
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from enmp_jax.masks import MaskSpec
from enmp_jax.search.loop import make_step, run
from enmp_jax.search.strategies import build

N, LIMIT, STEP = 96, 32, 2.0
SPEC = MaskSpec(1, ("p",), tuple(map(str, range(N))), tuple(range(N)), max_pruned=LIMIT / N)
BUDGETS = (240, 480, 2000)
VARIANTS = ("noisy", "quantised")
CONFIGURATIONS = [
    *((name, sigma) for name in ("cma_es", "sep_cma_es", "snes", "de") for sigma in (0.5, 1.0)),
    ("bit_flip", 0.5), ("random", 1.0),
]  # fmt: skip


class Toy(NamedTuple):
    single: jax.Array  # [module]
    pairs: jax.Array  # [module, module], zero diagonal, each pair once


class Scores(NamedTuple):
    fitness: jax.Array  # what the search sees
    value: jax.Array  # the truth


def make_toy(seed: int = 0) -> Toy:
    """Most modules are useful, a few are negative; interactions are as large as single effects."""
    rng = np.random.default_rng(seed)
    single = rng.normal(-0.5, 1.0, N)
    pairs = np.triu(rng.normal(0.0, 0.25, (N, N)), k=1)
    return Toy(jnp.asarray(single, jnp.float32), jnp.asarray(pairs, jnp.float32))


def value(pruned, toy: Toy):
    pruned = pruned.astype(toy.single.dtype)
    return pruned @ toy.single + ((pruned @ toy.pairs) * pruned).sum(-1)


def evaluate(genomes, memory, toy: Toy, quantised, key):
    pruned = ~jax.vmap(SPEC.decode)(genomes)[:, 0]
    true = value(pruned, toy)
    # the noise belongs to the genome, drawn anew in every generation
    noise_key = jax.random.fold_in(key, jax.lax.bitcast_convert_type(genomes.sum(), jnp.uint32))
    noisy = true + jax.random.normal(noise_key, true.shape)
    return Scores(jnp.where(quantised, jnp.floor(true / STEP) * STEP, noisy), true), memory


def best_known(toy: Toy, restarts: int = 200) -> float:
    """Local search by flips and swaps from random masks: the yardstick, not a proof of optimality."""
    single, pairs = np.asarray(toy.single, float), np.asarray(toy.pairs, float)
    pairs = pairs + pairs.T
    rng, best = np.random.default_rng(1), -np.inf
    for _ in range(restarts):
        b = np.zeros(N)
        b[rng.choice(N, rng.integers(0, LIMIT), replace=False)] = 1
        while True:
            gain = single + pairs @ b
            flip = np.where(b > 0, -gain, gain if b.sum() < LIMIT else -np.inf)
            on, off = np.flatnonzero(b == 0), np.flatnonzero(b > 0)
            swap = gain[on][:, None] - gain[off][None] - pairs[np.ix_(on, off)]
            i = int(np.argmax(flip))
            top = swap.max(initial=-np.inf)
            if max(flip[i], top) <= 1e-9:
                break
            if flip[i] >= top:
                b[i] = 1 - b[i]
            else:
                j, k = np.unravel_index(int(np.argmax(swap)), swap.shape)
                b[on[j]], b[off[k]] = 1, 0
        best = max(best, float(single @ b + 0.5 * b @ pairs @ b))
    return best


def at_budgets(fitness: np.ndarray, true: np.ndarray) -> list[float]:
    """True value of the best observed evaluation within each budget (evaluations in order)."""
    return [float(true[np.argmax(fitness[:budget])]) for budget in BUDGETS]


def ours(step, population: int, toy: Toy, quantised: bool, seed: int) -> list[float]:
    generations = -(-max(BUDGETS) // population)
    key = jax.random.key(seed)
    operands = toy, jnp.asarray(quantised), jax.random.fold_in(key, 2**31)
    result = run(step, key, SPEC.start(-1.0), generations, operands=operands)
    return at_budgets(result.scores.fitness.ravel(), result.scores.value.ravel())


def pycma(sigma: float, population: int, toy: Toy, quantised: bool, seed: int) -> list[float]:
    rng, fitness, true = np.random.default_rng(seed), [], []
    single, pairs = np.asarray(toy.single, float), np.asarray(toy.pairs, float)
    options = {"popsize": population, "seed": seed + 1, "verbose": -9, "maxfevals": max(BUDGETS)}
    es = cma.CMAEvolutionStrategy(N * [-1.0], sigma, options)
    while len(true) < max(BUDGETS):
        genomes = np.asarray(es.ask())
        for genome in genomes:
            order = np.argsort(-genome)[:LIMIT]
            pruned = np.zeros(N)
            pruned[order[genome[order] > 0]] = 1
            true.append(pruned @ single + pruned @ pairs @ pruned)
            observed = np.floor(true[-1] / STEP) * STEP if quantised else true[-1] + rng.normal()
            fitness.append(observed)
        es.tell(list(genomes), [-f for f in fitness[-population:]])
    return at_budgets(np.asarray(fitness), np.asarray(true))


def main(seeds: int = 10, populations: tuple[int, ...] = (8, 16), out: Path | None = None) -> None:
    """Run everything and print the table.

    Args:
        seeds: runs per row.
        populations: members per generation.
        out: also write the table to this file (Markdown).
    """
    clock = time.perf_counter()
    toy = make_toy()
    best = best_known(toy)
    rows: list[tuple[str, int, np.ndarray]] = []  # values: [variant, seed, budget]
    for population in populations:
        for name, sigma in CONFIGURATIONS:
            strategy = build(name, N, population, sigma)
            step = make_step(strategy, evaluate, -(-max(BUDGETS) // population))
            values = [
                [ours(step, population, toy, v == "quantised", s) for s in range(seeds)] for v in VARIANTS
            ]
            label = name if name == "bit_flip" else f"{name}, sigma0 {sigma:g}"
            rows.append((label, population, np.asarray(values)))
        for sigma in (0.5, 1.0):
            values = [
                [pycma(sigma, population, toy, v == "quantised", s) for s in range(seeds)] for v in VARIANTS
            ]
            rows.append((f"pycma CMA-ES, sigma0 {sigma:g}", population, np.asarray(values)))
    text = table(rows, best, seeds, time.perf_counter() - clock)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")


def table(rows: list[tuple[str, int, np.ndarray]], best: float, seeds: int, seconds: float) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "evosax", "cma", "numpy"))
    columns = [f"{v} {b}" for v in VARIANTS for b in BUDGETS]
    lines = [
        "# Search efficiency on a toy with known truth",
        "",
        "    OPENBLAS_NUM_THREADS=1 JAX_PLATFORMS=cpu python benchmarks/search_efficiency.py --out "
        "benchmarks/results/search_efficiency.md",
        "",
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} CPUs, Python "
        f"{platform.python_version()}, {packages}; one run of {seconds:.0f} s.",
        "",
        f"True value of the mask with the best observed fitness after so many evaluations; mean and standard "
        f"deviation of {seeds} seeds. The plain merge is 0; the best mask known (local search with 200 "
        f"restarts) is {best:.1f}. `noisy`: noise of standard deviation 1; `quantised`: steps of {STEP:g}.",
        "",
        "| strategy | population | " + " | ".join(columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for label, population, values in rows:
        mean, std = values.mean(axis=1).ravel(), values.std(axis=1, ddof=1).ravel()
        cells = [f"{m:.1f} ± {s:.1f}" for m, s in zip(mean, std, strict=True)]
        lines.append(f"| {label} | {population} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Our CMA-ES (evosax, ordinal ranks) divided by pycma's, same run, means over the columns above:",
        "",
    ]
    by_label = {(label, population): values for label, population, values in rows}
    for (label, population), values in by_label.items():
        if label.startswith("cma_es"):
            other = by_label[f"pycma CMA-ES{label.removeprefix('cma_es')}", population]
            ratio = (values.mean(axis=1) / other.mean(axis=1)).ravel()
            lines.append(f"- {label}, population {population}: " + ", ".join(f"{r:.2f}" for r in ratio))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    tyro.cli(main)
