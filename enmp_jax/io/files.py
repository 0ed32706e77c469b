"""Files: JSON that anybody may have made, and the one way to write a file whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import zlib
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


def is_file_name(name: str) -> bool:
    """Whether a directory or a file, hidden ones excepted, can have this name on any system."""
    if not name or name.startswith(".") or name != name.strip() or any(c in '/\\:*?"<>|' for c in name):
        return False
    return name.isprintable() and len(name.encode("utf-8", "surrogatepass")) <= 200


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


def temporary_name(path: Path) -> Path:
    """A name next to ``path`` for what is not whole yet; it says which process of which machine writes it."""
    return path.with_name(f".{path.name}.{_machine()}-{os.getpid()}-{secrets.token_hex(3)}.tmp")


_TEMPORARY = re.compile(r"\.(?P<name>.+)\.((?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-)?[0-9a-f]+\.tmp", re.DOTALL)


def is_temporary(path: Path) -> bool:
    """Whether a file or directory has a ``temporary_name`` (or one of older versions)."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_leftovers(directory: Path, of: str | None = None) -> None:
    """Remove what killed processes left half written.

    Args:
        directory: where to look.
        of: the name of what they were writing, of which only leftovers of dead processes of this machine are
            removed; None: of everything and everybody, which is right for who holds the directory's lock.
    """
    for path in directory.iterdir():
        found = _TEMPORARY.fullmatch(path.name)
        if found is None:
            continue
        if of is not None:
            ours = found["machine"] == _machine() and found["name"] == of
            if not ours or _alive(int(found["pid"])):
                continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def _machine() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def flush_directory(path: Path) -> None:
    """Have the names in a directory on disk, so that a rename in it outlives a power cut."""
    with contextlib.suppress(OSError):  # some network file systems cannot
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Run ``write(temporary path)`` next to ``path``, flush to disk and rename.

    Whatever goes wrong, ``path`` is as it was before and no temporary file stays.

    Args:
        path: the file to make or to replace; its directory must be there.
        write: writes the whole file to the path that it is given.

    Raises:
        OSError: the disk is full, the directory cannot be written, ...
    """
    temporary = temporary_name(path)
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
    flush_directory(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; see ``write_atomically``.

    Raises:
        OSError: it cannot be written.
    """
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
