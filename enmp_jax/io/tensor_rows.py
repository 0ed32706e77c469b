"""Rows of a tensor in a safetensors file, read when they are asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from enmp_jax.errors import UserError, one_line
from enmp_jax.io.reading import FLOATS, finite
from enmp_jax.io.shards import Entry


@dataclass(frozen=True)
class TensorRows:
    """A floating point tensor, seen as a matrix of its first axis and all others (a vector: one row).

    Attributes:
        path: the file.
        entry: where the tensor lies in it.
    """

    path: Path
    entry: Entry

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        shape = self.entry.shape
        return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))

    def read(self, start: int, stop: int) -> Float[np.ndarray, "rows columns"]:
        """Some rows in float32.

        Raises:
            UserError: NaN or Inf in them, or a file that became shorter.
        """
        kind, width = np.dtype(FLOATS[self.entry.dtype]), self.shape[1]
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.entry.start + start * width * kind.itemsize)
            found = np.fromfile(file, kind, (stop - start) * width)
        if found.size != (stop - start) * width or not finite(found):
            raise UserError(f"{self.path}: {one_line(self.entry.name)} has NaN or Inf in it, or is cut off")
        return found.astype(np.float32, copy=False).reshape(stop - start, width)
