"""Mutated files for ``reliability.py``: each is read or refused in one line, quickly, in little memory."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import tokenizers
import yaml
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from enmp_jax.adapters import load_adapters
from enmp_jax.config import run_file
from enmp_jax.config.sections import DataConfig
from enmp_jax.data import load_examples
from enmp_jax.data.tokenizer import load_tokenizer
from enmp_jax.errors import UserError
from enmp_jax.report.data import read
from enmp_jax.report.limits import drawn
from enmp_jax.runs import mask_file

SECONDS, BYTES = 2.0, 500 * 2**20
WORDS = (b"1e999", b".nan", b"-1", b"99999999999999999999999", b"[[[[[[", b"{", b"}", b"null", b"\x00",
         b"\xff", b"../../x", b"$x$", b"&a [*a]", b"!!python/object:os.system", b"2026-13-45", b"\n", b": ",
         b'"', b"0" * 5000)  # fmt: skip


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut out, repeated or replaced by what parsers find hard."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(5)
        end = min(len(data), at + rng.randint(1, 40))
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:end]
        elif kind == 2:
            data[at:at] = data[at:end] * rng.randint(1, 5)
        elif kind == 3:
            data[at:end] = rng.choice(WORDS)
        else:
            data[at:at] = rng.choice(WORDS)
    return bytes(data)


def _run_files(place: Path) -> tuple[list[Path], Callable[[], Any]]:
    path = place / "run.yaml"
    text = (run_file.SUITES / "demo.yaml").read_text()
    path.write_text(yaml.safe_dump(yaml.safe_load(text)))
    return [path], lambda: run_file.load(path)


def _masks(place: Path) -> tuple[list[Path], Callable[[], Any]]:
    stack = load_adapters({"a": _adapter(place / "a"), "b": _adapter(place / "b")}).stack
    path = place / "mask.json"
    mask = {"granularity": "layer", "pruned": [[0, "a"]], "scale": 0.5, "tasks": ["a", "b"], "layers": 1,
            "merge": {"method": "ties", "space": "full", "density": 0.4}}  # fmt: skip
    path.write_text(json.dumps(mask))
    return [path], lambda: mask_file.load(path, stack)


def _adapter(path: Path) -> Path:
    path.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "rank_pattern": {"q": 2},
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.layers.0.q_proj"
    tensors = {f"{module}.lora_A.weight": np.ones((2, 6), np.float32),
               f"{module}.lora_B.weight": np.ones((4, 2), np.float32)}  # fmt: skip
    safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors")
    return path


def _adapters(place: Path) -> tuple[list[Path], Callable[[], Any]]:
    path = _adapter(place / "a")
    files = [path / "adapter_config.json", path / "adapter_model.safetensors"]
    return files, lambda: load_adapters({"a": path})


def _run_directories(place: Path) -> tuple[list[Path], Callable[[], Any]]:
    column = {"a": 0.5, "b": 0.25}
    scores = {"split": "test", "tasks": ["a", "b"], "reference": column, "merged": column, "enmp": column,
              "mean_normalised": {"merged": 0.5, "enmp": 0.5}, "pruned": [[0, "a"]], "seeds": [{"seed": 0}],
              "scale_grid": {"1": 0.5}, "splits": {"test": column}}  # fmt: skip
    line = {"seed": 0, "generation": 0, "masks_evaluated": 4, "best": 0.5, "fitness": [0.5, None, 0.25, 0.1]}
    mask = {"granularity": "layer", "pruned": [[0, "a"]], "tasks": ["a", "b"], "layers": 2, "scale": 1.0}
    texts = {"config.yaml": "tasks: [{name: a}, {name: b}]\nmerge: {method: ties}\n",
             "environment.json": "{}",
             "history.jsonl": (json.dumps(line) + "\n") * 3, "mask.json": json.dumps(mask),
             "scores.json": json.dumps(scores)}  # fmt: skip
    for name, text in texts.items():
        (place / name).write_text(text)
    return [place / name for name in texts], lambda: drawn(read(place))


def _data(config: DataConfig) -> Callable[[], Any]:
    return lambda: load_examples(config, "test", Path("/"), None)


def _npz(place: Path) -> tuple[list[Path], Callable[[], Any]]:
    path = place / "d.npz"
    split = np.asarray(["x", "y"] * 4)
    np.savez(path, image=np.zeros((8, 4, 4), np.uint8), label=np.arange(8) % 2, split=split)
    return [path], _data(DataConfig(f"npz:{path}", test="x"))


def _jsonl(place: Path) -> tuple[list[Path], Callable[[], Any]]:
    path = place / "d.jsonl"
    path.write_text("".join(json.dumps({"text": f"words {i}", "label": i % 2}) + "\n" for i in range(6)))
    return [path], _data(DataConfig(f"jsonl:{path}", test="all", text=("text",)))


def _images(place: Path) -> tuple[list[Path], Callable[[], Any]]:
    files = []
    for i, suffix in enumerate(("png", "jpg", "bmp", "gif")):
        path = place / f"images/{i % 2}/{i}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(path)
        files.append(path)
    return files, _data(DataConfig(f"folder:{place / 'images'}", test="all"))


def _tokenizers(place: Path) -> tuple[list[Path], Callable[[], Any]]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={c: i for i, c in enumerate(["<s>", *letters])}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(place)
    return [place / "tokenizer.json", place / "tokenizer_config.json"], lambda: load_tokenizer(place)


def _tfds(place: Path) -> tuple[list[Path], Callable[[], Any]]:
    """The smallest set of ``TFDS_DATA_DIR``."""
    root = Path(os.environ["TFDS_DATA_DIR"])
    sizes = {path.parent: sum(f.stat().st_size for f in path.parent.iterdir())
             for path in root.glob("*/*/dataset_info.json")}  # fmt: skip
    smallest = min(sizes, key=lambda path: sizes[path])
    copy = place / smallest.relative_to(root)
    shutil.copytree(smallest, copy)
    split = json.loads((copy / "dataset_info.json").read_text())["splits"][0]["name"]
    config = DataConfig(f"tfds:{copy.parent.name}", test=f"{split}[:4]", data_dir=str(place))
    return sorted(p for p in copy.iterdir() if p.is_file()), _data(config)


FUZZ: dict[str, tuple[int, Callable[[Path], tuple[list[Path], Callable[[], Any]]]]] = {
    "run_files": (2000, _run_files), "masks": (1500, _masks), "adapters": (2500, _adapters),
    "run_directories": (1500, _run_directories), "npz_files": (1000, _npz), "jsonl_files": (1000, _jsonl),
    "images": (500, _images), "tokenizers": (500, _tokenizers), "tfds": (500, _tfds),
}  # fmt: skip
"""How many inputs, and what makes their files and reads them."""


def fuzz(name: str, scale: float, scratch: Path) -> tuple[int, int, list[str]]:
    """Inputs tried, inputs that behaved, and the seeds of the others."""
    count, make = FUZZ[name]
    count, notes, slowest = max(10, round(count * scale)), [], 0.0
    place = Path(tempfile.mkdtemp(dir=scratch))
    files, use = make(place)
    originals = {path: path.read_bytes() for path in files}
    use()  # as they are, they are read
    there = {p for p in scratch.rglob("*") if place not in p.parents}
    bad = 0
    for seed in range(count):
        rng = random.Random(seed)
        path = rng.choice(files)
        path.write_bytes(mutate(originals[path], rng))
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
        trouble = ""
        try:
            use()
        except UserError as error:
            trouble = "" if str(error).isprintable() and len(str(error)) < 2000 else f"message {error!r:.200}"
        except Exception as error:
            trouble = f"{type(error).__name__}: {error}"[:200]
        seconds = time.thread_time() - start
        slowest = max(slowest, seconds)
        if seconds > SECONDS:
            trouble = f"{seconds:.1f} s"
        if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 > BYTES:
            trouble = "memory"
        if trouble:
            bad += 1
            notes.append(f"seed {seed}, {path.name}: {trouble}")
        path.write_bytes(originals[path])
    if {p for p in scratch.rglob("*") if place not in p.parents} != there:
        bad, notes = bad + 1, [*notes, "a file outside"]
    shutil.rmtree(place)
    return count, count - bad, [*notes[:20], f"the slowest took {slowest:.2f} s of processor time"]
