"""Merged or pruned LoRA factors -> PEFT adapters that load in PEFT, transformers and vLLM.

What all of them keep to: the scaling is folded into B and ``lora_alpha = r`` (vLLM knows one global
alpha / r), no rank or alpha patterns, and ``target_modules`` names every module in full, so that
PEFT adds none of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from enmp_jax.adapters import single_file
from enmp_jax.adapters.checks import (
    VLLM_RANKS,
    Check,
    Parts,
    check_deltas,
    check_not_zero,
    check_vllm,
    parts_of,
)
from enmp_jax.adapters.lora_factors import LoraFactors, delta_parts, lora_factors
from enmp_jax.adapters.matching import check_spelling
from enmp_jax.adapters.model_card import Kind, model_card
from enmp_jax.adapters.peft_files import (
    AdapterHeads,
    Modules,
    adapter_config,
    save_adapter,
    write_adapter_files,
)
from enmp_jax.adapters.peft_import import Adapter, LoadedAdapters, read_adapter
from enmp_jax.adapters.recipe import RECIPE, Recipe, config_yaml, mask_text
from enmp_jax.adapters.stored import Storage
from enmp_jax.deltas import Deltas
from enmp_jax.errors import UserError
from enmp_jax.io.files import is_file_name
from enmp_jax.io.writing import new_directory, write_tensors, write_text
from enmp_jax.masks import Keep

__all__ = ["PeftExport", "export_adapters", "export_peft", "save_adapter", "write_heads"]

TOLERANCE = 0.01
"""Relative error that a merged adapter may have unless told otherwise."""
_HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # PEFT makes modules_to_save of their heads


class PeftExport(NamedTuple):
    """What ``export_peft`` wrote.

    Attributes:
        rank: of the adapter.
        error: Frobenius norm of what truncation lost over that of the merged deltas, 0 when exact.
        line: both in words, to print.
    """

    rank: int
    error: float
    line: str


def export_adapters(out: str | Path, loaded: LoadedAdapters, keep: Keep, recipe: Recipe) -> list[str]:
    """Write one pruned PEFT adapter per task: ``out/TASK``.

    Factors keep their type where scaling and weight can be folded in exactly (powers of two), else they
    are written in float32. A task with nothing left gets one module of zeros, so that PEFT loads it.

    Args:
        out: a new or empty directory.
        loaded: the adapters.
        keep: [layer, task] or [layer, projection, task] in the stack's order; of floats, weights.
        recipe: for the cards and ``enmp_config.yaml``.

    Returns:
        One line per adapter, to print.

    Raises:
        UserError: the directory is in use or cannot be written; a task's name is no file name; a weight
            that makes B overflow.
    """
    lines, notes = [], _weight_notes(recipe)
    with new_directory(out) as directory:
        for i, (task, adapter) in enumerate(loaded.adapters.items()):
            kept = kept_modules(adapter, loaded, task, keep[..., i])
            rank = max(a.shape[0] for a, _ in kept.values())
            folder = directory / _file_name(task)
            folder.mkdir()
            if adapter.config:
                config = _config(kept, rank, [adapter], adapter.base_model, adapter.heads, adapter.stored)
                config["task_type"] = adapter.settings.task_type
                config["modules_to_save"] = (
                    list(adapter.settings.modules_to_save) or config["modules_to_save"]
                )
                write_adapter_files(folder, kept, config, adapter.heads, adapter.stored)
            else:
                single_file.write(folder, kept, adapter.stored)
            checks = _written(folder, parts_of(kept))
            card = model_card(
                "adapters", loaded, recipe, adapter.base_model, task=task, notes=notes, checks=checks
            )
            write_text(folder / "README.md", card)
            lines.append(f"{task}: {len(kept)} of {len(adapter.modules)} modules, rank {rank}")
        write_texts(directory, "adapters", loaded, recipe, notes=notes)
    return lines


def export_peft(
    out: str | Path,
    loaded: LoadedAdapters,
    deltas: Deltas,
    recipe: Recipe,
    rank: int | None = None,
    tolerance: float | None = TOLERANCE,
    *,
    strict: bool = False,
    factors: LoraFactors | None = None,
) -> PeftExport:
    """Write the merged deltas as one PEFT adapter, and the tasks' heads in ``heads/TASK.safetensors``.

    Low-rank deltas are exact at their rank unless ``rank`` is smaller; dense ones are truncated by SVD to
    the smallest rank that meets the tolerance.

    Args:
        out: a new or empty directory.
        loaded: the adapters.
        deltas: merged deltas, scale included, with a leading layer axis.
        recipe: for the card and ``enmp_config.yaml``.
        rank: largest rank, whatever the error.
        tolerance: error (see ``PeftExport``) that dense deltas may have; None: as little as ``rank`` allows.
        strict: refuse to write what misses the tolerance.
        factors: ``lora_factors`` of the same deltas, rank and tolerance, if they are there already.

    Raises:
        UserError: nothing is left to write, NaN or Inf in a delta, the directory cannot be written, what was
            written does not read back as the merge, or, if ``strict``, ``rank`` is too small for the
            tolerance.
    """
    check_spelling(loaded.stack, loaded.names)
    if len({bool(adapter.config) for adapter in loaded.adapters.values()}) > 1:
        raise UserError(
            "some adapters are PEFT's and some are single files of diffusers' or kohya's spelling, and one "
            "adapter is written in one of them: convert some, or use --format delta"
        )
    found = factors or lora_factors(deltas, loaded.names, rank, tolerance)
    if strict and tolerance is not None and found.error > tolerance:
        raise UserError(
            f"at rank {found.rank} the adapter misses the merged deltas by {found.error:.2e} (relative): the "
            f"tolerance is {tolerance:g}; raise the rank or leave it out"
        )
    error = f"relative error {found.error:.2e}" if found.error else "exact"
    fits = next((r for r in VLLM_RANKS if r >= found.rank), None)
    serve = f"vLLM: --max-lora-rank {fits}" if fits else "vLLM serves ranks up to 512: use --rank"
    notes = (
        f"Rank {found.rank}, {error} (Frobenius norm of what truncating the merged deltas lost).",
        f"The scaling is in the weights: lora_alpha equals r. {serve}.",
    )
    with new_directory(out) as directory:
        adapters = list(loaded.adapters.values())
        if adapters[0].config:
            config = _config(found.modules, found.rank, adapters, loaded.base_model, None, loaded.stored)
            kinds = {x.settings.task_type for x in adapters}
            if len(kinds) == 1 and not kinds & set(_HEAD_TASKS):
                config["task_type"] = kinds.pop()
            write_adapter_files(directory, found.modules, config, None, loaded.stored)
        elif found.modules:
            single_file.write(directory, found.modules, loaded.stored)
        else:
            raise UserError("no LoRA modules are left to write: every module was pruned")
        write_heads(directory, loaded)
        options = {"rank": rank, "tolerance": None if tolerance == TOLERANCE else tolerance or 0.0}
        checks = _written(directory, delta_parts(deltas, loaded.names), found.error * 1.001)
        error_made = float(f"{found.error:.6g}")
        write_texts(
            directory, "peft", loaded, recipe, notes=notes, checks=checks, error=error_made, **options
        )
    line = f"{len(found.modules)} modules, rank {found.rank}, {error} ({serve})"
    return PeftExport(found.rank, found.error, line)


def _written(directory: Path, wanted: Mapping[str, Parts], tolerance: float = 0.0) -> list[Check]:
    """The cheap checks of an adapter that was just written, read back from the disk.

    Raises:
        UserError: it is not what it should be.
    """
    adapter = read_adapter(directory)
    modules = parts_of(adapter.modules)
    checks = [*check_deltas(modules, wanted, tolerance), *check_vllm(adapter)]
    refuse_failed(checks)
    return [*checks[:2], check_not_zero(modules), *checks[2:]]


def refuse_failed(checks: Sequence[Check]) -> None:
    """Refuse to hand over what fails a check that counts.

    Raises:
        UserError: the first that failed.
    """
    for check in checks:
        if check.counts and not check.ok:
            raise UserError(f"what was written is not the merge: {check.name}: {check.detail}")


def write_heads(directory: Path, loaded: LoadedAdapters) -> None:
    """Write ``heads/TASK.safetensors`` with ``weight`` and ``bias`` (full names if there are several).

    Raises:
        UserError: a task's name is no file name, or a file cannot be written.
    """
    for task, heads in loaded.heads.items():
        if heads:
            folder = directory / "heads"
            folder.mkdir(exist_ok=True)
            single = len(heads) == 1
            tensors = {
                name if single else f"{path}.{name}": value
                for path, head in heads.items()
                for name, value in head.items()
            }
            write_tensors(folder / f"{_file_name(task)}.safetensors", tensors, {"format": "pt"})


def _weight_notes(recipe: Recipe) -> tuple[str, ...]:
    if not recipe.between:
        return ()
    method = recipe.merge.get("method")
    here = f" The model that was scored was merged by {method}." if method else ""
    return (
        "B of every module is multiplied by its weight. Only a plain sum (task arithmetic) of these adapters "
        "is the sum under the weights; other methods also look at the size of what they merge, and give "
        f"another model than a merge under the weights of mask.json.{here}",
    )


def kept_modules(adapter: Adapter, loaded: LoadedAdapters, task: str, keep: Keep) -> Modules:
    """The modules of one adapter under its column of a mask or of weights; one of zeros if none is left.

    Raises:
        UserError: a weight that makes B overflow.
    """
    places = loaded.stack.places()
    kept: Modules = {}
    for path, (a, b) in adapter.modules.items():
        row, column = places[loaded.paths[task][path]]
        weight = np.float32(keep[row] if keep.ndim == 1 else keep[row, column])
        if weight:
            with np.errstate(over="ignore"):
                weighted = b if weight == 1 else b * weight
            if not np.isfinite(weighted).all():
                raise UserError(f"{path}: B times its weight {weight:g} overflows float32")
            kept[path] = _same_type(a, weighted)
    if not kept:
        path, (a, b) = next(iter(adapter.modules.items()))
        kept[path] = a[:1], np.zeros_like(b[:, :1])
    return kept


def _same_type(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """B in the type of A if that loses nothing, else both in float32."""
    with np.errstate(over="ignore"):
        narrow = b.astype(a.dtype)
    if np.array_equal(narrow.astype(np.float32), b):
        return a, narrow
    return a.astype(np.float32), b


def _config(
    modules: Modules,
    rank: int,
    adapters: list[Adapter],
    base: str | None,
    heads: AdapterHeads | None,
    stored: Storage,
) -> dict[str, Any]:
    config = adapter_config(modules, rank, rank, base, heads=heads, stored=stored)
    transposed = {adapter.settings.fan_in_fan_out for adapter in adapters}
    if len(transposed) > 1:
        raise UserError("some adapters have fan_in_fan_out and some have not: their bases differ")
    return config | {"fan_in_fan_out": transposed.pop()}


def write_texts(
    directory: Path,
    kind: Kind,
    loaded: LoadedAdapters,
    recipe: Recipe,
    notes: Sequence[str] = (),
    checks: Sequence[Check] = (),
    error: float | None = None,
    **options: Any,
) -> None:
    """Write the model card, ``enmp_config.yaml`` and, where there are weights, ``mask.json``.

    Arguments as in ``model_card``.
    """
    base = loaded.base_model
    card = model_card(kind, loaded, recipe, base, notes=notes, checks=checks, **options)
    write_text(directory / "README.md", card)
    write_text(directory / RECIPE, config_yaml(kind, loaded, recipe, base, error, **options))
    if recipe.weights:
        write_text(directory / "mask.json", mask_text(loaded, recipe))


def _file_name(task: str) -> str:
    if not is_file_name(task):
        raise UserError(f"the task name {task!r} cannot be a file name: choose another")
    return task
