"""Torch's own weight files, read as data alone: no code in them runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from enmp_jax.errors import UserError, one_line
from enmp_jax.io.reading import finite


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a ``.bin`` or ``.pt`` file, as safetensors would hold them (float64 as float32).

    Raises:
        UserError: torch is not installed, or the file is damaged or holds more than floating point tensors.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            f"{path} is a torch file, and torch, which can read it without running code in it, is not "
            "installed: install torch, or save the adapter again as safetensors"
        )
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zip or torch's own
        raise UserError(f"{path} is not a torch file of tensors alone ({one_line(error, 100)})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds {type(found).__name__}, not names and tensors")
    tensors: dict[str, np.ndarray] = {}
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise UserError(f"{path}: {one_line(key)} is not a floating point tensor: it cannot be merged")
        # numpy has no bfloat16 of torch's: float32 holds it exactly
        kind = torch.float16 if value.dtype == torch.float16 else torch.float32
        tensors[key] = value.detach().to(kind).contiguous().numpy()
        if not finite(tensors[key]):
            raise UserError(f"{path}: {one_line(key)} has NaN or Inf in it: the adapter is damaged")
    return tensors
