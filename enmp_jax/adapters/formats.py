"""All that can be written of a merge, by the name of its format: for merges, searches and exports of runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from enmp_jax.adapters.delta_export import write_delta
from enmp_jax.adapters.gguf_export import export_gguf
from enmp_jax.adapters.hf_export import export_checkpoint
from enmp_jax.adapters.lora_factors import LoraFactors
from enmp_jax.adapters.peft_export import TOLERANCE, export_adapters, export_peft
from enmp_jax.adapters.peft_import import LoadedAdapters
from enmp_jax.adapters.recipe import RECIPE, Recipe, config_yaml, mask_text
from enmp_jax.deltas import Deltas
from enmp_jax.errors import UserError
from enmp_jax.io.writing import new_directory, write_text
from enmp_jax.masks import Keep


@dataclass(frozen=True)
class ExportOptions:
    """Settings of the formats; each takes what it knows.

    Attributes:
        rank: peft, gguf: largest rank, whatever the error.
        tolerance: peft, gguf: relative error that dense deltas may have.
        strict: peft, gguf: refuse what misses the tolerance.
        dtype: checkpoint: type of the weights, None: the base's; gguf: of the factors, None: float32.
        base_model: checkpoint, gguf: directory, hub id or GGUF file.
    """

    rank: int | None = None
    tolerance: float = TOLERANCE
    strict: bool = False
    dtype: str | None = None
    base_model: str | None = None


class Merged(NamedTuple):
    """What the writers get.

    Attributes:
        loaded: the adapters.
        keep: mask or weights, in the stack's order.
        deltas: makes the merged deltas; formats that need none do not call it.
        recipe: for cards and ``enmp_config.yaml``.
        factors: of the deltas, if they are there already.
    """

    loaded: LoadedAdapters
    keep: Keep
    deltas: Callable[[], Deltas]
    recipe: Recipe
    factors: LoraFactors | None = None


class Written(NamedTuple):
    """What to tell: lines, and warnings."""

    lines: list[str]
    warnings: Sequence[str] = ()

    @property
    def told(self) -> list[str]:
        """Warnings first."""
        return [*self.warnings, *self.lines]


def write(out: Path, kind: str, merged: Merged, options: ExportOptions) -> Written:
    """Write a format into a new or empty directory: whole, verified, or not at all.

    Raises:
        UserError: what the format cannot hold, or a directory that cannot be written.
    """
    return FORMATS[kind](out, merged, options)


def _delta(out: Path, merged: Merged, options: ExportOptions) -> Written:
    with new_directory(out) as directory:
        loaded = merged.loaded
        file = directory / "delta.safetensors"
        count = write_delta(file, merged.deltas(), loaded.names, stored=loaded.stored)
        write_text(directory / "mask.json", mask_text(loaded, merged.recipe))
        recipe = config_yaml("delta", loaded, merged.recipe, loaded.base_model)
        write_text(directory / RECIPE, recipe)
    return Written([f"{count} matrices in delta.safetensors"])


def _peft(out: Path, merged: Merged, options: ExportOptions) -> Written:
    found = export_peft(
        out, merged.loaded, merged.deltas(), merged.recipe, options.rank, options.tolerance,
        strict=options.strict, factors=merged.factors,
    )  # fmt: skip
    return Written([found.line], _missed(found.error, options))


def _gguf(out: Path, merged: Merged, options: ExportOptions) -> Written:
    error, line = export_gguf(
        out, merged.loaded, merged.deltas(), _base(options, "gguf"), merged.recipe, options.rank,
        options.tolerance, dtype=options.dtype, strict=options.strict,
    )  # fmt: skip
    return Written([line], _missed(error, options))


def _missed(error: float, options: ExportOptions) -> list[str]:
    if error <= options.tolerance:
        return []
    return [
        f"the relative error {error:.2e} is above the tolerance {options.tolerance:g}: raise the rank or "
        "leave it out"
    ]


def _base(options: ExportOptions, kind: str) -> str:
    if options.base_model is None:
        raise UserError(f"the format {kind} needs a base model: --base-model DIR")
    return options.base_model


def _adapters(out: Path, merged: Merged, options: ExportOptions) -> Written:
    return Written(export_adapters(out, merged.loaded, merged.keep, merged.recipe))


def _checkpoint(out: Path, merged: Merged, options: ExportOptions) -> Written:
    base = _base(options, "checkpoint")
    line = export_checkpoint(out, merged.loaded, merged.deltas(), base, merged.recipe, dtype=options.dtype)
    return Written([line])


FORMATS: dict[str, Callable[[Path, Merged, ExportOptions], Written]] = {
    "delta": _delta,
    "peft": _peft,
    "adapters": _adapters,
    "checkpoint": _checkpoint,
    "gguf": _gguf,
}
