"""Merged deltas -> one LoRA adapter for llama.cpp, as its ``convert_lora_to_gguf.py`` writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from enmp_jax import models
from enmp_jax.adapters.lora_factors import lora_factors
from enmp_jax.adapters.matching import examples
from enmp_jax.adapters.peft_export import TOLERANCE, write_texts
from enmp_jax.adapters.peft_files import Modules
from enmp_jax.adapters.peft_import import LoadedAdapters
from enmp_jax.adapters.recipe import Recipe, public_name
from enmp_jax.deltas import Deltas
from enmp_jax.errors import UserError
from enmp_jax.io.gguf import GgufFile, library
from enmp_jax.io.writing import new_directory, write_file
from enmp_jax.models import checkpoint, gguf
from enmp_jax.module_paths import split_layer

FILE = "adapter.gguf"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def export_gguf(
    out: str | Path,
    loaded: LoadedAdapters,
    deltas: Deltas,
    base: str | Path,
    recipe: Recipe,
    rank: int | None = None,
    tolerance: float | None = TOLERANCE,
    *,
    dtype: str | None = None,
    strict: bool = False,
) -> tuple[float, str]:
    """Write the merged deltas as ``adapter.gguf``, for ``llama-server --lora``.

    llama.cpp multiplies every B A by alpha / its own rank; here that factor is 1, or in B where a module's
    rank is smaller than the adapter's. Rows of q and k are permuted as it keeps them (``models.gguf``).

    Args:
        out: a new or empty directory.
        loaded: the adapters.
        deltas: merged deltas, scale included, with a leading layer axis.
        base: directory, hub id or GGUF file of the base model: names and heads are its own.
        recipe: for the card and ``enmp_config.yaml``.
        rank: largest rank, whatever the error.
        tolerance: as in ``export_peft``.
        dtype: of the factors; None: float32.
        strict: refuse to write what misses the tolerance.

    Returns:
        The relative error of truncation, and a line to print.

    Raises:
        UserError: as ``export_peft``; the gguf package is missing; a base of another family than
            llama.cpp's llama, qwen2 and qwen3, or without the adapted modules.
    """
    library()  # what is missing is said before long work
    config = checkpoint.read_config(checkpoint.find(base))
    architecture = {"mistral": "llama"}.get(str(config.get("model_type")), config.get("model_type"))
    if architecture not in gguf.ARCHITECTURES:
        known = ", ".join(("mistral", *gguf.ARCHITECTURES))
        raise UserError(f"--format gguf: the base model is a {architecture}; known are {known}")
    found = lora_factors(deltas, loaded.names, rank, tolerance)
    if not found.modules:
        raise UserError("nothing is left to write: all modules are pruned or the merged deltas are zero")
    if strict and tolerance is not None and found.error > tolerance:
        raise UserError(
            f"at rank {found.rank} the adapter misses the merged deltas by {found.error:.2e} (relative): the "
            f"tolerance is {tolerance:g}; raise the rank or leave it out"
        )
    kind = DTYPES[dtype or "float32"]
    tensors = _tensors(found.modules, found.rank, config, kind)
    error = f"relative error {found.error:.2e}" if found.error else "exact"
    with new_directory(out) as directory:
        metadata = {"architecture": architecture, "alpha": float(found.rank), "name": public_name(str(base))}
        write_file(directory / FILE, lambda path: _write(path, tensors, metadata))
        _check(directory / FILE, tensors)
        notes = (
            f"Rank {found.rank}, {error} (Frobenius norm of what truncating the merged deltas lost).",
            f"For llama.cpp: `llama-server --model BASE.gguf --lora {FILE}`.",
        )
        options: dict[str, Any] = {"base_model": public_name(str(base)), "rank": rank, "dtype": dtype}
        options["tolerance"] = None if tolerance == TOLERANCE else tolerance or 0.0
        write_texts(
            directory, "gguf", loaded, recipe, notes=notes, error=float(f"{found.error:.6g}"), **options
        )
    return found.error, f"{len(found.modules)} modules, rank {found.rank}, {error}"


def read_gguf(path: Path, config: Mapping[str, Any]) -> Modules:
    """An adapter for llama.cpp as modules again, under the backbone's own names, its scaling in B.

    Args:
        path: the file.
        config: ``config.json`` of its base model.

    Raises:
        UserError: no GGUF file, a base of another family, or tensors of none of its modules.
    """
    file, backbone = GgufFile(path), models.build(config)
    names = {theirs: ours for ours, theirs in gguf.NAMES.items()}
    alpha = float(file.metadata.get("adapter.lora.alpha", 0.0))
    left, modules = set(file.types), {}
    for template in backbone.modules:
        for layer in range(backbone.n_layers):
            name = f"{names[template].replace('{}', str(layer))}.weight.lora_"
            if f"{name}a" not in left or f"{name}b" not in left:
                continue
            left -= {f"{name}a", f"{name}b"}
            a, b = file.read(f"{name}a"), file.read(f"{name}b")
            heads = gguf.permuted_heads(config, template)
            b = b if heads is None else gguf.restore_heads(b, heads)
            modules[template.replace("{}", str(layer))] = a, b * np.float32(alpha / len(a))
    if left:
        raise UserError(f"{path} has {examples(sorted(left))}, which the base model does not have")
    return modules


def _tensors(modules: Modules, rank: int, config: Mapping[str, Any], kind: Any) -> dict[str, np.ndarray]:
    """llama.cpp's names -> A [r, in] and B [out, r] of every module."""
    backbone = models.build(config)
    names = {theirs: ours for ours, theirs in gguf.NAMES.items()}
    tensors: dict[str, np.ndarray] = {}
    for path, (a, b) in modules.items():
        template, layer = split_layer(path)
        known = backbone.canonical(template)
        if known is None or layer is None or layer >= backbone.n_layers:
            raise UserError(f"the base model has no {path}; it has {examples(backbone.modules)}")
        shape = backbone.modules[known]
        if (b.shape[0], a.shape[1]) != tuple(shape):
            raise UserError(
                f"{path} is {b.shape[0]}x{a.shape[1]} in the adapters and {shape[0]}x{shape[1]} in the base "
                "model: it is another base"
            )
        heads = gguf.permuted_heads(config, known)
        b = b if heads is None else gguf.permute_heads(b, heads)
        name = names[known].replace("{}", str(layer))
        with np.errstate(over="ignore"):
            factors = {"a": a.astype(kind), "b": (b * (a.shape[0] / rank)).astype(kind)}
        for which, factor in factors.items():
            if not np.isfinite(factor.astype(np.float32)).all():
                raise UserError(f"{path} overflows {np.dtype(kind).name}: use --dtype float32 or bfloat16")
            tensors[f"{name}.weight.lora_{which}"] = np.ascontiguousarray(factor)
    return tensors


def _write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    package = library()
    writer = package.GGUFWriter(path, metadata["architecture"])
    try:
        writer.add_type(package.GGUFType.ADAPTER)
        writer.add_name("merged LoRA adapter")
        if metadata["name"]:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, metadata["name"])
        writer.add_string(package.Keys.Adapter.TYPE, "lora")
        writer.add_float32(package.Keys.Adapter.LORA_ALPHA, metadata["alpha"])
        for name, value in tensors.items():
            if value.dtype == ml_dtypes.bfloat16:
                bfloat16 = package.GGMLQuantizationType.BF16
                writer.add_tensor(name, value.view(np.uint8), raw_dtype=bfloat16)
            else:
                writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _check(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    file = GgufFile(path)
    same = set(file.types) == set(tensors)
    if not same or any(not np.array_equal(file.read(n), x.astype(np.float32)) for n, x in tensors.items()):
        raise UserError(f"{path} does not read back as written: check the disk")
