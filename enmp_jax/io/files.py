"""Small files: JSON that anybody may have made, and writing so that none is ever half there."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from enmp_jax.errors import UserError, one_line, reason

_MAX_JSON_BYTES = 64 * 2**20


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


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
