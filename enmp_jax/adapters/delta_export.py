"""Writing merged deltas themselves: ``delta.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from enmp_jax.adapters import single_file
from enmp_jax.adapters.stored import Storage, described, tensors
from enmp_jax.deltas import Deltas
from enmp_jax.errors import UserError
from enmp_jax.io.writing import write_tensors


def write_delta(
    path: str | Path,
    deltas: Deltas,
    names: Mapping[str, Sequence[str]] | None = None,
    metadata: Mapping[str, str] | None = None,
    stored: Storage | None = None,
) -> int:
    """Write ``<module path>.weight`` -> float32 [out, in] for every layer and projection.

    Weights that the base model keeps otherwise (see ``stored``) are written as it keeps them, and the header
    says so under ``layout``: a JSON object, tensor name -> axes.

    Written under a temporary name, read back, compared bit for bit and renamed.

    Args:
        path: the file to make.
        deltas: merged deltas, scale included, with a leading layer axis.
        names: template -> path to write of each layer (the adapters' own spelling); default: as they are.
        metadata: strings for the file's header.
        stored: module path -> how the base keeps its weight, where it is no linear layer's.

    Returns:
        The number of tensors written.

    Raises:
        UserError: NaN or Inf in a delta, or the file is there already or cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} is already there: give a new name")
    stored = stored or {}
    matrices: list[tuple[str, np.ndarray]] = []
    for template, delta in deltas.items():
        weights = np.asarray(jax.device_get(delta.materialise()), np.float32)
        plain = [template.replace("{}", str(i)) for i in range(len(weights))]
        for module, weight in zip(plain if names is None else names[template], weights, strict=True):
            if not np.isfinite(weight).all():
                raise UserError(f"the merged delta of {module} has NaN or Inf in it: inspect the adapters")
            matrices.append((module, weight))
    found = tensors(matrices, stored)
    layout = {single_file.flat(name): axes for name, axes in described(stored).items() if name in found}
    told = {"layout": json.dumps(layout)} if layout else {}
    write_tensors(
        path, {single_file.flat(name): x for name, x in found.items()}, {**(metadata or {}), **told}
    )
    return len(found)
