"""``mask.json``: a mask by the names of its modules, read back for a stack of adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from enmp_jax.errors import UserError
from enmp_jax.lora import LoraStack
from enmp_jax.masks import MaskSpec


class SavedMask(NamedTuple):
    """What ``mask.json`` says, on the modules of a stack."""

    spec: MaskSpec
    keep: Bool[np.ndarray, "*module"]
    scale: float | None


def from_json(data: Any, stack: LoraStack) -> SavedMask:
    """Put the content of a ``mask.json`` on a stack of adapters.

    The tasks may come in another order: modules go by name.

    Raises:
        UserError: not a mask, other tasks, another number of layers, or a module that the stack lacks.
    """
    if not isinstance(data, Mapping):
        raise UserError("mask: expected a mapping with the keys granularity, pruned, tasks and layers")
    for key in ("granularity", "pruned", "tasks", "layers"):
        if key not in data:
            raise UserError(f"mask: the key {key!r} is missing; is this a mask.json?")
    if data["granularity"] not in ("layer", "projection"):
        raise UserError(f"mask: granularity {data['granularity']!r} is neither 'layer' nor 'projection'")
    for key in ("pruned", "tasks"):
        if not isinstance(data[key], list):
            raise UserError(f"mask: {key} must be a list")
    if any(not isinstance(module, list) for module in data["pruned"]):
        raise UserError("mask: every entry of pruned must be a list like [layer, task]")
    if sorted(map(str, data["tasks"])) != sorted(stack.tasks):
        raise UserError(
            f"the mask is for the tasks {', '.join(map(str, data['tasks']))}, "
            f"but the adapters given are {', '.join(stack.tasks)}"
        )
    if data["layers"] != stack.n_layers:
        raise UserError(f"the mask is for {data['layers']} layers, but the adapters have {stack.n_layers}")
    scale = data.get("scale")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise UserError(f"mask: scale must be a number or null, not {scale!r}")
    spec = MaskSpec.of(stack, data["granularity"], max_pruned=1.0)
    keep = spec.keep_from_pruned(data["pruned"])
    return SavedMask(spec, keep, None if scale is None else float(scale))


def load(path: str | Path, stack: LoraStack) -> SavedMask:
    """Read a ``mask.json`` for a stack of adapters.

    Raises:
        UserError: unreadable file or what ``from_json`` says.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read mask {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    try:
        return from_json(data, stack)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
