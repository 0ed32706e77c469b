"""Rows of a table that takes long to make: each is kept as soon as it is there, and none is made twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from enmp_jax.devices.distributed import all_or_none
from enmp_jax.errors import UserError, reason
from enmp_jax.io.writing import write_file

Row = dict[str, Any]


class Rows:
    """A file of JSON lines, one for each finished row, with the settings that it was made with.

    Without a path nothing is kept. Only process 0 of a job on several hosts writes; all hold the same rows.
    """

    def __init__(self, path: Path | None):
        """Read what is there.

        Raises:
            UserError: the file is damaged, not only in its last line (that of a killed run).
        """
        self.path, self._rows = path, {}
        if path is None:
            return
        self._rows = all_or_none(lambda: _read(path))
        if jax.process_index() == 0 and path.exists():  # without the half of a line
            whole = "".join(map(_line, self._rows.values())).encode()
            write_file(path, lambda temporary: temporary.write_bytes(whole))

    def row(self, name: str, settings: Mapping[str, Any], make: Callable[[], Row]) -> Row:
        """The row, made unless it is there.

        Args:
            name: of the row.
            settings: all that it depends on, as JSON can hold it.
            make: its content.

        Raises:
            UserError: it is there, but was made with other settings; or it cannot be written.
        """
        settings = json.loads(json.dumps(settings))
        if name in self._rows:
            before = self._rows[name]["settings"]
            changed = sorted(k for k in {*before, *settings} if before.get(k) != settings.get(k))
            if changed:
                raise UserError(
                    f"{self.path}: the row {name} was made with other settings for {', '.join(changed)}: "
                    "choose another --out, or delete that line to make it again"
                )
            return self._rows[name]["content"]
        row = {"row": name, "settings": settings, "content": make()}
        self._rows[name] = row
        if self.path is not None and jax.process_index() == 0:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(_line(row))
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise UserError(f"cannot write {self.path}: {reason(error)}") from None
        return row["content"]

    def check(self, name: str, settings: Mapping[str, Any]) -> bool:
        """Whether the row is there, before anything is paid for.

        Raises:
            UserError: as ``row``.
        """
        if name not in self._rows:
            return False
        self.row(name, settings, dict)
        return True


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _read(path: Path) -> dict[str, Row]:
    if not path.exists():
        return {}
    rows: dict[str, Row] = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows[row["row"]] = {key: row[key] for key in ("row", "settings", "content")}
        except (ValueError, TypeError, KeyError):
            if number == len(lines):  # also what follows the last newline: nothing, or the half of a row
                break
            raise UserError(
                f"{path} is damaged in line {number}: delete that line to make its row again"
            ) from None
    return rows
