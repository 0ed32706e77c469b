"""Reading JSON and safetensors files that anybody may have made: any fault in them is one line."""

from __future__ import annotations

import contextlib
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from enmp_jax.errors import UserError

FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_MAX_JSON_BYTES = 64 * 2**20


def one_line(error: object, limit: int = 200) -> str:
    """An error's text as one printable line."""
    text = "".join(c if c.isprintable() else " " for c in " ".join(str(error).split()))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def is_file(path: Path) -> bool:
    """Whether ``path`` is a regular file (links followed).

    Raises:
        UserError: it is there but is no regular file (a directory, a pipe, a loop of links).
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise UserError(f"{path} is a link to nothing: download the file again") from None
        return False
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is not a regular file")
    return True


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: no regular file, too large, not UTF-8 JSON, or not an object.
    """
    if not is_file(path):
        raise UserError(f"there is no {path.name} in {path.parent}")
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise UserError(f"{path} has {path.stat().st_size} bytes: too large for a configuration file")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(data).__name__}")
    return data


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


def reason(error: BaseException) -> str:
    return one_line(getattr(error, "strerror", None) or error)
