"""PEFT LoRA adapters -> ``LoraStack``: exact, or refused with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from enmp_jax.adapters import single_file
from enmp_jax.adapters.base_folding import fold_base
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
from enmp_jax.adapters.peft_weights import read_weights
from enmp_jax.adapters.stored import Storage
from enmp_jax.errors import UserError, one_line
from enmp_jax.io.files import is_file, read_json
from enmp_jax.io.hub import Located, locate
from enmp_jax.lora import LoraStack, stack_adapters
from enmp_jax.module_paths import split_layer

__all__ = ["Adapter", "LoadedAdapters", "load_adapters", "read_adapter", "save_adapter"]

_TORCH = "adapter_model.bin"


@dataclass(frozen=True)
class Adapter:
    """One PEFT LoRA adapter.

    Attributes:
        source: directory or hub id, as given.
        directory: where its files are on this machine.
        config: ``adapter_config.json``.
        settings: the same, parsed.
        modules: module path as in the file, without ``base_model.model.`` -> (A [r, in] as stored,
            B [out, r] in float32 with alpha / r, or rsLoRA's alpha / sqrt(r), folded in). What a base
            model was needed for (DoRA, PiSSA, OLoRA) is folded in too.
        heads: module path -> parameter name (``weight``, ``bias``) -> array, from ``modules_to_save``.
        base_model: ``base_model_name_or_path``.
        commit: commit of the hub repository; None for a local directory.
        stored: module path -> how the base keeps its weight, where it is no linear layer's [out, in].
        file: name of the file of its weights.
    """

    source: str
    directory: Path
    config: Mapping[str, Any]
    settings: LoraSettings
    modules: Modules
    heads: AdapterHeads
    base_model: str | None
    commit: str | None
    stored: Storage = field(default_factory=dict)
    file: str = WEIGHTS


@dataclass(frozen=True)
class LoadedAdapters:
    """Adapters of several tasks on one base, ready to merge.

    Attributes:
        stack: all LoRA modules, under the backbone's templates (without one: the files' own).
        adapters: task -> the adapter as read.
        heads: task -> the adapter's ``heads``.
        paths: task -> module path in the file -> its path in the stack.
        names: name in the stack -> the path of each of its layers, as the adapter files spell it.
        base_model: the base all adapters name; None if none does.
    """

    stack: LoraStack
    adapters: Mapping[str, Adapter]
    heads: Mapping[str, AdapterHeads]
    paths: Mapping[str, Mapping[str, str]]
    names: dict[str, tuple[str, ...]]
    base_model: str | None

    @property
    def spelling(self) -> dict[str, str]:
        """Name in the stack -> the files' own template, where they differ (with a backbone)."""
        found = {name: split_layer(paths[0])[0] for name, paths in self.names.items()}
        return {name: own for name, own in found.items() if self.names[name] != tuple(self.stack.paths(name))}

    @cached_property
    def stored(self) -> Storage:
        """Module path as the files spell it -> how the base keeps its weight (see ``Adapter``)."""
        return {path: kept for adapter in self.adapters.values() for path, kept in adapter.stored.items()}


def read_adapter(source: str | Path, base: str | Path | None = None) -> Adapter:
    """Read a LoRA adapter from a directory or the hub (``name@revision``): PEFT's, diffusers' or kohya's.

    Args:
        source: directory or hub id; of kohya's adapters, the file itself.
        base: base model, for adapters that are no low-rank deltas without it (DoRA, PiSSA, OLoRA).

    Raises:
        UserError: not there, damaged, or something that is no LoRA or needs the base model.
    """
    if single_file.is_one(source):
        return _single(
            Located(Path(source).expanduser().resolve().parent, str(source), None), Path(source).name
        )
    found = locate(source, [CONFIG, WEIGHTS, *single_file.NAMES])
    directory = found.directory
    if not is_file(directory / CONFIG):
        if (name := single_file.find(directory)) is not None:
            return _single(found, name)
        raise UserError(f"there is no {CONFIG} in {one_line(found.source)}: {_what_else(directory)}")
    config = read_json(directory / CONFIG)
    settings = LoraSettings.parse(config, f"{directory / CONFIG}")
    file = WEIGHTS
    if not is_file(directory / WEIGHTS):
        if not (locate(source, [_TORCH]).directory / _TORCH).exists():  # of the hub, only where it is needed
            raise UserError(f"there is no {WEIGHTS} in {one_line(found.source)}")
        file = _TORCH
    weights = read_weights(directory / file, settings)
    modules, stored = weights.modules, weights.stored
    if settings.needs_base or weights.magnitudes:
        modules = fold_base(weights, settings, base, str(directory / CONFIG))
    return Adapter(
        found.source, directory, config, settings, modules, weights.heads, settings.base_model, found.commit,
        stored, file,
    )  # fmt: skip


def one_base(adapters: Mapping[str, Adapter]) -> bool:
    """Whether all adapters name one base model."""
    return None not in (names := {adapter.base_model for adapter in adapters.values()}) and len(names) == 1


def _single(found: Located, name: str) -> Adapter:
    modules, stored, settings = single_file.read(found.directory / name)
    return Adapter(found.source, found.directory, {}, settings, modules, {}, None, found.commit, stored, name)


def load_adapters(
    sources: Mapping[str, str | Path],
    canonical: Callable[[str], str | None] | None = None,
    *,
    n_layers: int | None = None,
    modules: Mapping[str, tuple[int, int]] | None = None,
    base_name: str | None = None,
    allow_base_mismatch: bool = False,
    base: str | Path | None = None,
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
        base: base model, for adapters that need it (see ``read_adapter``).

    Raises:
        UserError: see ``read_adapter``; different bases; names or shapes that do not fit the base or
            each other.
    """
    if not sources:
        raise UserError("give at least one adapter")
    adapters = {task: read_adapter(source, base) for task, source in sources.items()}
    named = check_bases({t: a.base_model for t, a in adapters.items()}, base_name, allow_base_mismatch)
    if canonical is None:
        paths = align({task: list(a.modules) for task, a in adapters.items()}, one_base(adapters))
    else:
        paths = {task: to_backbone(task, list(a.modules), canonical, modules) for task, a in adapters.items()}
    renamed = {}
    for task, adapter in adapters.items():
        pairs: Modules = {}
        for path, name in paths[task].items():
            if name in pairs:
                raise UserError(f"adapter {task!r} has {name} under two spellings")
            a, b = pairs[name] = adapter.modules[path]
            check_product(task, path, a, b)
            if modules is not None:
                check_shape(task, path, (b.shape[0], a.shape[1]), modules[split_layer(name)[0]])
        renamed[task] = pairs
    stack = stack_adapters(renamed, n_layers)
    heads = {t: a.heads for t, a in adapters.items()}
    return LoadedAdapters(stack, adapters, heads, paths, spellings(stack, paths), named)


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
