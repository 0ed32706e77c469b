"""Import of adapters and export of checkpoints: time and peak memory.

    python benchmarks/import_export.py [--work DIR] [--skip-1b]

Makes its adapters and a random 1.2 B-parameter Llama-shaped model (bfloat16, 2.5 GB, five shards) under
``--work`` and removes what it made. The export is compared with copying the same files, both flushed
to disk, one after the other in this process; medians of the repetitions. Peak memory of the export is
that of a fresh process, less what the same process needs before it exports.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy

from enmp_jax import merges
from enmp_jax.adapters import load_adapters, save_adapter
from enmp_jax.adapters.hf_export import export_checkpoint
from enmp_jax.adapters.recipe import Recipe, versions

VIT_B_32 = {
    f"vision_model.encoder.layers.{{}}.self_attn.{p}_proj": (768, 768) for p in ("q", "k", "v", "out")
}
LLAMA_8B = {
    "model.layers.{}.self_attn.q_proj": (4096, 4096),
    "model.layers.{}.self_attn.v_proj": (1024, 4096),
}
LLAMA_1B = {
    "model.layers.{}.self_attn.q_proj": (2048, 2048),
    "model.layers.{}.self_attn.k_proj": (512, 2048),
    "model.layers.{}.self_attn.v_proj": (512, 2048),
    "model.layers.{}.self_attn.o_proj": (2048, 2048),
}
LAYERS_1B, SHARDS_1B = 16, 5


def make_adapters(
    path: Path, shapes: dict[str, tuple[int, int]], layers: int, count: int, rank: int
) -> dict[str, Path]:
    made = {}
    for i in range(count):
        random = np.random.default_rng(i)
        modules = {
            name.replace("{}", str(layer)): (
                random.standard_normal((rank, n), np.float32) / n**0.5,
                random.standard_normal((m, rank), np.float32) / 100,
            )
            for name, (m, n) in shapes.items()
            for layer in range(layers)
        }
        made[f"task{i}"] = path / f"task{i}"
        save_adapter(made[f"task{i}"], modules, rank, rank, None)
    return made


def make_model(path: Path) -> None:
    """Llama 3.2 1B's shapes: 1.24 B parameters, embeddings tied."""
    path.mkdir(parents=True)
    shapes = {"model.embed_tokens.weight": (128256, 2048), "model.norm.weight": (2048,)}
    for layer in range(LAYERS_1B):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{name.replace('{}', str(layer))}.weight": shape for name, shape in LLAMA_1B.items()}
        shapes |= {prefix + f"mlp.{p}_proj.weight": (8192, 2048) for p in ("gate", "up")}
        shapes[prefix + "mlp.down_proj.weight"] = (2048, 8192)
        shapes |= {prefix + f"{p}_layernorm.weight": (2048,) for p in ("input", "post_attention")}
    random = np.random.default_rng(0)
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(SHARDS_1B)]
    total = sum(int(np.prod(s)) for s in shapes.values())
    done = 0
    for name, shape in shapes.items():
        shards[min(SHARDS_1B - 1, done * SHARDS_1B // total)][name] = shape
        done += int(np.prod(shape))
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{SHARDS_1B:05}.safetensors"
        tensors = {
            name: (random.standard_normal(shape, np.float32) / 50).astype(ml_dtypes.bfloat16)
            for name, shape in names.items()
        }
        safetensors.numpy.save_file(tensors, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps({"model_type": "llama-shaped", "tie_word_embeddings": True}))


def flush(path: Path) -> None:
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
    flush(target)


def timed(function, repeats: int, clean=lambda: None) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
        clean()
    return times


def merged(adapters: dict[str, Path]):
    loaded = load_adapters(adapters)
    merge = merges.make("sum")
    return loaded, merge.merge(merge.prepare(loaded.stack), jnp.ones((LAYERS_1B, len(adapters)), bool), 0.3)


def export_once(work: Path, export: bool) -> None:
    """What the fresh process does whose memory is measured."""
    loaded, deltas = merged({path.name: path for path in sorted((work / "adapters-1b").iterdir())})
    before = peak()
    if export:
        export_checkpoint(work / "out", loaded, deltas, work / "model", Recipe())
    print(json.dumps([before, peak()]))


def peak() -> float:
    """Largest resident memory of this process so far, in MB (getrusage's would include its parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="directory for temporary files (default: the system's)")
    parser.add_argument("--skip-1b", action="store_true", help="imports only")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        export_once(args.child, True)
        return
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        work = Path(name)
        print(f"{os.cpu_count()} cores, {platform.machine()}; {versions()}; load {os.getloadavg()[0]:.1f}\n")
        row("what", "measured", "wanted")
        row("---", "---", "---")
        for label, shapes, layers, count, limit in (
            ("8 rank-16 ViT-B/32 adapters", VIT_B_32, 12, 8, 1),
            ("6 Llama-3-8B-shaped adapters, rank 16, q and v", LLAMA_8B, 32, 6, 3),
        ):
            adapters = make_adapters(work / f"adapters-{layers}", shapes, layers, count, 16)
            size = next(iter(adapters.values())).joinpath("adapter_model.safetensors").stat().st_size / 1e6
            times = timed(lambda adapters=adapters: load_adapters(adapters), 5)
            row(
                f"import of {label} ({size:.1f} MB each), to a LoraStack",
                f"first {times[0]:.2f} s, median {statistics.median(times):.2f} s",
                f"< {limit} s",
            )
        if args.skip_1b:
            return
        make_model(work / "model")
        flush(work / "model")
        adapters = make_adapters(work / "adapters-1b", LLAMA_1B, LAYERS_1B, 4, 16)
        loaded, deltas = merged(adapters)

        def export() -> None:
            export_checkpoint(work / "out", loaded, deltas, work / "model", Recipe())

        copies, exports = [], []
        for _ in range(5):  # alternately, so that other load on the machine meets both
            copies += timed(
                lambda: copy(work / "model", work / "copy"), 1, lambda: shutil.rmtree(work / "copy")
            )
            exports += timed(export, 1, lambda: shutil.rmtree(work / "out"))
        size = sum(f.stat().st_size for f in (work / "model").glob("*.safetensors"))
        largest = max(f.stat().st_size for f in (work / "model").glob("*.safetensors")) / 1e6
        slow, fast = statistics.median(exports), statistics.median(copies)
        row(
            f"checkpoint export, 1.24 B parameters ({size / 1e9:.2f} GB), 4 adapters of rank 16, 64 weights",
            f"{slow:.2f} s; copying the files {fast:.2f} s; ratio {slow / fast:.2f} "
            f"(pairs {', '.join(f'{a / b:.2f}' for a, b in zip(exports, copies))})",
            "ratio < 1.5",
        )
        done = subprocess.run(
            [sys.executable, __file__, "--child", str(work)], check=True, capture_output=True, text=True
        )
        before, after = json.loads(done.stdout.splitlines()[-1])
        row(
            f"peak memory of that export in a fresh process (largest shard {largest:.0f} MB)",
            f"{after:.0f} MB, {before:.0f} MB of it before the export (Python, jax, adapters): "
            f"+{after - before:.0f} MB, {(after - before) / largest:.2f} shards",
            "< 2 shards",
        )


if __name__ == "__main__":
    main()
