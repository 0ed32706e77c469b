"""Seconds per mask of every merge, against the PyTorch reference on the same tensors.

    OPENBLAS_NUM_THREADS=1 python benchmarks/merge_speed.py [--reference DIR] [--population 16]

DIR is a clone of github.com/CaoAnda/ENMP-LoRAMerging; without it only our side is measured. The
reference merges ONE projection of ONE layer and is scaled by their number (its cost is a loop over
them); ours merges the whole shape. Both sides run in this process, in turns (ours, theirs, ours,
theirs), and the best of each counts (``--turns``). ``--growth`` measures ours at 1, 4, 16 and 64 masks and
at a third and two thirds of the layers instead.
"""

from __future__ import annotations

import argparse
import importlib
import os
import resource
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from enmp_jax import merges
from enmp_jax.lora import LoraPair, LoraStack

CASES: list[tuple[str, str, bool, dict[str, Any], dict[str, Any]]] = [
    ("sum", "full", False, {}, {}),
    ("sum", "full", True, {}, {}),
    ("ties", "full", False, {"density": 0.1}, {"topK": 10}),
    (
        "dare_ties",
        "full",
        False,
        {"drop_rate": 0.3, "density": 0.1},
        {"dare_pruning_coeffs": 0.3, "topK": 10},
    ),
    ("tsv", "core", True, {}, {}),
    ("tsv", "full", False, {}, {}),
    ("cart", "full", False, {}, {}),
    ("ties", "knots", False, {"density": 0.1}, {"topK": 10}),
]


def stack_of(layers: int, tasks: int, rank: int, shapes: dict[str, tuple[int, int]]) -> LoraStack:
    rng = np.random.default_rng(0)
    pairs = {}
    for name, (out, inner) in shapes.items():
        a = rng.normal(0, 0.05, (layers, tasks, rank, inner)).astype(np.float32)
        b = rng.normal(0, 0.05, (layers, tasks, out, rank)).astype(np.float32)
        pairs[f"layers.{{}}.{name}"] = LoraPair(jnp.asarray(a), jnp.asarray(b), ((rank,) * tasks,) * layers)
    return LoraStack(pairs, tuple(f"task{i}" for i in range(tasks)))


class Ours:
    """A compiled merge of a population."""

    def __init__(self, stack: LoraStack, case: tuple, population: int):
        method, space, isotropize, hyper, _ = case
        merge = merges.make(method, space, isotropize, **hyper)
        jax.block_until_ready(merge.prepare(stack))
        start = time.perf_counter()
        ingredients = jax.block_until_ready(merge.prepare(stack))
        self.prepare_seconds = time.perf_counter() - start
        keep = np.random.default_rng(1).random((population, stack.n_layers, stack.n_tasks)) > 0.1
        self.population = population
        self.arguments = (ingredients, jnp.asarray(keep), jnp.ones(population))
        self.run = jax.jit(lambda i, k, s: merges.merge_population(merge, i, k, s))
        jax.block_until_ready(self.run(*self.arguments))

    def seconds_per_mask(self) -> float:
        start = time.perf_counter()
        jax.block_until_ready(self.run(*self.arguments))
        return (time.perf_counter() - start) / self.population


def load_reference(path: Path) -> Any:
    for name in ("tqdm", "clip", "einops"):
        try:
            importlib.import_module(name)
        except ImportError:
            stub: Any = types.ModuleType(name)
            stub.tqdm = lambda x, *_, **__: x
            # the one pattern that the reference uses: 'Tr (b c) -> b Tr c'
            stub.rearrange = lambda x, _, b: x.reshape(x.shape[0], b, -1).permute(1, 0, 2)
            sys.modules[name] = stub
    utils: Any = types.ModuleType("utils")
    utils.get_mask_fn = lambda *_: None
    sys.modules["utils"] = utils
    sys.path.insert(0, str(path.resolve()))
    import torch

    torch.set_num_threads(2)
    return importlib.import_module("task_merger")


def theirs(reference: Any, stack: LoraStack, case: tuple) -> float:
    """Seconds for one projection of one layer, times their number."""
    import torch

    method, space, isotropize, _, config = case
    merger = object.__new__(reference.MatrixPerLayerMerger)
    torch.nn.Module.__init__(merger)
    merger.device, merger.lmc = "cpu", False
    config = config | {"merge_method": method.replace("_", "-"), "merge_space": space}
    start = time.perf_counter()
    for pair in list(stack.pairs.values())[:1]:
        a = [torch.from_numpy(np.array(x)) for x in pair.a[0]]
        b = [torch.from_numpy(np.array(x)) for x in pair.b[0]]
        left: Any = None
        right: Any = None
        if space == "core":
            tensors, left, right = merger.get_core_matrices(a, b, "", config, False)
        else:
            tensors = [y @ x for x, y in zip(a, b)]
        if space == "knots":
            left, s, tensors = merger.get_knots_components(tensors)
            left = left @ torch.diag(s)
        merged = merger._merge_tensors(tensors, config, False)
        if space == "knots":
            merged = left @ merged
        if isotropize:
            merged = reference.isotropize_matrix(merged)
        if space == "core":
            merged = left.to(merged.dtype) @ merged @ right.to(merged.dtype)
    return (time.perf_counter() - start) * stack.n_layers * len(stack.pairs)


def growth(stack: LoraStack, case: tuple) -> None:
    """Prints seconds for whole populations, and for parts of the layers at 16 masks."""
    name = f"{case[0]}, {case[1]}{', isotropize' if case[2] else ''}"
    print("| method | layers | masks | s | s/mask |\n|---|---|---|---|---|")
    layers = stack.n_layers
    for n_layers, population in [(layers, n) for n in (1, 4, 16, 64)] + [
        (layers // 3, 16),
        (2 * layers // 3, 16),
    ]:
        pairs = {
            k: LoraPair(p.a[:n_layers], p.b[:n_layers], p.rank[:n_layers]) for k, p in stack.pairs.items()
        }
        measured = Ours(LoraStack(pairs, stack.tasks), case, population)
        best = min(measured.seconds_per_mask() for _ in range(3))
        print(f"| {name} | {n_layers} | {population} | {best * population:.3f} | {best:.4f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--shape", choices=["vit-b-32", "llama-3-8b"], default="vit-b-32")
    parser.add_argument("--only", help="METHOD-SPACE or METHOD-SPACE-iso, to measure one case")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--turns", type=int, default=2, help="of which the best counts")
    arguments = parser.parse_args()
    if arguments.shape == "vit-b-32":
        stack = stack_of(12, 8, 16, {p: (768, 768) for p in ("q_proj", "k_proj", "v_proj", "out_proj")})
    else:
        wide, narrow = (4096, 4096), (1024, 4096)
        shapes: dict[str, tuple[int, int]] = {"q": wide, "k": narrow, "v": narrow, "o": wide}
        stack = stack_of(1, 6, 16, shapes)
    chosen = [
        case
        for case in CASES
        if arguments.only in (None, "-".join(case[:2]), "-".join(case[:2]) + "-iso" * case[2])
    ]
    if arguments.growth:
        for case in chosen:
            growth(stack, case)
        return
    reference: Any = load_reference(arguments.reference) if arguments.reference else None
    os.chdir(tempfile.mkdtemp())  # the reference makes a .cache where it runs
    print("| method | space | iso | prepare s | ours s/mask | reference s/mask | ratio | peak GB |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for case in chosen:
        method, space, isotropize, _, _ = case
        measured = Ours(stack, case, arguments.population)
        seconds = other = np.inf
        for _ in range(arguments.turns):  # in turns, so that both meet the same machine
            seconds = min(seconds, measured.seconds_per_mask())
            if reference:
                other = min(other, theirs(reference, stack, case))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        prepared = measured.prepare_seconds
        del measured
        print(
            f"| {method} | {space} | {'yes' if isotropize else ''} | {prepared:.2f} | {seconds:.4f} "
            f"| {other:.1f} | {other / seconds:.0f} | {peak:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
