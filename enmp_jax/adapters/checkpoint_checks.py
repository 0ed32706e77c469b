"""A merged checkpoint against its base and the merge that it claims, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from enmp_jax.adapters.base_changes import planned_changes
from enmp_jax.adapters.checks import Check, check_names, tensor_names
from enmp_jax.adapters.hf_export import tied_copies
from enmp_jax.adapters.matching import examples
from enmp_jax.adapters.peft_import import LoadedAdapters
from enmp_jax.deltas import Deltas
from enmp_jax.io.files import read_json
from enmp_jax.io.hub import locate
from enmp_jax.io.reading import FLOATS, open_tensors
from enmp_jax.io.shard_index import find_shards
from enmp_jax.io.shards import read_header

_ULPS = 1.0
"""Rounding steps of the file's type that a sum in float32 may be off, beside what float32 itself loses."""


def check_checkpoint(directory: Path, loaded: LoadedAdapters, deltas: Deltas, base: str) -> list[Check]:
    """No tensor missing or extra, changed ones equal to base + delta, others as in the base.

    Args:
        directory: the merged checkpoint.
        loaded: the adapters that it claims.
        deltas: the merge that it claims.
        base: directory or hub id of its base model.

    Raises:
        UserError: the base is missing, damaged, or not that of the adapters.
    """
    source = locate(base, ["*.safetensors", "*.json"], "base model", ownerless=True).directory
    config = read_json(source / "config.json")
    entries = {e.name: e for shard in find_shards(source)[0] for e in read_header(source / shard).entries}
    changes = planned_changes(config, entries, loaded, deltas)
    found, held = tensor_names(directory), tensor_names(source)
    wanted = set(entries) - tied_copies(config, entries)
    checks = [check_names("tensors", found, wanted)]
    off: list[str] = []
    same: list[str] = []
    worst = 0.0
    for name in sorted(wanted & set(found)):
        with open_tensors(found[name]) as ours, open_tensors(held[name]) as theirs:
            got, was = ours.get_tensor(name), theirs.get_tensor(name)
        if got.shape != was.shape:
            off.append(name)
        elif name not in changes:
            if not np.array_equal(got, was.astype(got.dtype)):
                off.append(name)
        else:
            if np.array_equal(got, was.astype(got.dtype)):
                same.append(name)
            rows = changes[name].shape[0]
            sum_ = was.astype(np.float32) + changes[name].rows(0, rows).reshape(was.shape)
            step = np.spacing(np.abs(sum_.astype(got.dtype))).astype(np.float32)
            noise = 1e-5 * np.abs(sum_ - was.astype(np.float32)).max()
            steps = float(np.max(np.abs(got.astype(np.float32) - sum_) / (_ULPS * step + noise)))
            worst = max(worst, steps)
            if not steps <= 1:
                off.append(name)
    total = len(wanted & set(found))
    detail = f"{total} tensors, at most {worst:.2g} roundings off" if not off else f"{examples(off)} differ"
    checks.append(Check("weights", not off, detail))
    moved = len(changes) - len(same)
    checks.append(
        Check("not the base", moved > 0, f"{moved} of {len(changes)} adapted weights differ from it")
    )
    return checks


def types(directory: Path) -> list[str]:
    """The floating point types in a checkpoint."""
    shards = find_shards(directory)[0]
    return sorted({e.dtype for s in shards for e in read_header(directory / s).entries if e.dtype in FLOATS})
