"""PEFT LoRA adapters -> ``LoraStack``: exact, or refused with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from enmp_jax.adapters.lora_config import LoraSettings
from enmp_jax.adapters.matching import (
    align,
    check_bases,
    check_product,
    check_shape,
    examples,
    spellings,
    to_backbone,
)
from enmp_jax.adapters.peft_files import CONFIG, WEIGHTS, AdapterHeads, Modules, save_adapter
from enmp_jax.errors import UserError, one_line
from enmp_jax.io.files import is_file, read_json
from enmp_jax.io.hub import locate
from enmp_jax.io.reading import finite, open_tensors, read_float
from enmp_jax.lora import LoraStack, stack_adapters

__all__ = ["Adapter", "LoadedAdapters", "load_adapters", "read_adapter", "save_adapter"]

_UNSAFE = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
_LORA_KEY = re.compile(r"(?P<path>.+?)\.lora_(?P<side>[AB])(?:\.(?P<name>[^.]+))?\.weight")
_SAVED = re.compile(r"\.(?:modules_to_save|original_module)(?:\.[^.]+)?(?=\.(?:[^.]+\.)*[^.]+$)")
_SHARED = re.compile(r"embed|(^|\.)(wte|wpe|shared)(\.|$)|norm", re.IGNORECASE)
_REFUSED_KEYS = {
    "lora_magnitude_vector": "DoRA rescales the whole weight, which is not a low-rank delta",
    "lora_embedding_": ("LoRA on embeddings cannot be merged: train again without them in target_modules"),
    "lora_B.bias": "a bias in LoRA B would be lost by merging: train again with lora_bias false",
    ".base_layer.": "it is a weight of the base model: save the adapter alone",
    "embed_tokens": (
        "embeddings saved with the adapter would be lost by merging: save again with "
        "save_embedding_layers=False if they were not trained, else train again without them"
    ),
}


@dataclass(frozen=True)
class Adapter:
    """One PEFT LoRA adapter.

    Attributes:
        source: directory or hub id, as given.
        directory: where its files are on this machine.
        config: ``adapter_config.json``.
        settings: the same, parsed.
        modules: module path as in the file, without ``base_model.model.`` -> (A [r, in] as stored,
            B [out, r] in float32 with alpha / r, or rsLoRA's alpha / sqrt(r), folded in).
        heads: module path -> parameter name (``weight``, ``bias``) -> array, from ``modules_to_save``.
        base_model: ``base_model_name_or_path``.
        commit: commit of the hub repository; None for a local directory.
    """

    source: str
    directory: Path
    config: Mapping[str, Any]
    settings: LoraSettings
    modules: Modules
    heads: AdapterHeads
    base_model: str | None
    commit: str | None


@dataclass(frozen=True)
class LoadedAdapters:
    """Adapters of several tasks on one base, ready to merge.

    Attributes:
        stack: all LoRA modules, under the backbone's templates (without one: the files' own).
        adapters: task -> the adapter as read.
        heads: task -> the adapter's ``heads``.
        templates: task -> module path in the file -> (template in the stack, layer).
        names: template in the stack -> its spelling in the adapter files.
        base_model: the base all adapters name; None if none does.
    """

    stack: LoraStack
    adapters: Mapping[str, Adapter]
    heads: Mapping[str, AdapterHeads]
    templates: Mapping[str, Mapping[str, tuple[str, int]]]
    names: dict[str, str]
    base_model: str | None


def read_adapter(source: str | Path) -> Adapter:
    """Read a PEFT LoRA adapter from a directory or the hub (``name@revision``).

    Raises:
        UserError: not there, damaged, or something that is not a plain LoRA on linear layers.
    """
    found = locate(source, [CONFIG, WEIGHTS])
    directory = found.directory
    if not is_file(directory / CONFIG):
        raise UserError(f"there is no {CONFIG} in {one_line(found.source)}: {_what_else(directory)}")
    config = read_json(directory / CONFIG)
    settings = LoraSettings.parse(config, f"{directory / CONFIG}")
    if not is_file(directory / WEIGHTS):
        unsafe = next((name for name in _UNSAFE if (directory / name).exists()), None)
        if unsafe:
            raise UserError(
                f"{directory / unsafe} is a pickle, which can run code when loaded: convert it with PEFT, "
                "PeftModel.from_pretrained(base, dir).save_pretrained(new_dir)"
            )
        hint = " (if it has only a .bin file there: convert that with PEFT first)" if found.commit else ""
        raise UserError(f"there is no {WEIGHTS} in {one_line(found.source)}{hint}")
    modules, heads = _read_weights(directory / WEIGHTS, settings)
    return Adapter(
        found.source, directory, config, settings, modules, heads, settings.base_model, found.commit
    )


def load_adapters(
    sources: Mapping[str, str | Path],
    canonical: Callable[[str], str | None] | None = None,
    *,
    n_layers: int | None = None,
    modules: Mapping[str, tuple[int, int]] | None = None,
    base_name: str | None = None,
    allow_base_mismatch: bool = False,
) -> LoadedAdapters:
    """Read the adapters of a merge and stack them.

    Args:
        sources: task -> directory or hub id, in merge order.
        canonical: ``Backbone.canonical``; without it, the files' own names are used, and spellings
            that differ only by a prefix (``vision_model.``) are taken as one.
        n_layers: ``Backbone.n_layers``.
        modules: ``Backbone.modules``, to check names and shapes.
        base_name: the base model in use; adapters that name another one are refused.
        allow_base_mismatch: merge adapters although they name different bases.

    Raises:
        UserError: see ``read_adapter``; different bases; names or shapes that do not fit the base or
            each other.
    """
    if not sources:
        raise UserError("give at least one adapter")
    adapters = {task: read_adapter(source) for task, source in sources.items()}
    base = check_bases({t: a.base_model for t, a in adapters.items()}, base_name, allow_base_mismatch)
    if canonical is None:
        templates = align({task: list(a.modules) for task, a in adapters.items()})
    else:
        templates = {
            task: to_backbone(task, list(a.modules), canonical, modules) for task, a in adapters.items()
        }
    renamed = {}
    for task, adapter in adapters.items():
        pairs: Modules = {}
        for path, (template, layer) in templates[task].items():
            name = template.replace("{}", str(layer))
            if name in pairs:
                raise UserError(f"adapter {task!r} has {name} under two spellings")
            pairs[name] = adapter.modules[path]
            check_product(task, path, *pairs[name])
            if modules is not None:
                check_shape(
                    task,
                    path,
                    (adapter.modules[path][1].shape[0], adapter.modules[path][0].shape[1]),
                    modules[template],
                )
        renamed[task] = pairs
    stack = stack_adapters(renamed, n_layers)
    return LoadedAdapters(
        stack, adapters, {t: a.heads for t, a in adapters.items()}, templates, spellings(templates), base
    )


def _what_else(directory: Path) -> str:
    """What a directory without an adapter is, as far as one can see, and what to give instead."""
    below = [path.parent for path in directory.glob(f"*/{CONFIG}")]
    checkpoints = [path for path in below if re.fullmatch(r"checkpoint-\d+", path.name)]
    if checkpoints:  # as transformers' Trainer leaves them
        newest = max(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")))
        return f"give one of its training checkpoints, the newest is {one_line(newest)}"
    if below:
        return f"it holds adapters in {examples([path.name for path in below])}: give one of these"
    if (directory / "config.json").exists():
        return "it is a whole model, not a LoRA adapter: give it as the base model, or give the adapter"
    return "it is not a PEFT adapter"


def _read_weights(path: Path, settings: LoraSettings) -> tuple[Modules, AdapterHeads]:
    raw: dict[str, dict[str, np.ndarray]] = {}
    heads: AdapterHeads = {}
    names: set[str] = set()
    with open_tensors(path) as handle:
        for key in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            match = _LORA_KEY.fullmatch(key)
            refused = next((reason for part, reason in _REFUSED_KEYS.items() if part in key), None)
            if refused and not (match and ".base_layer." in key):
                raise UserError(f"{path}: {one_line(key)}: {refused}")
            tensor = read_float(handle, key, path)
            if match is None:
                _add_head(heads, key, tensor, settings, path)
                continue
            names.add(match["name"] or "")
            module = _strip(match["path"]).replace(".base_layer", "")
            if not re.search(r"\.\d+(\.|$)", module):
                raise UserError(
                    f"{path}: {one_line(module)} has a LoRA, but is in none of the numbered layers, and only "
                    "those can be merged: train again without it in target_modules"
                )
            if raw.setdefault(module, {}).setdefault(match["side"], tensor) is not tensor:
                raise UserError(f"{path}: lora_{match['side']} of {one_line(module)} is there twice")
    if len(names) > 1:
        raise UserError(
            f"{path} holds several adapters ({one_line(', '.join(sorted(names)))}): save one at a time"
        )
    if not raw:
        raise UserError(f"{path} has no LoRA tensors (keys that end in lora_A.weight and lora_B.weight)")
    return {module: _fold(module, sides, settings, path) for module, sides in sorted(raw.items())}, heads


def _fold(module: str, sides: dict[str, np.ndarray], settings: LoraSettings, path: Path) -> tuple:
    name = f"{path}: {one_line(module)}"
    if len(sides) < 2:
        raise UserError(f"{name} has no lora_{'B' if 'A' in sides else 'A'}: the file is incomplete")
    a, b = sides["A"], sides["B"]
    if a.ndim != 2 or b.ndim != 2:
        kind = "convolution" if max(a.ndim, b.ndim) > 2 else "shape"
        raise UserError(
            f"{name}: LoRA A {a.shape} and B {b.shape}: a {kind} that cannot be merged, only linear layers"
        )
    rank = settings.module_rank(module)
    if a.shape[0] != rank or b.shape[1] != rank or 0 in a.shape or 0 in b.shape:
        raise UserError(
            f"{name}: LoRA A is {a.shape[0]}x{a.shape[1]} and B {b.shape[0]}x{b.shape[1]}, "
            f"but the configuration says rank {rank}"
        )
    if not settings.targets(module):
        raise UserError(f"{name} has a LoRA, but target_modules does not name it: PEFT would ignore it")
    with np.errstate(over="ignore"):
        folded = b.astype(np.float32) * np.float32(settings.scaling(module))
    if not finite(folded):
        raise UserError(f"{name}: B times its scaling {settings.scaling(module):g} overflows float32")
    return a, folded


def _add_head(heads: AdapterHeads, key: str, tensor: np.ndarray, settings: LoraSettings, path: Path) -> None:
    module, _, parameter = _SAVED.sub("", _strip(key)).rpartition(".")
    allowed = settings.modules_to_save
    if settings.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        allowed += ("classifier", "score")  # PEFT adds these by itself
    known = any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", module) for name in allowed)
    if not known or not module:
        raise UserError(
            f"{path}: unknown tensor {one_line(key)}: neither LoRA A or B nor one of modules_to_save"
        )
    if _SHARED.search(module) or re.search(r"\.\d+(\.|$)", module):
        raise UserError(
            f"{path}: modules_to_save has {one_line(module)}, a part of the base model that tasks share: "
            "only heads can be saved with an adapter that is to be merged; train again without it"
        )
    if heads.setdefault(module, {}).setdefault(parameter, tensor) is not tensor:
        raise UserError(f"{path}: {one_line(module)}.{parameter} is there twice")


def _strip(key: str) -> str:
    return key.removeprefix("base_model.model.")
