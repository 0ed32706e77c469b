"""Pretexts: labels computed from the image itself, to pretrain a base that knows no task's labels.

``rotation`` (Gidaris et al., arXiv 1803.07728): the image is turned by 0, 90, 180 or 270 degrees, the
label says by how much; which turn is drawn from the hash of its content, so it is always the same.
``ink:ROW,COLUMN``: the mean brightness of one cell of a 4x4 grid over the image, in four levels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from enmp_jax.errors import UserError

Pretext = Callable[[np.ndarray, bytes], tuple[np.ndarray, int]]
"""(image uint8 [h, w, c], hash of its content) -> (image to show, label)."""

GRID = LEVELS = 4


def parse(name: str, where: str) -> Pretext:
    """The pretext of a ``pretext:`` key.

    Args:
        name: ``rotation`` or ``ink:ROW,COLUMN``, cells counted from 0 at the top left.
        where: what to call the data in messages.

    Raises:
        UserError: another name, or a cell outside the grid.
    """
    if name == "rotation":
        return _rotation
    kind, _, argument = name.partition(":")
    try:
        if kind != "ink":
            raise ValueError
        row, column = (int(part) for part in argument.split(","))
        if not (0 <= row < GRID and 0 <= column < GRID):
            raise ValueError
    except ValueError:
        raise UserError(
            f"{where}: pretext {name!r} is not known: write rotation, or ink:ROW,COLUMN, both in "
            f"0..{GRID - 1}"
        ) from None
    return lambda image, key: (image, _ink(image, row, column))


def _rotation(image: np.ndarray, key: bytes) -> tuple[np.ndarray, int]:
    turns = int(key[:8], 16) % 4
    return np.ascontiguousarray(np.rot90(image, turns)), turns


def _ink(image: np.ndarray, row: int, column: int) -> int:
    rows, columns = (np.linspace(0, side, GRID + 1).round().astype(int) for side in image.shape[:2])
    cell = image[
        rows[row] : max(rows[row + 1], rows[row] + 1),
        columns[column] : max(columns[column + 1], columns[column] + 1),
    ]
    return int(cell.mean()) * LEVELS // 256
