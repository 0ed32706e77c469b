"""Base model + merged deltas -> a model in Hugging Face layout, one tensor at a time."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from enmp_jax.adapters.base_changes import planned_changes
from enmp_jax.adapters.checks import Check, check_names, tensor_names
from enmp_jax.adapters.peft_export import refuse_failed, write_heads, write_texts
from enmp_jax.adapters.peft_import import LoadedAdapters
from enmp_jax.adapters.recipe import Recipe, public_name
from enmp_jax.deltas import Deltas
from enmp_jax.errors import UserError
from enmp_jax.io.files import read_json
from enmp_jax.io.hub import Located, locate
from enmp_jax.io.shard_index import INDEX, find_shards
from enmp_jax.io.shards import Change, Entry, read_header, rewrite
from enmp_jax.io.writing import new_directory, write_file, write_text
from enmp_jax.models import checkpoint, gguf

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Everything next to the weights that loading needs; licences travel along.
_COPIED = (
    "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "LICENSE*", "LICENCE*", "NOTICE*",
    "USE_POLICY*", "tokenizer*", "*.spm", "*.bpe",
)  # fmt: skip
_PATTERNS = ["*.safetensors", *_COPIED]
_TIED = ("lm_head.weight", "embed_tokens.weight")  # left out, what it is tied to


def export_checkpoint(
    out: str | Path,
    loaded: LoadedAdapters,
    deltas: Deltas,
    base: str | Path,
    recipe: Recipe,
    *,
    dtype: str | None = None,
) -> str:
    """Write base weights + deltas in the base's own shards, with its configuration and tokenizer.

    Shards are copied tensor by tensor, so memory does not grow with the model. Sums are formed in
    float32 and rounded to the type of the file.

    Args:
        out: a new or empty directory.
        loaded: the adapters.
        deltas: merged deltas, scale included, with a leading layer axis.
        base: directory or hub id of the base model, or a GGUF file, which is dequantised to float32 on disk
            (in TMPDIR) first.
        recipe: for the card and ``enmp_config.yaml``.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None: as in the base.

    Returns:
        A line with the number of weights changed and the size, to print.

    Raises:
        UserError: a base that is damaged, quantised or does not have the adapted modules, or a
            directory that cannot be written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not known: choose one of {', '.join(DTYPES)}")
    if str(base).endswith(".gguf"):
        with tempfile.TemporaryDirectory() as directory:
            gguf.dequantise(checkpoint.find(base), Path(directory))
            return _export(out, loaded, deltas, Located(Path(directory), str(base), None), recipe, dtype)
    found = locate(base, _PATTERNS, "base model", ownerless=True)
    return _export(out, loaded, deltas, found, recipe, dtype)


def _export(
    out: str | Path,
    loaded: LoadedAdapters,
    deltas: Deltas,
    found: Located,
    recipe: Recipe,
    dtype: str | None,
) -> str:
    config = read_json(found.directory / "config.json")
    refuse_quantised(config, found.source)
    shards, _ = find_shards(found.directory)
    entries = {e.name: e for shard in shards for e in read_header(found.directory / shard).entries}
    changes = planned_changes(config, entries, loaded, deltas)
    omit = tied_copies(config, entries)

    with new_directory(out) as directory:
        size = rewrite_model(found.directory, directory, config, changes, omit, dtype)
        write_heads(directory, loaded)
        checks = _written(directory, set(entries) - omit, changes)
        notes = (f"{len(changes)} weights of the base model changed.",)
        options: dict[str, Any] = {"base_model": public_name(found.source), "dtype": dtype}
        write_texts(directory, "checkpoint", loaded, recipe, notes=notes, checks=checks, **options)
    return f"{len(changes)} weights changed {size}"


def rewrite_model(
    source: Path,
    target: Path,
    config: dict[str, Any],
    changes: Mapping[str, Change],
    omit: Collection[str],
    dtype: str | None,
    together: int = 2,
) -> str:
    """Write a model with changed weights: its shards, index, and all that lies beside them.

    Args:
        source: directory of the model.
        target: a new directory.
        config: of the model; says the new type afterwards.
        changes: tensor name -> what is added to it.
        omit: names of tensors to leave out.
        dtype: see ``export_checkpoint``.
        together: shards, and tensors of each, that are worked on at a time.

    Returns:
        Files and size, in words.

    Raises:
        UserError: see ``rewrite``.
    """
    shards, index = find_shards(source)
    kind = DTYPES.get(dtype or "")
    with ThreadPoolExecutor(together) as pool:  # one shard is flushed to disk while the next is copied
        jobs = [
            pool.submit(rewrite, source / shard, target / shard, changes, kind, omit, together)
            for shard in shards
        ]
        sizes = {name: size for job in jobs for name, size in job.result().items()}
    if index is not None:
        kept = {name: shard for name, shard in index["weight_map"].items() if name in sizes}
        meta = (index.get("metadata") or {}) | {"total_size": sum(sizes.values())}
        write_text(target / INDEX, json.dumps({"metadata": meta, "weight_map": kept}, indent=2) + "\n")
    _copy_others(source, target)
    if dtype is not None:
        _set_dtype(config, dtype)
        write_text(target / "config.json", json.dumps(config, indent=2) + "\n")
    return f"in {len(shards)} file{'s'[: len(shards) > 1]}, {sum(sizes.values()) / 1e9:.2f} GB"


def refuse_quantised(config: Mapping[str, Any], source: str) -> None:
    """Weights of a few bits cannot be added to.

    Raises:
        UserError: the model is quantised.
    """
    if config.get("quantization_config"):
        raise UserError(f"{source} is quantised: merge into the model it was made from")


def _written(directory: Path, names: set[str], changes: Mapping[str, object]) -> list[Check]:
    """The cheap checks of a checkpoint; ``rewrite`` has compared every byte with what was meant.

    Raises:
        UserError: a tensor is missing or extra.
    """
    checks = [
        check_names("tensors", tensor_names(directory), names),
        Check("not the base", bool(changes), f"{len(changes)} weights changed", counts=False),
    ]
    refuse_failed(checks)
    return checks


def tied_copies(config: Mapping[str, Any], entries: Mapping[str, Entry]) -> set[str]:
    """Copies of tied weights, which loading fills in (and safetensors files should not hold)."""
    output, embedding = _TIED
    if config.get("tie_word_embeddings") is not True:
        return set()
    tied = any(name == embedding or name.endswith(f".{embedding}") for name in entries)
    return {output} & set(entries) if tied else set()


def _copy_others(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer, processor and licence files that are not there yet."""
    for path in sorted({path for pattern in _COPIED for path in source.glob(pattern)}):
        skip = path.name == INDEX or path.name.endswith((".safetensors", ".bin.index.json"))
        if not skip and not (target / path.name).exists() and path.is_file():
            write_file(target / path.name, lambda temporary, path=path: shutil.copyfile(path, temporary))
            if (target / path.name).read_bytes() != path.read_bytes():
                raise UserError(f"{target / path.name} does not read back as written: check the disk")


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Say the new type wherever config.json says one (transformers 4: torch_dtype, 5: dtype)."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    for key in keys:
        config[key] = dtype
    for value in config.values():
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
            _set_dtype(value, dtype)
