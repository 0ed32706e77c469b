"""Merging whole models: peak memory and time of every method.

    python benchmarks/task_vectors.py [--work DIR] [--vocabulary N] [--width N] [--layers N]

Makes a random Llama-shaped base in float32 and three models near it under ``--work`` and removes them. Each
method runs in a fresh process; memory is what its peak adds to what the process needs before it merges.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.numpy

METHODS = ("sum", "ties", "dare", "dare_ties", "tsv", "iso")
TASKS = ("a", "b", "c")
RESULTS = Path(__file__).parent / "results" / "task_vectors.md"


def make(root: Path, vocabulary: int, width: int, layers: int) -> int:
    """Write base and models; bytes of the largest tensor."""
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width)}
    for layer in range(layers):
        for name, shape in (
            ("self_attn.q_proj", (width, width)),
            ("self_attn.o_proj", (width, width)),
            ("mlp.up_proj", (4 * width, width)),
            ("mlp.down_proj", (width, 4 * width)),
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    base = np.random.default_rng(0)
    tensors = {name: 0.02 * base.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for i, folder in enumerate(("base", *TASKS)):
        own = np.random.default_rng(i)
        path = root / folder
        path.mkdir()
        (path / "config.json").write_text("{}")
        near = {
            name: x if folder == "base" else x + 0.002 * own.standard_normal(x.shape, np.float32)
            for name, x in tensors.items()
        }
        safetensors.numpy.save_file(near, path / "model.safetensors")
    return 4 * vocabulary * width


def one(root: Path, method: str) -> None:
    """Merge in this process and print what it took."""
    from enmp_jax.adapters.task_vector_export import export_task_vectors

    models = {task: str(root / task) for task in TASKS}
    Path("/proc/self/clear_refs").write_text("5")  # what was needed to import is no longer the peak
    before = memory("VmRSS")
    start = time.perf_counter()
    export_task_vectors(root / f"out-{method}", str(root / "base"), models, {"method": method}, 1.0)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "bytes": memory("VmHWM") - before}))


def memory(kind: str) -> int:
    """Bytes in memory now (``VmRSS``) or at most (``VmHWM``), as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(kind)).split()[1])


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path)
    parser.add_argument("--vocabulary", type=int, default=64_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--one", nargs=2)
    options = parser.parse_args()
    if options.one:
        one(Path(options.one[0]), options.one[1])
        return
    with tempfile.TemporaryDirectory(dir=options.work) as directory:
        root = Path(directory)
        largest = make(root, options.vocabulary, options.width, options.layers)
        size = (root / "base" / "model.safetensors").stat().st_size
        lines = []
        for method in METHODS:
            command = [sys.executable, __file__, "--one", str(root), method]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            share = found["bytes"] / largest
            lines.append(f"| {method} | {found['seconds']:.0f} | {found['bytes'] / 1e6:.0f} | {share:.2f} |")
            print(lines[-1], flush=True)
    shape = f"vocabulary {options.vocabulary}, width {options.width}, {options.layers} layers"
    text = [
        "# Merging whole models: memory and time", "",
        f"Three models of a random base ({shape}; float32, {size / 1e6:.0f} MB each), by "
        f"`python benchmarks/task_vectors.py` on {platform.machine()}, {time.strftime('%Y-%m-%d')}. "
        f"The largest tensor has {largest / 1e6:.0f} MB. Memory: peak of a fresh process less what it needs "
        "before.", "",
        "| method | seconds | MB | in largest tensors |", "|---|---|---|---|", *lines, "",
    ]  # fmt: skip
    RESULTS.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
