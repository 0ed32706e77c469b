"""Reading JSON and safetensors files that anybody may have made: any fault in them is one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from enmp_jax.errors import UserError, one_line, reason
from enmp_jax.io.files import is_file

FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """``safetensors.safe_open`` for numpy, its errors as one line.

    Raises:
        UserError: the file is missing, unreadable, truncated or not safetensors.
    """
    if not is_file(path):
        raise UserError(f"there is no {path.name} in {path.parent}")
    try:
        handle = safetensors.safe_open(path, framework="numpy")
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    except Exception as error:
        raise UserError(f"{path} is not a valid safetensors file ({one_line(error)}): get it again") from None
    with handle:
        yield handle


def read_float(handle: Any, key: str, path: Path) -> np.ndarray:
    """A tensor as stored, float64 as float32.

    Raises:
        UserError: not a floating point tensor, unreadable, or with NaN or Inf in it.
    """
    try:
        kind = handle.get_slice(key).get_dtype()
        if kind not in FLOATS:
            raise UserError(
                f"{path}: {one_line(key)} has type {kind}: quantised or integer tensors cannot be merged, "
                "save the adapter in float32, bfloat16 or float16"
            )
        tensor = handle.get_tensor(key)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot read tensor {one_line(key)}: {one_line(error)}") from None
    if kind == "F64":
        with np.errstate(over="ignore"):
            tensor = tensor.astype(np.float32)
    if not finite(tensor):
        raise UserError(f"{path}: {one_line(key)} has NaN or Inf in it: the adapter is damaged")
    return tensor


def finite(tensor: np.ndarray) -> bool:
    """Whether all entries are finite; one pass and no temporary of the tensor's size in float32."""
    if tensor.dtype in (np.float32, np.float64) and tensor.size:
        with np.errstate(over="ignore", invalid="ignore"):
            flat = tensor.reshape(-1)
            if np.isfinite(np.dot(flat, flat)):  # NaN and Inf survive a sum of squares
                return True
    return bool(np.isfinite(tensor).all())
