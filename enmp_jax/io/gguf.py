"""GGUF files (llama.cpp's): metadata, tensors, blocks of quantised weights.

The library that reads them, ``gguf``, is an optional extra; it is imported when a file is opened.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Num

from enmp_jax.errors import UserError, one_line, reason
from enmp_jax.io.files import is_file


def library() -> types.ModuleType:
    """The ``gguf`` package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gguf  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("GGUF files need the gguf package: pip install 'enmp-jax[gguf]'") from None
    return gguf


class GgufFile:
    """An open GGUF file, memory-mapped; tensors are read when asked for.

    Args:
        path: the file.

    Raises:
        UserError: the library is missing, or there is no such file, or it is damaged or no GGUF.
    """

    def __init__(self, path: Path) -> None:
        gguf = library()
        if not is_file(path):
            raise UserError(f"there is no file {path}")
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except OSError as error:
            raise UserError(f"cannot read {path}: {reason(error)}") from None
        except Exception as error:  # of a damaged file, the library raises whatever numpy says
            raise UserError(f"{path} is not a whole GGUF file ({one_line(error)}): get it again") from None
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """Key -> number, text, truth value or list of them."""
        return {name: field.contents() for name, field in self._reader.fields.items()}

    @property
    def types(self) -> Mapping[str, str]:
        """Name of every tensor -> its type as llama.cpp spells it (``F16``, ``Q4_1``)."""
        return {name: tensor.tensor_type.name for name, tensor in self._tensors.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, in numpy's order (the file has the fastest axis first)."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape.tolist()))

    def blocks(self, name: str) -> Num[np.ndarray, "*rows stored"]:
        """A tensor as it is stored: floats, or the bytes of each row's blocks."""
        return self._tensors[name].data

    def read(self, name: str) -> Float[np.ndarray, "..."]:
        """A tensor in float32.

        Raises:
            UserError: its type is one that the library cannot read.
        """
        tensor = self._tensors[name]
        try:
            values = library().dequantize(tensor.data, tensor.tensor_type)
        except Exception:
            kind = tensor.tensor_type.name
            raise UserError(
                f"{self.path}: {one_line(name)} has the type {kind}, which the gguf package cannot "
                "dequantise: take a file in another quantisation, such as Q8_0 or Q4_K_M"
            ) from None
        return np.asarray(values, np.float32).reshape(self.shape(name))
