"""Base model + merged deltas -> a model in Hugging Face layout, one tensor at a time."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from enmp_jax.adapters.base_names import backbone_of, match
from enmp_jax.adapters.checks import Check, Parts, check_names, tensor_names
from enmp_jax.adapters.lora_factors import one_layer
from enmp_jax.adapters.peft_export import refuse_failed, write_heads, write_texts
from enmp_jax.adapters.peft_import import LoadedAdapters
from enmp_jax.adapters.recipe import Recipe, public_name
from enmp_jax.adapters.stored import Storage, Stored, is_expert, tensor_name
from enmp_jax.deltas import Deltas
from enmp_jax.errors import UserError
from enmp_jax.io.files import read_json
from enmp_jax.io.hub import Located, locate
from enmp_jax.io.reading import FLOATS
from enmp_jax.io.shard_index import INDEX, find_shards
from enmp_jax.io.shards import Change, Entry, FullUpdate, LowRankUpdate, StackedUpdate, read_header, rewrite
from enmp_jax.io.writing import new_directory, write_file, write_text
from enmp_jax.models import checkpoint, gguf

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Everything next to the weights that loading needs; licences travel along.
_COPIED = (
    "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "LICENSE*", "LICENCE*", "NOTICE*",
    "USE_POLICY*", "tokenizer*", "*.spm", "*.bpe",
)  # fmt: skip
_PATTERNS = ["*.safetensors", *_COPIED]
Update = LowRankUpdate | FullUpdate
_TRANSPOSED_EXPERTS = ("gpt_oss", "llama4", "llama4_text")  # [expert, in, out]
_FUSED = (".experts.gate_up_proj", ".experts.down_proj")
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
    if config.get("quantization_config"):
        raise UserError(f"{found.source} is quantised: merge into the model it was made from")
    shards, index = find_shards(found.directory)
    entries = {e.name: e for shard in shards for e in read_header(found.directory / shard).entries}
    changes = planned_changes(config, entries, loaded, deltas)
    omit = tied_copies(config, entries)

    with new_directory(out) as directory:
        kind = DTYPES.get(dtype or "")
        with ThreadPoolExecutor(2) as pool:  # one shard is flushed to disk while the next is copied
            jobs = [
                pool.submit(rewrite, found.directory / shard, directory / shard, changes, kind, omit)
                for shard in shards
            ]
            sizes = {name: size for job in jobs for name, size in job.result().items()}
        if index is not None:
            kept = {name: shard for name, shard in index["weight_map"].items() if name in sizes}
            meta = (index.get("metadata") or {}) | {"total_size": sum(sizes.values())}
            write_text(directory / INDEX, json.dumps({"metadata": meta, "weight_map": kept}, indent=2) + "\n")
        copy_others(found.directory, directory)
        if dtype is not None:
            set_dtype(config, dtype)
            write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")
        write_heads(directory, loaded)
        checks = _written(directory, set(entries) - omit, changes)
        notes = (f"{len(changes)} weights of the base model changed.",)
        options: dict[str, Any] = {"base_model": public_name(found.source), "dtype": dtype}
        write_texts(directory, "checkpoint", loaded, recipe, notes=notes, checks=checks, **options)
    size = sum(sizes.values()) / 1e9
    return f"{len(changes)} weights changed in {len(shards)} file{'s'[: len(shards) > 1]}, {size:.2f} GB"


def planned_changes(
    config: Mapping[str, Any], entries: Mapping[str, Entry], loaded: LoadedAdapters, deltas: Deltas
) -> dict[str, Change]:
    """Name of the base's tensor -> what a merge adds to it.

    Args:
        config: ``config.json`` of the base.
        entries: its tensors.
        loaded: the adapters.
        deltas: of the merge.

    Raises:
        UserError: the base does not have the adapted modules, or in other shapes.
    """
    backbone = backbone_of(config)
    adapted = [
        path
        for name, paths in loaded.names.items()
        for path, ranks in zip(paths, loaded.stack.pairs[name].rank, strict=True)
        if any(ranks)
    ]
    stored = loaded.stored
    _refuse_tied(config, entries, adapted, stored)
    fused = any(name.endswith(_FUSED) for name in entries)
    names = {
        key: name
        for path in adapted
        for key, name in (
            [(path, tensor_name(path, stored))]
            if fused or not is_expert(path, stored)
            else [(f"{path}/{name}", name) for name in _divided(path)]
        )
    }
    where = match(entries, names, backbone and backbone.canonical)
    transposed = _transposed(loaded) if backbone is None else backbone.config.block.transposed
    return _changes(jax.device_get(deltas), loaded, where, entries, _Layout(config, transposed))


class _Layout(NamedTuple):
    """What a base's configuration says of how it keeps its weights."""

    config: Mapping[str, Any]
    transposed: bool

    def oriented(self, change: Update, shape: tuple[int, ...], kind: str) -> Update:
        """A change of the base's tensor, of one that is for its matrix [out, in]."""
        if kind == "embedding":
            return change.T
        if kind == "experts":
            flipped = self.config.get("model_type") in _TRANSPOSED_EXPERTS
        else:
            flipped = self.transposed and kind in ("linear", "transposed")
        if len(shape) == 2 and shape in (change.shape, change.T.shape) and shape[0] != shape[1]:
            flipped = shape != change.shape  # the shape decides, where it can
        return change.T if flipped else change


def _refuse_tied(
    config: Mapping[str, Any], entries: Mapping[str, Entry], adapted: Sequence[str], stored: Storage
) -> None:
    """Refuse to change a weight that embeddings and output share: the adapters change one of them.

    Raises:
        UserError: they do.
    """
    has_output = any(name.endswith("lm_head.weight") for name in entries)
    tied = config.get("tie_word_embeddings")
    architectures = config.get("architectures") or ()
    generates = any("LM" in str(name) or "Generation" in str(name) for name in architectures)
    if tied is False or not (generates if architectures else tied) or (has_output and tied is None):
        return
    for path in adapted:
        embedding = path in stored and stored[path].kind == "embedding"
        if embedding or path.rpartition(".")[2] == "lm_head":
            raise UserError(
                "the base model shares one weight between its embeddings and lm_head, and the adapters "
                f"change {path} alone: use --format peft or adapters, or a base that does not tie them"
            )


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


def _transposed(loaded: LoadedAdapters) -> bool:
    """Whether the base keeps its weights as [in, out], as the adapters say.

    Raises:
        UserError: they do not agree.
    """
    said = {adapter.settings.fan_in_fan_out for adapter in loaded.adapters.values()}
    if len(said) > 1:
        raise UserError("some adapters have fan_in_fan_out and some have not: their bases differ")
    return said.pop()


def _changes(
    deltas: Deltas,
    loaded: LoadedAdapters,
    where: Mapping[str, str],
    entries: Mapping[str, Entry],
    layout: _Layout,
) -> dict[str, Change]:
    """Tensor name -> what is added to it; zero deltas are left out."""
    changes: dict[str, Change] = {}
    experts: dict[str, dict[int, Update]] = {}
    for template, delta in deltas.items():
        present = loaded.stack.pairs[template].present.any(axis=1)
        for layer in np.flatnonzero(present).tolist():
            path, whole = loaded.names[template][layer], one_layer(delta, layer)
            for key, parts in _pieces(path, whole, where).items():
                name = where[key]
                kept = loaded.stored.get(path) if key == path else None
                change = _change(name, entries[name], parts, kept, layout)
                if change is None:
                    continue
                if kept is not None and kept.kind == "experts" and len(entries[name].shape) == 3:
                    experts.setdefault(name, {})[int(path.rpartition(".")[2])] = change
                else:
                    changes[name] = change
    return changes | {name: StackedUpdate(found, entries[name].shape) for name, found in experts.items()}


def _change(name: str, entry: Entry, parts: Parts, kept: Stored | None, layout: _Layout) -> Update | None:
    """What is added to one tensor, or one expert's part of it; None: nothing."""
    if entry.dtype not in FLOATS:
        raise UserError(f"{name} of the base model has type {entry.dtype}: quantised weights cannot change")
    shape = entry.shape
    if kept is not None and kept.kind == "experts" and len(shape) == 3 and shape[0] == kept.shape[0]:
        shape = shape[1:]
    elif kept is not None and kept.kind == "convolution" and shape == kept.shape:
        shape = kept.matrix
    change = FullUpdate(*parts) if len(parts) == 1 else LowRankUpdate(*parts)
    change = layout.oriented(change, shape, "linear" if kept is None else kept.kind)
    if shape != change.shape:
        raise UserError(
            f"{name} is {'x'.join(map(str, entry.shape))} in the base model, but the adapters were "
            f"trained on {'x'.join(map(str, change.shape))}: it is another base"
        )
    if not all(np.isfinite(part).all() for part in parts):
        raise UserError(f"the merged delta of {name} has NaN or Inf in it")
    return change if all(part.any() for part in parts) else None


def _divided(path: str) -> list[str]:
    """The tensors of an expert, of which transformers makes a part of one parameter when it loads them."""
    module, parameter, expert = path.rsplit(".", 2)
    names = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else (parameter,)
    return [f"{module}.{expert}.{name}.weight" for name in names]


def _pieces(path: str, whole: Parts, where: Mapping[str, str]) -> dict[str, Parts]:
    """A module's delta by the keys of its tensors in ``where``, rows divided evenly."""
    if path in where:
        return {path: whole}
    names = _divided(path)
    blocks = np.array_split(whole[0], len(names))
    return {f"{path}/{name}": (block, *whole[1:]) for name, block in zip(names, blocks, strict=True)}


def tied_copies(config: Mapping[str, Any], entries: Mapping[str, Entry]) -> set[str]:
    """Copies of tied weights, which loading fills in (and safetensors files should not hold)."""
    output, embedding = _TIED
    if config.get("tie_word_embeddings") is not True:
        return set()
    tied = any(name == embedding or name.endswith(f".{embedding}") for name in entries)
    return {output} & set(entries) if tied else set()


def copy_others(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer, processor and licence files that are not there yet."""
    for path in sorted({path for pattern in _COPIED for path in source.glob(pattern)}):
        skip = path.name == INDEX or path.name.endswith((".safetensors", ".bin.index.json"))
        if not skip and not (target / path.name).exists() and path.is_file():
            write_file(target / path.name, lambda temporary, path=path: shutil.copyfile(path, temporary))
            if (target / path.name).read_bytes() != path.read_bytes():
                raise UserError(f"{target / path.name} does not read back as written: check the disk")


def set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Say the new type wherever config.json says one (transformers 4: torch_dtype, 5: dtype)."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    for key in keys:
        config[key] = dtype
    for value in config.values():
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
            set_dtype(value, dtype)
