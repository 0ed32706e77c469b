"""Writing merged deltas themselves: ``delta.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from enmp_jax.deltas import Deltas
from enmp_jax.errors import UserError
from enmp_jax.io.writing import write_tensors


def write_delta(
    path: str | Path,
    deltas: Deltas,
    names: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write ``<module path>.weight`` -> float32 [out, in] for every layer and projection.

    Written under a temporary name, read back, compared bit for bit and renamed.

    Args:
        path: the file to make.
        deltas: merged deltas, scale included, with a leading layer axis.
        names: template -> template to write (the adapters' own spelling); default: as they are.
        metadata: strings for the file's header.

    Returns:
        The number of matrices written.

    Raises:
        UserError: NaN or Inf in a delta, or the file is there already or cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} is already there: give a new name")
    tensors = {}
    for template, delta in deltas.items():
        spelled = template if names is None else names[template]
        weights = np.asarray(jax.device_get(delta.materialise()), np.float32)
        for layer, weight in enumerate(weights):
            name = f"{spelled.replace('{}', str(layer))}.weight"
            if not np.isfinite(weight).all():
                raise UserError(f"the merged delta of {name} has NaN or Inf in it: inspect the adapters")
            tensors[name] = weight
    write_tensors(path, tensors, dict(metadata or {}))
    return len(tensors)
