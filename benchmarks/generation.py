# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportMissingImports=false
"""One generation, merging and evaluation, against the PyTorch reference in one run on one machine.

    OPENBLAS_NUM_THREADS=1 python benchmarks/generation.py [--reference DIR] [--only knots-ties]
        [--layers 12] [--masks 8] [--images 64] [--reference-masks 1] [--dtypes float32 bfloat16]

CLIP ViT-B/32, 8 tasks x 64 images, rank-16 adapters on the attention projections, 8 masks; random weights
and data. DIR is a clone of github.com/CaoAnda/ENMP-LoRAMerging; its own ``MatrixPerLayerMerger.merge`` and
``evaluate_cliphead`` run there, driven from here with tensors instead of files (modules that it imports and
that are not installed are stubbed: none of them is on this path). The reference takes its masks one after
the other, so ``--reference-masks`` of them may be measured and multiplied: the table says so.

Ours, once for each of ``--dtypes`` (of weights and activations; merging is float32, and so is all of the
reference): merge is the merging of all masks compiled by itself; forward is the rest of the compiled call;
data is the copy of the batches to the device, once per search. The reference: what its merge, its model's
forward and its loader take; rest is everything else. ratio: the reference's total over that of the row.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
from random_problem import random_keep, random_problem, searched_chunk, searched_form

from enmp_jax import merges
from enmp_jax.evaluation.population import make_evaluate


class Case(NamedTuple):
    """A method here and there."""

    space: str
    method: str
    hyper: dict[str, Any]
    reference: dict[str, Any]
    isotropize: bool = False


CASES = {
    "task-arithmetic": Case("full", "sum", {}, {"merge_method": "tv"}),
    "ties": Case("full", "ties", {"density": 0.4}, {"merge_method": "ties", "topK": 40}),
    "iso": Case("full", "iso", {}, {"merge_method": "tv", "isotropize": True}),
    "tsv": Case("full", "tsv", {}, {"merge_method": "tsv"}),
    "cart": Case(
        "full", "cart", {"rank_fraction": 0.04}, {"merge_method": "cart", "cart_pruning_rank": 0.04}
    ),
    "knots-ties": Case("knots", "ties", {"density": 0.4}, {"merge_method": "ties", "topK": 40}),
    "core-tsv-iso": Case("core", "tsv", {}, {"merge_method": "tsv"}, isotropize=True),
}


class Split(NamedTuple):
    """Seconds of a generation."""

    merge: float
    forward: float
    data: float
    rest: float

    @property
    def total(self) -> float:
        return sum(self)


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Whatever the reference imports at the top of a file and is not installed."""

    names = ("clip", "open_clip", "einops", "sklearn", "scipy", "tqdm", "peft", "models", "pandas")

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname.split(".", maxsplit=1)[0] in self.names:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__ = [], spec
        module.tqdm = lambda x, *_, **__: x
        # the one pattern that the reference uses: 'Tr (b c) -> b Tr c'
        module.rearrange = lambda x, _, b: x.reshape(x.shape[0], b, -1).permute(1, 0, 2)
        return module

    def exec_module(self, module: Any) -> None: ...


def best(run: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


def ours(problem: Any, merge: Any, masks: int, tasks: int, repeats: int) -> Split:
    backbone, stack, inputs = problem
    keep, scale = jnp.asarray(random_keep(masks, stack)), jnp.full(masks, 0.3)
    host = jax.tree.map(np.asarray, inputs.batches)
    data = best(lambda: jax.device_put(host), repeats)
    ingredients = inputs.ingredients
    merge = searched_form(backbone, merge, stack, inputs, room=10**9)
    merged = jax.jit(lambda i, k, s: merges.merge_population(merge, i, k, s))
    jax.block_until_ready(merged(ingredients, keep, scale))
    merging = best(lambda: merged(ingredients, keep, scale), repeats)
    chunk = searched_chunk(masks, backbone, inputs)
    call = jax.jit(make_evaluate(backbone, merge, tasks, member_chunk=chunk))
    evaluate = call.lower(inputs, keep, scale).compile()
    total = best(lambda: evaluate(inputs, keep, scale), repeats)
    return Split(merging, total - merging, data, 0.0)


def load_reference(path: Path) -> tuple[Any, Any]:
    for name in Stubs.names:
        try:
            if name != "models":  # the reference's own, which wants files of CLIP
                importlib.import_module(name)
                Stubs.names = tuple(n for n in Stubs.names if n != name)
        except ImportError:
            pass
    sys.meta_path.insert(0, Stubs())
    sys.path.insert(0, str(path.resolve()))
    return importlib.import_module("task_merger"), importlib.import_module("utils")


def theirs(reference: tuple[Any, Any], problem: Any, case: Case, args: Any) -> Split:
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    task_merger, utils = reference
    _, stack, _ = problem
    spent = {"forward": 0.0, "data": 0.0}

    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = CLIPVisionModel(CLIPVisionConfig(patch_size=32, num_hidden_layers=args.layers))

        def forward(self, pixels: Any) -> Any:
            start = time.perf_counter()
            features = self.vision(pixels).pooler_output
            spent["forward"] += time.perf_counter() - start
            return features

    class Loader:
        def __init__(self, batches: list[Any]) -> None:
            self.batches = batches

        def __iter__(self) -> Any:
            iterator = iter(self.batches)
            while True:
                start = time.perf_counter()
                batch = next(iterator, None)
                spent["data"] += time.perf_counter() - start
                if batch is None:
                    return
                yield batch

    torch.manual_seed(0)
    model = Features().eval()
    names = [n for n, _ in model.named_parameters() if ".q_proj.weight" in n]
    prefix = names[0].split("layers.")[0]
    adapters = []
    for i in range(stack.n_tasks):
        state = {}
        for template, pair in stack.pairs.items():
            end = template.split("layers.{}.")[1]
            for layer in range(stack.n_layers):
                at = f"{prefix}layers.{layer}.{end}"
                state[f"{at}.lora_A.weight"] = torch.from_numpy(np.array(pair.a[layer, i]))
                state[f"{at}.lora_B.weight"] = torch.from_numpy(np.array(pair.b[layer, i]))
        adapters.append(state)

    class Handler(importlib.import_module("ft_handlers").LoRAHandler):
        def get_ft_parameters(self, device: str = "cpu") -> Any:  # there the default is cuda
            return super().get_ft_parameters(device)

    class Merger(task_merger.MatrixPerLayerMerger):
        def get_core_matrices(self, *arguments: Any) -> Any:  # it mixes float32 and float64 in one product
            cores, left, right = super().get_core_matrices(*arguments)
            return cores, left.float(), right.float()

    config = {
        "merge_space": case.space, "scaling_coeffs": 0.3, "isotropize": case.isotropize,
        "ingredients_path": None,
    } | case.reference  # fmt: skip
    heads = [torch.randn(100, 768) for _ in range(stack.n_tasks)]
    loaders = [
        Loader([(torch.randn(args.images, 3, 224, 224), torch.randint(0, 100, (args.images,)))])
        for _ in range(stack.n_tasks)
    ]
    keep = random_keep(args.masks, stack)
    merging = 0.0
    begin = time.perf_counter()
    with torch.no_grad():
        for mask in keep[: args.reference_masks]:
            start = time.perf_counter()
            merger = Merger(
                adapters, pretrained_model=model, param_handler=Handler, device="cpu", merge_config=config
            )
            merger.set_scaling_coeffs(0.3)
            merged = merger.merge(config, torch.from_numpy(~mask).float(), False)
            merging += time.perf_counter() - start
            for head, loader in zip(heads, loaders, strict=True):
                utils.evaluate_cliphead(merged, loader, class_vectors=head, silent=True)
    total = time.perf_counter() - begin
    factor = args.masks / args.reference_masks
    parts = merging, spent["forward"], spent["data"]
    return Split(*(factor * x for x in (*parts, total - sum(parts))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--images", type=int, default=64, help="per task")
    parser.add_argument("--masks", type=int, default=8)
    parser.add_argument("--reference-masks", type=int, help="measured of the reference; default: all")
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"], help="of ours"
    )
    parser.add_argument("--repeats", type=int, default=2, help="of ours, after compilation; the best counts")
    args = parser.parse_args()
    args.reference_masks = min(args.reference_masks or args.masks, args.masks)
    reference = load_reference(args.reference) if args.reference else None
    os.chdir(tempfile.mkdtemp())  # the reference makes a .cache where it runs
    versions = f"python {platform.python_version()}, jax {jax.__version__}"
    if reference:
        import torch

        versions += f", torch {torch.__version__}"
    print(
        f"{time.strftime('%Y-%m-%d')}, {jax.devices()[0].device_kind} ({os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}), {versions}; {args.layers} layers, {args.tasks} tasks x {args.images} "
        f"images, {args.masks} masks (reference: {args.reference_masks} measured), seconds\n"
    )
    print("| method | side | merge | forward | data | rest | total | merging | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.only:
        case = CASES[name]
        merge = merges.make(case.method, case.space, case.isotropize, **case.hyper)
        sides = {}
        for dtype in args.dtypes:
            backbone, _, stack, inputs = random_problem(
                "vit-b-32", merge, layers=args.layers, dtype=dtype,
                tasks=args.tasks, examples=args.images, batch_size=64,
            )  # fmt: skip
            problem = backbone, stack, inputs
            sides[f"enmp-jax {dtype}"] = ours(problem, merge, args.masks, args.tasks, args.repeats)
        if reference:
            sides["reference float32"] = theirs(reference, problem, case, args)
        for side, split in sides.items():
            parts = " | ".join(f"{x:.2f}" for x in (*split, split.total))
            share = f"{100 * split.merge / split.total:.0f} %"
            ratio = f"{sides['reference float32'].total / split.total:.1f}" if reference else "-"
            print(f"| {name} | {side} | {parts} | {share} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
