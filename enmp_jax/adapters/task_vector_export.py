"""Whole fine-tuned models of one base -> one checkpoint, tensor by tensor as they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from enmp_jax.adapters.checks import Check, check_names, tensor_names
from enmp_jax.adapters.hf_export import refuse_quantised, rewrite_model, tied_copies
from enmp_jax.adapters.matching import examples
from enmp_jax.adapters.recipe import RECIPE, plain, public_name, versions
from enmp_jax.adapters.task_vectors import MergedTensor, Method
from enmp_jax.errors import UserError, one_line
from enmp_jax.io.files import is_file, read_json
from enmp_jax.io.hub import locate
from enmp_jax.io.reading import FLOATS
from enmp_jax.io.shard_index import find_shards
from enmp_jax.io.shards import Entry, read_header
from enmp_jax.io.tensor_rows import TensorRows
from enmp_jax.io.writing import new_directory, write_text
from enmp_jax.version import __version__

_PATTERNS = ["*.safetensors", "*.json"]


class _Model(NamedTuple):
    """A checkpoint: where it is, and every tensor's file and place."""

    directory: Path
    source: str
    tensors: dict[str, tuple[Path, Entry]]


def is_model(source: str | Path) -> bool:
    """Whether a source is the directory of a whole model, not of an adapter."""
    path = Path(source).expanduser()
    whole = path.is_dir() and is_file(path / "config.json") and not (path / "adapter_config.json").exists()
    return whole and any(path.glob("*.safetensors"))


def export_task_vectors(
    out: str | Path, base: str, models: Mapping[str, str], merge: Mapping[str, Any], scale: float,
    dtype: str | None = None,
) -> list[str]:  # fmt: skip
    """Write base + merged task vectors in the base's own shards.

    Memory: a few pieces of rows; for TSV and Iso also small matrices of one tensor, and the merge of one with
    more columns than rows (``benchmarks/task_vectors.py``).

    Args:
        out: a new or empty directory.
        base: directory or hub id of the base model.
        models: task -> directory or hub id of a model fine-tuned from it.
        merge: as ``merges.make`` takes it.
        scale: merge coefficient.
        dtype: type of the weights; None: the base's.

    Returns:
        Lines to print.

    Raises:
        UserError: a method for adapters only, models of other shapes or without a tensor of the base, or a
            directory that cannot be written.
    """
    method = Method.of(merge, scale, len(models))
    plan = _plan(base, models, method)
    omit = tied_copies(plan.config, {name: entry for name, (_, entry) in plan.base.tensors.items()})
    with new_directory(out) as directory:
        # one tensor at a time: what a merge needs besides its rows is as large as the tensor
        written = rewrite_model(
            plan.base.directory, directory, plan.config, plan.changes, omit, dtype, together=1
        )
        data = {
            "format": "checkpoint",
            "base_model": public_name(plan.base.source),
            "task_vectors": [
                {"name": task, "model": public_name(source), "sha256": _digest(plan.models[task])}
                for task, source in models.items()
            ],
            "merge": {**plain(merge), "scale": scale},
            "options": {} if dtype is None else {"dtype": dtype},
            "versions": versions(),
        }
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        write_text(directory / RECIPE, f"# Written by enmp-jax {__version__}.\n{text}")
    return [*plan.notes, f"{len(plan.changes)} tensors merged {written}"]


def check_task_vectors(
    directory: Path, data: Mapping[str, Any], base: str, models: Mapping[str, str]
) -> list[Check]:
    """A merged checkpoint against the models that it claims, tensor by tensor.

    Args:
        directory: the checkpoint.
        data: its recipe.
        base: directory or hub id of its base.
        models: task -> directory or hub id.

    Raises:
        UserError: models that cannot be found or do not fit.
    """
    merge = dict(data["merge"])
    scale = float(merge.pop("scale"))
    weights = merge.get("task_weights")
    merge |= {} if weights is None else {"task_weights": tuple(weights)}
    plan = _plan(base, models, Method.of(merge, scale, len(models)))
    for entry in data["task_vectors"]:
        task = str(entry["name"])
        if _digest(plan.models[task]) != entry.get("sha256"):
            raise UserError(
                f"{one_line(plan.models[task].source)} is not the model of task {task!r} that was merged "
                f"(its hash differs): --adapter {task}=DIR"
            )
    found = _read(str(directory)).tensors
    omit = tied_copies(plan.config, {name: entry for name, (_, entry) in plan.base.tensors.items()})
    checks = [check_names("tensors", tensor_names(directory), set(plan.base.tensors) - omit)]
    worst, off, moved = 0.0, [], 0
    for name, change in plan.changes.items():
        if name not in found or found[name][1].shape != change.base.entry.shape:
            continue
        ours, kind = TensorRows(*found[name]), FLOATS[found[name][1].dtype]
        step = max(1, 2**20 // change.shape[1])
        for start in range(0, change.shape[0], step):
            stop = min(start + step, change.shape[0])
            delta, plain_rows = change.rows(start, stop), change.base.read(start, stop)
            meant = plain_rows + delta
            noise = np.spacing(np.abs(meant.astype(kind))).astype(np.float32) + 1e-5 * np.abs(delta).max(
                initial=0
            )
            steps = float(
                np.max(np.abs(ours.read(start, stop) - meant) / np.maximum(noise, 1e-30), initial=0)
            )
            worst, moved = max(worst, steps), moved + bool(delta.any())
            if not steps <= 1 and name not in off:
                off.append(name)
    detail = (
        f"{examples(off)} differ"
        if off
        else f"{len(plan.changes)} tensors, at most {worst:.2g} roundings off"
    )
    return [
        *checks,
        Check("weights", not off, detail),
        Check("not the base", moved > 0, "the merge changes it"),
    ]


class _Plan(NamedTuple):
    base: _Model
    config: dict[str, Any]
    models: dict[str, _Model]
    changes: dict[str, MergedTensor]
    notes: list[str]


def _plan(base: str, models: Mapping[str, str], method: Method) -> _Plan:
    """What is added to which tensor, nothing of it read yet."""
    plain_model = _read(base)
    config = read_json(plain_model.directory / "config.json")
    refuse_quantised(config, base)
    found = {task: _read(source) for task, source in models.items()}
    changes, notes = {}, []
    for name, (path, entry) in plain_model.tensors.items():
        if entry.dtype not in FLOATS:
            continue
        rows = {}
        for task, model in found.items():
            if name not in model.tensors:
                raise UserError(f"{one_line(model.source)} has no {one_line(name)}: it is of another base")
            own = TensorRows(*model.tensors[name])
            if own.entry.shape != entry.shape or own.entry.dtype not in FLOATS:
                raise UserError(
                    f"{one_line(name)} is {_size(entry)} in the base model and {_size(own.entry)} in "
                    f"{one_line(model.source)}: only models of the same shapes have a difference"
                )
            rows[task] = own
        matrix = len(entry.shape) == 2 and min(entry.shape) > 1 and "embed" not in name
        changes[name] = MergedTensor(name, TensorRows(path, entry), rows, method, matrix)
    for task, model in found.items():
        if extra := model.tensors.keys() - plain_model.tensors.keys():
            notes.append(
                f"{task}: {len(extra)} tensors are not in the base, left out ({examples(list(extra))})"
            )
    return _Plan(plain_model, config, found, changes, notes)


def _read(source: str) -> _Model:
    found = locate(source, _PATTERNS, "model", ownerless=True)
    tensors = {
        entry.name: (found.directory / shard, entry)
        for shard in find_shards(found.directory)[0]
        for entry in read_header(found.directory / shard).entries
    }
    return _Model(found.directory, source, tensors)


def _digest(model: _Model) -> str:
    """A hash of a model's files that does not read all of it: of their headers and last megabytes."""
    found = hashlib.sha256()
    for path in sorted({path for path, _ in model.tensors.values()}):
        with open(path, "rb") as file:
            size = path.stat().st_size
            found.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            found.update(file.read())
            found.update(str(size).encode())
    return found.hexdigest()


def _size(entry: Entry) -> str:
    return f"{'x'.join(map(str, entry.shape))} {entry.dtype}"
