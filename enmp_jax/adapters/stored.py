"""How base models keep the weights that a LoRA changes: a delta as a matrix, and as they have it.

Every module is merged as a matrix [out, in]. Weights that are kept otherwise: transposed (GPT-2's Conv1D:
[in, out]), convolutions ([out, in, *kernel]; the matrix is [out, in * kernel]), embeddings ([token, width];
the matrix is [width, token], as PEFT's factors have it), and experts of a mixture in one parameter
([expert, ...]; one module each, PARAMETER.NUMBER).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np

Kind = Literal["linear", "transposed", "convolution", "embedding", "experts"]


class Stored(NamedTuple):
    """How the base keeps one module's weight.

    Attributes:
        kind: see the head of this file.
        shape: of the tensor; of experts, (number of experts, out, in), though a base may keep (in, out).
    """

    kind: Kind
    shape: tuple[int, ...]

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape (out, in) of the module's matrix."""
        if self.kind in ("transposed", "embedding"):
            return self.shape[1], self.shape[0]
        if self.kind == "experts":
            return self.shape[1], self.shape[2]
        return self.shape[0], math.prod(self.shape[1:])

    def tensor(self, delta: np.ndarray) -> np.ndarray:
        """A matrix [out, in] as the base keeps it; of an expert, its own part."""
        if self.kind in ("transposed", "embedding"):
            return delta.T
        return delta if self.kind == "experts" else delta.reshape(self.shape)

    def kernels(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Factors (A [r, in * kernel], B [out, r]) of a convolution as files keep them: [r, in, *kernel] and
        [out, r, 1, ...]."""
        a = a.reshape(len(a), *self.shape[1:])
        return a, b.reshape(*b.shape, *[1] * (a.ndim - 2))


Storage = Mapping[str, Stored]
"""Module path -> how its weight is kept; linear layers [out, in] are left out."""


def tensor_name(path: str, stored: Storage) -> str:
    """Name of the base's tensor that a module changes."""
    return parameter_of(path) if is_expert(path, stored) else f"{path}.weight"


def is_expert(path: str, stored: Storage) -> bool:
    """Whether a module is one expert's part of a parameter."""
    return path in stored and stored[path].kind == "experts"


def parameter_of(path: str) -> str:
    """The parameter that an expert's module is a part of."""
    return path.rpartition(".")[0]


def tensors(deltas: Iterable[tuple[str, np.ndarray]], stored: Storage) -> dict[str, np.ndarray]:
    """Matrices of modules -> tensors as the base keeps them; experts that lack are zeros."""
    found: dict[str, np.ndarray] = {}
    for path, delta in deltas:
        name = tensor_name(path, stored)
        if is_expert(path, stored):
            whole = found.setdefault(name, np.zeros(stored[path].shape, delta.dtype))
            whole[int(path.rpartition(".")[2])] = delta
        else:
            found[name] = stored[path].tensor(delta) if path in stored else delta
    return found


def described(stored: Storage) -> dict[str, str]:
    """What the header of a file of deltas says: how tensors that are no [out, in] are kept."""
    words = {
        "transposed": "[in, out]",
        "convolution": "[out, in, *kernel]",
        "embedding": "[token, width]",
        "experts": "[expert, out, in]",
    }
    return {
        tensor_name(path, stored): words[kept.kind] for path, kept in stored.items() if kept.kind in words
    }
