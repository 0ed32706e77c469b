"""Files: JSON that anybody may have made, and the one way to write a file whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Callable
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


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Run ``write(temporary path)`` next to ``path``, flush to disk and rename.

    Whatever goes wrong, ``path`` is as it was before and no temporary file stays.

    Args:
        path: the file to make or to replace; its directory must be there.
        write: writes the whole file to the path that it is given.

    Raises:
        OSError: the disk is full, the directory cannot be written, ...
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # as the umask says; safetensors makes files only the owner can read
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; see ``write_atomically``.

    Raises:
        OSError: it cannot be written.
    """
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
