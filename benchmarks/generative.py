# pyright: reportArgumentType=false
"""Language models on the CPU against transformers on torch, in turns in one process.

``python benchmarks/generative.py [--repeats 5] [--threads 2] [--layers 30] [--batch 8]`` prints the table of
benchmarks/results/generative.md. The model has the shapes of SmolLM2-135M and random weights. Completions:
log-likelihoods of answers (9 tokens after a prompt of 39). Choices: four answers of 3 tokens to a prompt of
100, with the prompt once for all (``packed``) or each sequence whole. Decoding: 32 tokens, greedily.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import platform
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers as hf

from enmp_jax import models
from enmp_jax.data.packing import pack, stack
from enmp_jax.evaluation import decoding
from enmp_jax.models import causal

SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
    "vocab_size": 49152, "rope_theta": 100000.0, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
Run = Callable[[], Any]


def draw(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).randint(5, 49000, shape)


class Ours:
    """``packed``: rows of token lists to be scored; all functions return a call to be timed."""

    def __init__(self, layers: int, dtype: str):
        config = {"model_type": "llama", "num_hidden_layers": layers, **SMOLLM2}
        self.backbone = models.build(config, dtype)
        self.params = jax.jit(self.backbone.init)(jax.random.key(0))

    def score(self, rows: list[tuple[list[int], list[list[int]]]]) -> Run:
        inputs = jax.tree.map(jnp.asarray, stack([pack(*row) for row in rows]))
        run = jax.jit(partial(causal.answer_log_probabilities, self.backbone))
        return lambda: jax.block_until_ready(run(self.params, inputs))

    def decode(self, prompts: np.ndarray, new: int) -> Run:
        run = jax.jit(partial(decoding.generate, self.backbone, max_new_tokens=new, eos=(49151,)))
        tokens, lengths = jnp.asarray(prompts, jnp.int32), jnp.full(len(prompts), prompts.shape[1], jnp.int32)
        return lambda: jax.block_until_ready(run(self.params, None, tokens, lengths))


class Theirs:
    """``kept``: transformers computes the logits of so many last positions; None: of all, as by default."""

    def __init__(self, layers: int, dtype: str):
        config = hf.LlamaConfig(num_hidden_layers=layers, **SMOLLM2)
        self.model = hf.LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()

    def score(self, ids: np.ndarray, answer: int, kept: int | None) -> Run:
        tokens = torch.tensor(ids)
        options = {} if kept is None else {"logits_to_keep": kept}

        def run() -> torch.Tensor:
            logits = self.model(input_ids=tokens, **options).logits[:, -answer - 1 : -1].float()
            return torch.log_softmax(logits, -1).gather(-1, tokens[:, -answer:, None])

        return run

    def decode(self, prompts: np.ndarray, new: int) -> Run:
        tokens = torch.tensor(prompts)
        model: Any = self.model  # transformers' types do not know it
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        return lambda: model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)


def seconds(runs: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Of every run, in turns, so that what else runs on the machine meets all."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats):
        for name in list(runs) if i % 2 else reversed(runs):
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    return times


def tasks(ours: Ours, theirs: Theirs, batch: int) -> dict[str, tuple[int, str, dict[str, Run]]]:
    """Units of work of a batch, their name, and who does it how; the first is ours."""
    text = draw(batch, 48)
    prompts, choices = draw(batch, 100), draw(batch, 4, 3)
    whole = np.concatenate([np.repeat(prompts[:, None], 4, 1), choices], 2)
    flat = whole.reshape(-1, 103)
    split = [(row[:39].tolist(), [row[39:].tolist()]) for row in text]
    return {
        "completions": (batch * 48, "tokens/s", {
            "enmp-jax": ours.score(split),
            "transformers": theirs.score(text, 9, None),
            "transformers, logits_to_keep": theirs.score(text, 9, 10),
        }),
        "choices": (batch, "prompts/s", {
            "enmp-jax, packed": ours.score([(p.tolist(), c.tolist()) for p, c in zip(prompts, choices)]),
            "enmp-jax, whole": ours.score([(row[:100].tolist(), [row[100:].tolist()]) for row in flat]),
            "transformers, whole": theirs.score(flat, 3, 4),
        }),
        "decoding": (batch * 32, "tokens/s", {
            "enmp-jax": ours.decode(text, 32),
            "transformers": theirs.decode(text, 32),
        }),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--only", choices=("completions", "choices", "decoding"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({platform.machine()}), load "
        f"{os.getloadavg()[0]:.1f}, python {platform.python_version()}, jax {jax.__version__}, "
        f"torch {torch.__version__}, transformers {hf.__version__}, {args.layers} layers, batch "
        f"{args.batch}, medians of {args.repeats}\n"
    )
    print("| task | dtype | unit | who | speed | first / this (medians) | (best) |")
    print("|---|---|---|---|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        found = tasks(Ours(args.layers, dtype), Theirs(args.layers, dtype), args.batch)
        for task, (units, unit, runs) in found.items():
            if args.only not in (None, task):
                continue
            with torch.inference_mode():
                times = seconds(runs, args.repeats)
            first = next(iter(times.values()))
            for name, own in times.items():
                ratio, best = median(own) / median(first), min(own) / min(first)
                print(
                    f"| {task} | {dtype} | {unit} | {name} | {units / median(own):.1f} | {ratio:.2f} "
                    f"| {best:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
