"""Model directories in Hugging Face layout: finding, opening and writing their files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from enmp_jax.errors import UserError, reason
from enmp_jax.io import files, reading
from enmp_jax.io.hub import locate
from enmp_jax.io.shard_index import SINGLE, find_shards
from enmp_jax.models import gguf

_DOWNLOADED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
"""Configuration, weights, tokenizers (``*.model``: SentencePiece) and chat templates of models on the hub."""


def find(model: str | Path) -> Path:
    """The directory of a model: a local path, or a hub id (``name`` or ``name@revision``) downloaded.

    A GGUF file gets a directory of its own (see ``models.gguf.unpack``).

    Raises:
        UserError: neither a directory nor a model that the hub has or that is in its local cache.
    """
    if str(model).endswith(".gguf"):
        return gguf.unpack(Path(model).expanduser())
    return locate(model, _DOWNLOADED, "base model", ownerless=True).directory


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model that holds an object.

    Raises:
        UserError: it is missing or not a JSON object.
    """
    if not files.is_file(path):
        raise UserError(f"{path.parent} has no {path.name}: it is not a model in Hugging Face layout")
    return files.read_json(path)


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` and what other files say of the forward pass.

    ``image_mean`` and ``image_std`` come from ``preprocessor_config.json``, ``pooling`` from the files of
    sentence-transformers.
    """
    config = read_json(directory / "config.json")
    if (directory / "1_Pooling" / "config.json").exists():
        pooling = read_json(directory / "1_Pooling" / "config.json")
        config.setdefault("pooling", "mean" if pooling.get("pooling_mode_mean_tokens") else "cls")
    elif (directory / "modules.json").exists():
        config.setdefault("pooling", "mean")
    if (directory / "preprocessor_config.json").exists():
        images = read_json(directory / "preprocessor_config.json")
        for key in ("image_mean", "image_std"):
            if images.get("do_normalize", True) and key in images:
                config[key] = images[key]
            elif not images.get("do_normalize", True):
                config[key] = 0.0 if key == "image_mean" else 1.0
    return config


class Tensors:
    """The tensors of a checkpoint, memory-mapped: name -> slice reader with ``get_shape()``."""

    def __init__(self, slices: Mapping[str, Any]):
        self._slices = slices

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._slices[name].get_shape())

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A tensor, or a part of it, read from the file."""
        shape = self.shape(name)
        if not shape:
            return np.asarray(self._slices[name][...])
        return np.asarray(self._slices[name][index or (slice(None),) * len(shape)])


@contextlib.contextmanager
def open_tensors(directory: Path) -> Iterator[Tensors]:
    """Open a checkpoint: a file, shards with an index, or a GGUF file; headers are read, tensors are not.

    Raises:
        UserError: no weights, a missing shard, or a file that is cut off or is no safetensors file.
    """
    with contextlib.ExitStack() as stack:
        slices: dict[str, Any] = {}
        if (directory / gguf.LINK).exists():
            yield Tensors(dict(gguf.slices(directory, read_config(directory))))
            return
        for shard in find_shards(directory)[0]:
            file = stack.enter_context(reading.open_tensors(directory / shard))
            slices |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        yield Tensors(slices)


def write(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], images: bool = False
) -> None:
    """Write ``config.json`` and ``model.safetensors`` (and the preprocessor's mean and std), then re-read.

    Raises:
        UserError: the directory cannot be written, or the file does not read back as written.
    """
    config = dict(config)
    preprocessor = {key: config.pop(key) for key in ("image_mean", "image_std") if key in config}
    # safetensors writes arrays that are not C-contiguous wrongly (safetensors issue 825)
    # (and ascontiguousarray would make scalars, such as CLIP's logit_scale, one-dimensional)
    tensors = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / f"{SINGLE}.partial"
        save_file(tensors, partial, metadata={"format": "pt"})
        back = load_file(partial)
        if any(not np.array_equal(back[name], value) for name, value in tensors.items()):
            raise UserError(f"{partial} did not read back as written; check the disk")
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if images:
            settings = {
                "do_normalize": True,
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "image_processor_type": "ViTImageProcessor",
                **preprocessor,
            }
            (directory / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        partial.replace(directory / SINGLE)
    except OSError as error:
        raise UserError(f"cannot write the model to {directory}: {reason(error)}") from None


def base_identity(base: str) -> list[Any]:
    """Configuration and weight files of a base model, without reading the weights."""
    directory = find(base)
    weights = []
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob(gguf.LINK)]):
        real = path.resolve()  # in the hub's cache, the name of the real file is the hash of its content
        stat = real.stat()
        weights.append([path.name, real.name, stat.st_size, stat.st_mtime_ns])
    return [read_config(directory), weights]
