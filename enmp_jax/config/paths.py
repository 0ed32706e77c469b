"""Paths in run files: relative to the run file, ``package:`` for what is packaged, or else hub ids."""

from __future__ import annotations

import os
from pathlib import Path

SUITES = Path(__file__).parent.parent / "suites"
_LOCAL = (".", "~")  # how a path begins that cannot be a hub id


def resolve_path(value: str, root: Path) -> str:
    """The path that a value of a run file in ``root`` means; hub ids (nothing there on disk) as they are."""
    if value.startswith("package:"):
        return str(SUITES / value.removeprefix("package:"))
    path = Path(value).expanduser()
    if path.is_absolute():
        return str(path)
    local = root / path
    return str(local) if local.exists() or value.startswith(_LOCAL) else value


def moved_path(value: str, old: Path, new: Path) -> str:
    """What means the same in a run file in ``new`` as ``value`` does in one in ``old``."""
    if value.startswith(("package:", "~")) or Path(value).is_absolute():
        return value
    if not (old / value).exists() and not value.startswith("."):
        return value
    if old.resolve() == SUITES.resolve():
        return f"package:{Path(value).as_posix()}"
    relative = Path(os.path.relpath(old.resolve() / value, new.resolve())).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"
