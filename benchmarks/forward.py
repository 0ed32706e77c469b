# pyright: reportArgumentType=false
"""Forward passes on the CPU against transformers on torch: images/s and tokens/s, one run, interleaved.

``python benchmarks/forward.py [--repeats 7] [--threads 2] [--only vit-b-32] [--batch 8]`` prints the table of
benchmarks/results/forward.md. Both sides get the same batch; ``lora`` is the unmerged forward with a
rank-16 LoRA on the four attention projections (PEFT attached there, deltas here).
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import platform
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from enmp_jax import models
from enmp_jax.deltas import LowRank

RANK = 16


class Case(NamedTuple):
    """``units`` of work (images or tokens) per batch; ``run`` is torch's forward on ``inputs``."""

    config: dict[str, Any]
    model: Callable[[], Any]
    inputs: dict[str, np.ndarray]
    run: Callable[[Any, torch.dtype], torch.Tensor]
    units: int
    unit: str
    targets: list[str]


def vit_b_32(batch: int = 8) -> Case:
    image = np.random.RandomState(0).randint(0, 256, (batch, 224, 224, 3)).astype(np.uint8)
    # the pixels are normalised once here, but in every forward on our side, which takes uint8
    pixels = ((torch.tensor(image).float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).contiguous()

    def run(model: Any, dtype: torch.dtype) -> torch.Tensor:
        return model(pixels.to(dtype)).last_hidden_state[:, 0]

    config = hf.ViTConfig(patch_size=32)
    return Case(
        {"model_type": "vit", "patch_size": 32},
        lambda: hf.ViTModel(config, add_pooling_layer=False),
        {"image": image},
        run,
        batch,
        "images/s",
        ["q_proj", "k_proj", "v_proj", "o_proj"],
    )


def minilm(batch: int = 8, length: int = 128) -> Case:
    random = np.random.RandomState(0)
    ids = random.randint(1000, 30000, (batch, length)).astype(np.int32)
    mask = (np.arange(length) < random.randint(length // 2, length + 1, (batch, 1))).astype(np.int32)
    x = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask).long()}

    def run(model: Any, dtype: torch.dtype) -> torch.Tensor:
        hidden, weight = model(**x).last_hidden_state, x["attention_mask"][..., None].to(dtype)
        return (hidden * weight).sum(1) / weight.sum(1)

    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
    return Case(
        {"model_type": "bert", "pooling": "mean", **sizes},
        lambda: hf.BertModel(hf.BertConfig(**sizes), add_pooling_layer=False),
        {"input_ids": ids, "attention_mask": mask},
        run,
        batch * length,
        "tokens/s",
        ["query", "key", "value", "attention.output.dense"],
    )


CASES = {"vit-b-32": vit_b_32, "minilm-6": minilm}


def ours(case: Case, dtype: str, lora: bool) -> Callable[[], Any]:
    backbone = models.build(case.config, dtype)
    params = jax.jit(backbone.init)(jax.random.key(0))
    deltas = None
    if lora:
        shape = backbone.n_layers
        names = [name for name in backbone.modules if name.endswith(tuple(case.targets))]
        assert len(names) == 4, names
        random = np.random.RandomState(0)

        def factor(*size: int) -> jax.Array:
            return jnp.asarray(random.normal(size=(shape, *size), scale=0.01), dtype)

        deltas = {
            name: LowRank(
                factor(backbone.modules[name][0], RANK),
                factor(RANK, RANK),
                factor(RANK, backbone.modules[name][1]),
            )
            for name in names
        }
    inputs = {name: jnp.asarray(value) for name, value in case.inputs.items()}
    run = jax.jit(backbone.features)
    return lambda: jax.block_until_ready(run(params, inputs, deltas))


def theirs(case: Case, dtype: str, lora: bool) -> Callable[[], Any]:
    torch.manual_seed(0)
    model = case.model()
    if lora:
        config = LoraConfig(r=RANK, target_modules=case.targets, init_lora_weights=False)
        model = get_peft_model(model, config)
    kind = getattr(torch, dtype)
    model = model.to(kind).eval()
    return lambda: case.run(model, kind)


def measure(
    run: Callable[[], Any], other: Callable[[], Any], repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of both, alternating, so that what else runs on the machine meets both."""
    run()
    other()
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(repeats):
        order = (0, 1) if i % 2 else (1, 0)
        for side in order:
            start = time.perf_counter()
            (run, other)[side]()
            times[side].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=list(CASES))
    parser.add_argument("--batch", type=int, default=8, help="images or texts")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({platform.machine()}), load "
        f"{os.getloadavg()[0]:.1f}, python {platform.python_version()}, jax {jax.__version__}, "
        f"torch {torch.__version__}, transformers {hf.__version__}, batch {args.batch}, "
        f"medians of {args.repeats}\n"
    )
    print("| model | dtype | forward | unit | enmp-jax | torch | ratio of medians | best against best |")
    print("|---|---|---|---|---|---|---|---|")
    for name in [args.only] if args.only else CASES:
        for dtype in ("float32", "bfloat16"):
            for lora in (False, True):
                case = CASES[name](args.batch)
                with torch.inference_mode():
                    a, b = measure(ours(case, dtype, lora), theirs(case, dtype, lora), args.repeats)
                print(
                    f"| {name} | {dtype} | {'lora' if lora else 'base'} | {case.unit} "
                    f"| {case.units / median(a):.1f} | {case.units / median(b):.1f} "
                    f"| {median(b) / median(a):.2f} | {min(b) / min(a):.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
