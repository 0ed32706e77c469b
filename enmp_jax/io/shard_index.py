"""Which safetensors files make a model: one, or shards that an index names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from enmp_jax.errors import UserError, one_line
from enmp_jax.io.files import is_file, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DIFFUSERS = "diffusion_pytorch_model.safetensors"  # a part of a pipeline


def find_shards(directory: Path) -> tuple[list[str], dict[str, Any] | None]:
    """File names of a model's safetensors, and its index if they are several.

    A directory with both a single file and an index means the file, as for transformers.

    Raises:
        UserError: no safetensors, or an index with anything but names of files next to it: it may come
            from anybody, and must not make us read (or an export write) elsewhere.
    """
    for name in (SINGLE, _DIFFUSERS):
        if is_file(directory / name):
            return [name], None
    path = directory / INDEX
    if not is_file(path):
        raise UserError(
            f"{directory} has no {SINGLE} and no {INDEX}; pickled .bin weights are not read: convert "
            "them, or name the hub's revision that has safetensors (often name@refs/pr/N)"
        )
    index = read_json(path)
    shard_of = index.get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise UserError(f"{path} has no weight_map")
    if not isinstance(index.get("metadata") or {}, dict):
        raise UserError(f"{path}: metadata must be an object")
    names = sorted(set(map(str, shard_of.values())))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or "\\" in name or "\0" in name:
            raise UserError(f"{path} names {one_line(name)!r}, which is no file next to it")
    missing = [name for name in names if not is_file(directory / name)]
    if missing:
        raise UserError(f"{directory} lacks the shards {one_line(', '.join(missing))} that its index names")
    return names, index
