"""What is proved about a written adapter or merge: comparisons with what it claims, as a table of ok / not.

Every export runs the cheap ones on what lies on the disk before it takes its name (``enmp verify`` runs
all of them later): users of every merge tool complain of silently wrong files (PEFT #3737 and #3761:
adapters that do not load again or have another scaling; verl #7285: a merged model equal to its base).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from enmp_jax.adapters.lora_factors import layer_factors, squared_norm
from enmp_jax.adapters.matching import examples
from enmp_jax.adapters.peft_files import Modules
from enmp_jax.adapters.peft_import import Adapter
from enmp_jax.io.reading import open_tensors
from enmp_jax.io.shard_index import find_shards

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's ``--max-lora-rank`` can be; an adapter may have any rank up to it."""
ROUNDING = 1e-5
"""Relative error that float32 factors of an exact merge have at most."""

Parts = tuple[np.ndarray, ...]
"""A delta [out, in]: (left [out, k], right [k, in]), or (weight,)."""


class Check(NamedTuple):
    """One line of the table.

    Attributes:
        name: what was looked at.
        ok: the result.
        detail: figures, or what is wrong.
        counts: whether a failure means that the files are wrong (else: that somebody cannot use them).
    """

    name: str
    ok: bool
    detail: str
    counts: bool = True


def passed(checks: Sequence[Check]) -> bool:
    """Whether nothing that counts failed."""
    return all(check.ok for check in checks if check.counts)


def table(checks: Sequence[Check]) -> list[str]:
    """The checks as lines of a terminal."""
    width = max((len(check.name) for check in checks), default=0)
    return [f"{'ok ' if c.ok else 'NOT'}  {c.name:<{width}}  {c.detail}" for c in checks]


def check_names(what: str, found: Collection[str], wanted: Collection[str]) -> Check:
    """Nothing missing, nothing extra."""
    missing, extra = set(wanted) - set(found), set(found) - set(wanted)
    wrong = [f"{len(names)} {word} ({examples(list(names))})" for word, names in
             (("missing", missing), ("extra", extra)) if names]  # fmt: skip
    return Check(what, not wrong, ", ".join(wrong) or f"{len(wanted)} of {len(wanted)}")


def check_deltas(
    found: Mapping[str, Parts], wanted: Mapping[str, Parts], tolerance: float, what: str = "weights"
) -> list[Check]:
    """The same modules, and deltas equal up to a relative error (Frobenius norm over all modules).

    Modules whose wanted delta is zero may be missing.
    """
    norms = {path: _squared(parts) for path, parts in wanted.items()}
    names, shared, shapes = _shared(found, wanted, norms, what)
    if shapes is not None:
        return [names, shapes]
    lost = sum(norms[path] for path in wanted if path not in found)
    lost += sum(_squared(_difference(found[path], wanted[path])) for path in shared)
    return [names, _within(what, "", lost, sum(norms.values()), tolerance)]


def check_added_lora(
    found: Mapping[str, Parts], merged: Mapping[str, Parts], rank: int, tolerance: float
) -> list[Check]:
    """A merge and a LoRA trained from it: what the merge does not explain has the LoRA's rank at most.

    Args:
        found: of the export.
        merged: of the merge that it claims to start from.
        rank: of the LoRA.
        tolerance: relative error of the export (Frobenius norm over all modules).
    """
    what, norms = "merge and LoRA", {path: _squared(parts) for path, parts in merged.items()}
    names, shared, shapes = _shared(found, merged, norms, what)
    if shapes is not None:
        return [names, shapes]
    lost = sum(layer_factors(_difference(found[path], merged[path]), rank)[2] ** 2 for path in shared)
    whole = sum(_squared(found[path]) for path in shared)
    return [names, _within(what, f"the merge and rank {rank}, ", lost, whole, tolerance)]


def check_not_zero(modules: Mapping[str, Parts]) -> Check:
    """Not every delta is zero: such an adapter is its base model."""
    living = sum(all(part.any() for part in parts) for parts in modules.values())
    return Check("not the base", living > 0, f"{living} of {len(modules)} modules change it")


def check_vllm(adapter: Adapter) -> list[Check]:
    """vLLM's rules: a rank it knows, one global alpha / r, plain modules. None of them counts."""
    settings, config = adapter.settings, adapter.config
    largest = max(a.shape[0] for a, _ in adapter.modules.values())
    fits = next((rank for rank in VLLM_RANKS if rank >= largest), None)
    ranks = sorted({a.shape[0] for a, _ in adapter.modules.values()})
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if config.get(key)]
    saved = settings.modules_to_save or tuple(adapter.heads)
    rows = [
        ("rank", fits is not None, f"--max-lora-rank {fits}" if fits else f"{largest} is above 512"),
        ("one rank", len(ranks) == 1, f"r {', '.join(map(str, ranks))}"),
        ("alpha", not patterns, f"{', '.join(patterns)} would be ignored" if patterns else "one for all"),
        (
            "keys",
            not saved,
            f"modules_to_save {', '.join(saved)} is rejected" if saved else "LoRA A and B only",
        ),
    ]
    return [Check(f"vLLM: {name}", ok, detail, counts=False) for name, ok, detail in rows]


def parts_of(modules: Modules) -> dict[str, Parts]:
    """LoRA factors (A, B) as (left, right)."""
    return {path: (b, a) for path, (a, b) in modules.items()}


def tensor_names(directory: Path) -> dict[str, Path]:
    """Every tensor of a checkpoint and the file that holds it.

    Raises:
        UserError: no weights, a shard that is missing or damaged.
    """
    found: dict[str, Path] = {}
    for shard in find_shards(directory)[0]:
        with open_tensors(directory / shard) as handle:
            found |= dict.fromkeys(handle.keys(), directory / shard)
    return found


def _shared(
    found: Mapping[str, Parts], wanted: Mapping[str, Parts], norms: Mapping[str, float], what: str
) -> tuple[Check, list[str], Check | None]:
    """Whether the modules are the same, those that both have, and a failure where their shapes differ."""
    needed = [path for path in wanted if norms[path] or path in found]
    shared = [path for path in needed if path in found]
    differing = [path for path in shared if _shape(found[path]) != _shape(wanted[path])]
    shapes = Check(what, False, f"{examples(differing)} have other shapes") if differing else None
    return check_names("modules", found, needed), shared, shapes


def _within(what: str, said: str, lost: float, whole: float, tolerance: float) -> Check:
    """Whether a relative error, of squared norms, is small enough."""
    error = math.sqrt(lost / whole) if whole else math.sqrt(lost)
    ok = error <= tolerance + ROUNDING  # NaN is not
    return Check(what, ok, f"{said}relative error {error:.1e}" + ("" if ok else f", above {tolerance:g}"))


def _squared(parts: Parts) -> float:
    if len(parts) == 2:
        return squared_norm(*parts)
    return float(np.sum(np.square(parts[0], dtype=np.float64)))


def _difference(x: Parts, y: Parts) -> Parts:
    if len(x) == len(y) == 2:
        # [L, -B] [R; A], without forming either product
        left = np.concatenate([x[0], -y[0].astype(np.float64)], axis=1)
        return left, np.concatenate([x[1].astype(np.float64), y[1]], axis=0)
    full = [p[0] if len(p) == 1 else p[0].astype(np.float32) @ p[1].astype(np.float32) for p in (x, y)]
    return (full[0] - full[1],)


def _shape(parts: Parts) -> tuple[int, int]:
    return parts[0].shape[0], parts[-1].shape[1]
