"""The files of a PEFT adapter, and writing one from LoRA factors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from enmp_jax.adapters.lora_encoding import encode
from enmp_jax.adapters.stored import Storage, is_expert, parameter_of
from enmp_jax.errors import UserError
from enmp_jax.io.writing import new_directory, write_tensors, write_text

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Modules = dict[str, tuple[np.ndarray, np.ndarray]]
"""Module path -> (A [r, in], B [out, r])."""
AdapterHeads = dict[str, dict[str, np.ndarray]]
"""Module path -> parameter name (``weight``, ``bias``) -> array."""


def save_adapter(
    path: str | Path,
    modules: Modules,
    rank: int,
    alpha: float,
    base_model_name: str | None,
    *,
    heads: AdapterHeads | None = None,
    target_modules: Sequence[str] | None = None,
    task_type: str | None = None,
) -> None:
    """Write a PEFT adapter: the directory appears complete or not at all, and reads back bit for bit.

    Args:
        path: a new or empty directory.
        modules: module path without ``base_model.model.`` -> (A [r, in], B [out, r]), r <= ``rank``
            (smaller ones are padded with zeros). B is stored as it is: readers multiply by
            ``alpha / rank``. To store a B that has its scaling folded in, pass ``alpha=rank``.
        rank: ``r`` of the configuration.
        alpha: ``lora_alpha`` of the configuration.
        base_model_name: ``base_model_name_or_path``.
        heads: module path -> parameter name -> array; they become ``modules_to_save``.
        target_modules: default: the full name of every module, so that PEFT adds no others.
        task_type: PEFT's, e.g. ``SEQ_CLS``.

    Raises:
        UserError: no modules, or the directory is in use or cannot be written.
    """
    with new_directory(path) as directory:
        write_adapter_files(
            directory,
            modules,
            adapter_config(
                modules, rank, alpha, base_model_name, heads=heads, target_modules=target_modules,
                task_type=task_type,
            ),
            heads,
        )  # fmt: skip


def adapter_config(
    modules: Modules,
    rank: int,
    alpha: float,
    base_model_name: str | None,
    *,
    heads: AdapterHeads | None = None,
    target_modules: Sequence[str] | None = None,
    task_type: str | None = None,
    stored: Storage | None = None,
) -> dict[str, Any]:
    """``adapter_config.json`` of a plain LoRA; arguments as in ``save_adapter``.

    Raises:
        UserError: no modules.
    """
    if not modules:
        raise UserError("no LoRA modules are left to write: every module was pruned")
    plain = [path for path in modules if not is_expert(path, stored or {})]
    parameters = sorted({parameter_of(path) for path in modules.keys() - set(plain)})
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": base_model_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": sorted(heads) if heads else None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "target_modules": sorted(target_modules if target_modules is not None else plain),
        **({"target_parameters": parameters} if parameters else {}),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }


def write_adapter_files(
    directory: Path,
    modules: Modules,
    config: Mapping[str, Any],
    heads: AdapterHeads | None = None,
    stored: Storage | None = None,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into a directory that is there.

    Args:
        directory: an existing directory.
        modules: as in ``save_adapter``; smaller ranks are padded with zeros to the configuration's ``r``.
        config: see ``adapter_config``.
        heads: as in ``save_adapter``.
        stored: module path -> how the base keeps its weight, where it is no linear layer's.

    Raises:
        UserError: factors that do not fit the rank, or files that cannot be written.
    """
    encoded = encode(modules, stored or {}, config["r"])
    tensors = {f"base_model.model.{key}": value for key, value in encoded.items()}
    for path, head in (heads or {}).items():
        for name, value in head.items():
            tensors[f"base_model.model.{path}.{name}"] = np.asarray(value)
    write_tensors(directory / WEIGHTS, tensors, {"format": "pt"})
    write_text(directory / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
