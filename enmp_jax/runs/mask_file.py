"""``mask.json``: a mask by the names of its modules, read back for a stack of adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from enmp_jax import merges
from enmp_jax.adapters.peft_import import LoadedAdapters
from enmp_jax.adapters.recipe import sha256
from enmp_jax.errors import UserError, one_line, reason
from enmp_jax.io.files import is_file
from enmp_jax.lora import LoraStack
from enmp_jax.masks import Keep, MaskSpec


class SavedMask(NamedTuple):
    """What ``mask.json`` says, on the modules of a stack.

    Attributes:
        spec: the modules.
        keep: bool, or float where the file has weights.
        scale: the merge coefficient, if the file has one.
        merge: what the mask was found for, as ``merges.make`` takes it, if the file says.
        adapters: task -> hash of the adapter that it was found for, if the file says.
    """

    spec: MaskSpec
    keep: Keep
    scale: float | None
    merge: dict[str, Any] | None = None
    adapters: Mapping[str, str] | None = None

    def refuse_others(self, path: str | Path, loaded: LoadedAdapters, remedy: str) -> None:
        """Refuse other adapters than those that the mask was found for: it says nothing of them.

        Args:
            path: of the mask.
            loaded: the adapters given.
            remedy: what to do.

        Raises:
            UserError: the first adapter whose hash differs.
        """
        for task, adapter in loaded.adapters.items():
            known = (self.adapters or {}).get(task)
            if known is not None and known != sha256(adapter):
                raise UserError(
                    f"{path} was found for another adapter of task {task!r} than {one_line(adapter.source)} "
                    f"(its weights differ): {remedy}"
                )


def from_json(data: Any, stack: LoraStack) -> SavedMask:
    """Put the content of a ``mask.json`` on a stack of adapters.

    The tasks may come in another order: modules go by name.

    Raises:
        UserError: not a mask, other tasks, another number of layers, a module that the stack lacks, or a
            weight, scale or merge method that cannot be.
    """
    if not isinstance(data, Mapping):
        raise UserError("mask: expected a mapping with the keys granularity, pruned, tasks and layers")
    for key in ("granularity", "pruned", "tasks", "layers"):
        if key not in data:
            raise UserError(f"mask: the key {key!r} is missing; is this a mask.json?")
    if data["granularity"] not in ("layer", "projection"):
        raise UserError(f"mask: granularity {data['granularity']!r} is neither 'layer' nor 'projection'")
    weights = data.get("weights")
    for key, value in (("pruned", data["pruned"]), ("tasks", data["tasks"]), ("weights", weights)):
        if not isinstance(value, list) and (key != "weights" or value is not None):
            raise UserError(f"mask: {key} must be a list")
    for key, form, entries in (("pruned", "", data["pruned"]), ("weights", ", weight", weights or ())):
        if not all(isinstance(entry, list) and entry for entry in entries):
            raise UserError(f"mask: every entry of {key} must be a list like [layer, task{form}]")
    if sorted(map(str, data["tasks"])) != sorted(stack.tasks):
        raise UserError(
            f"the mask is for the tasks {', '.join(map(str, data['tasks']))}, "
            f"but the adapters given are {', '.join(stack.tasks)}"
        )
    # adapters alone do not say how many layers without a LoRA follow: their hashes say whose the mask is
    more = isinstance(data["layers"], int) and data["layers"] > stack.n_layers and data.get("adapters")
    if data["layers"] != stack.n_layers and not more:
        raise UserError(f"the mask is for {data['layers']} layers, but the adapters have {stack.n_layers}")
    scale = data.get("scale")
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if scale is not None and not (number and abs(scale) < float(np.finfo(np.float32).max)):
        raise UserError(f"mask: scale must be a number or null, not {scale!r}")
    spec = MaskSpec.of(stack, data["granularity"], max_pruned=1.0)
    pruned = _respelled(data["pruned"], data, spec)
    if weights is None:
        keep = spec.keep_from_pruned(pruned)
    else:
        keep = spec.keep_from_weights(_respelled(weights, data, spec), pruned)
    merge = _merge(data.get("merge"), data["tasks"], stack)
    adapters = data.get("adapters")
    if adapters is not None and not isinstance(adapters, Mapping):
        raise UserError("mask: adapters must be a mapping from tasks to hashes")
    return SavedMask(spec, keep, None if scale is None else float(scale), merge, adapters)


def _respelled(entries: list[list[Any]], data: Mapping[str, Any], spec: MaskSpec) -> list[list[Any]]:
    """Projections by the names of these adapters, where the mask has those of a backbone."""
    spelling = data.get("spelling")
    if spec.granularity == "layer" or not isinstance(spelling, Mapping):
        return entries
    found = []
    for layer, name, *others in entries:
        own = spelling.get(name) if isinstance(name, str) and name not in spec.projections else None
        # of two spellings of one module, one ends like the other
        same = [p for p in spec.projections if isinstance(own, str) and f".{own}".endswith(f".{p}")]
        found.append([layer, same[0] if len(same) == 1 else own or name, *others])
    return found


def load(path: str | Path, stack: LoraStack) -> SavedMask:
    """Read a ``mask.json`` for a stack of adapters.

    Raises:
        UserError: unreadable file or what ``from_json`` says.
    """
    if not is_file(Path(path)):
        raise UserError(f"cannot read mask {path}: no such file")
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read mask {path}: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from None
    try:
        return from_json(data, stack)
    except UserError as error:
        raise UserError(f"{path}: {one_line(error, 500)}") from None


def _merge(data: Any, tasks: list[str], stack: LoraStack) -> dict[str, Any] | None:
    """The merge section, checked; factors of tasks in the stack's order."""
    if data is None:
        return None
    if not isinstance(data, Mapping) or not isinstance(data.get("method"), str):
        raise UserError("mask: merge must be a mapping with the key method")
    merge = {key: value for key, value in data.items() if value is not None}
    merge["method"] = merge["method"].replace("-", "_")
    space, isotropize = merge.get("space", "full"), merge.get("isotropize", False)
    if not isinstance(space, str) or not isinstance(isotropize, bool):
        raise UserError("mask: merge.space must be a name and merge.isotropize true or false")
    factors = merge.get("task_weights")
    if factors is not None:
        if not isinstance(factors, list) or len(factors) != len(tasks):
            raise UserError("mask: merge.task_weights must be a list of one number for each task")
        by_task = dict(zip(tasks, factors, strict=True))
        merge["task_weights"] = tuple(by_task[task] for task in stack.tasks)
    try:
        merges.make(**merge)
    except UserError as error:
        raise UserError(f"mask: merge: {error}") from None
    return merge
