"""The kinds of layers that PEFT puts a LoRA on: their tensors as factors of a matrix, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from enmp_jax.adapters.lora_config import LoraSettings
from enmp_jax.adapters.lora_encoding import PARAMETERS, Factors
from enmp_jax.adapters.stored import Stored
from enmp_jax.errors import UserError, one_line
from enmp_jax.io.reading import finite


class Decoded(NamedTuple):
    """Modules of one LoRA layer, and how the base keeps those that are no linear layers."""

    modules: dict[str, Factors]
    stored: dict[str, Stored]


def decode(module: str, sides: Mapping[str, np.ndarray], settings: LoraSettings, where: str) -> Decoded:
    """A LoRA layer as factors (A [r, in] as stored, B [out, r] in float32, scaling included).

    Args:
        module: its path.
        sides: ``A`` and ``B``, or ``embedding_A`` and ``embedding_B``.
        settings: of the adapter.
        where: what error messages start with.

    Raises:
        UserError: a factor is missing, or their shapes are those of no LoRA.
    """
    embedding = any(side.startswith("embedding") for side in sides)
    names = [f"{'embedding_' * embedding}{side}" for side in "AB"]
    for name, other in zip(names, names[::-1]):
        if name not in sides:
            raise UserError(f"{where} has no lora_{name}, though lora_{other}: the file is incomplete")
    a, b = sides[names[0]], sides[names[1]]
    rank = settings.module_rank(module)
    if 0 in a.shape or 0 in b.shape or min(a.ndim, b.ndim) < 2:
        raise UserError(f"{where}: LoRA A {a.shape} and B {b.shape}: the shapes of no LoRA")
    stored: Stored | None = None
    if embedding and a.ndim == b.ndim == 2:
        stored = Stored("embedding", (a.shape[1], b.shape[0]))
    elif a.ndim == b.ndim and a.ndim > 2:
        if tuple(b.shape)[1:] != (len(a), *[1] * (b.ndim - 2)):
            raise UserError(
                f"{where}: LoRA A {a.shape} and B {b.shape}: the convolution has groups, and only plain ones "
                "can be merged"
            )
        stored = Stored("convolution", (b.shape[0], *a.shape[1:]))
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    elif settings.fan_in_fan_out and module.rpartition(".")[2] != "lm_head":
        stored = Stored("transposed", (a.shape[-1], b.shape[0]))
    if a.ndim != 2 or b.ndim != 2 or len(a) != rank or b.shape[-1] != rank:
        raise UserError(
            f"{where}: LoRA A is {_size(a)} and B {_size(b)}, but the configuration says rank {rank}"
        )
    return Decoded(
        {module: (a, _scaled(b, settings.scaling(module), where))}, {module: stored} if stored else {}
    )


def decode_experts(
    layers: Mapping[str, Mapping[str, np.ndarray]], settings: LoraSettings, where: str
) -> Decoded:
    """LoRA on parameters that hold all experts of a mixture (``target_parameters``): one module an expert.

    PEFT nests the layers of one module's parameters, so a file says only how deep each is.

    Args:
        layers: path, with ``.base_layer`` for every level -> ``A`` and ``B``.
        settings: of the adapter.
        where: what error messages start with.

    Raises:
        UserError: parameters whose order in the module is not known, or shapes that are those of no LoRA.
    """
    by_module: dict[str, list[str]] = {}
    for path in layers:
        by_module.setdefault(path.replace(".base_layer", ""), []).append(path)
    found = Decoded({}, {})
    for module, nested in sorted(by_module.items()):
        parameters = _parameters(module, settings)
        if len(parameters) != len(nested):
            raise UserError(
                f"{where}: {one_line(module)} has LoRA on {len(nested)} parameters, but target_parameters "
                f"names {len(parameters)} of them"
            )
        for parameter, path in zip(parameters, sorted(nested, key=len, reverse=True), strict=True):
            name = f"{module}.{parameter}"
            sides, rank = layers[path], settings.module_rank(name)
            if set(sides) != {"A", "B"} or any(side.ndim != 2 for side in sides.values()):
                raise UserError(
                    f"{where}: {one_line(name)} lacks a factor of its LoRA: the file is incomplete"
                )
            a, b = sides["A"], _scaled(sides["B"], settings.scaling(name), f"{where}: {one_line(name)}")
            experts = a.shape[0] // rank
            if not a.shape[0] == b.shape[1] == experts * rank or not experts:
                raise UserError(
                    f"{where}: {one_line(name)}: LoRA A is {_size(a)} and B {_size(b)}, but the "
                    f"configuration says rank {rank}"
                )
            rows = a.reshape(experts, rank, -1)
            columns = b.reshape(len(b), rank, experts)
            for e in range(experts):
                found.modules[f"{name}.{e}"] = rows[e], np.ascontiguousarray(columns[..., e])
                found.stored[f"{name}.{e}"] = Stored("experts", (experts, len(b), a.shape[1]))
    return found


def _parameters(module: str, settings: LoraSettings) -> list[str]:
    """Parameters of a module that have a LoRA, in the order of its definition."""
    named = [name.rpartition(".") for name in settings.target_parameters]
    own = sorted({p for owner, _, p in named if module == owner or module.endswith(f".{owner}") or not owner})
    if len(own) > 1 and not set(own) <= set(PARAMETERS):
        raise UserError(
            f"target_parameters names {', '.join(own)} of {one_line(module)}: which tensors of the adapter "
            "are whose cannot be told; train them in adapters of their own"
        )
    return sorted(own, key=lambda p: PARAMETERS.index(p) if len(own) > 1 else 0)


def _scaled(b: np.ndarray, scaling: float, where: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        folded = b.astype(np.float32) * np.float32(scaling)
    if not finite(folded):
        raise UserError(f"{where}: B times its scaling {scaling:g} overflows float32")
    return folded


def _size(x: np.ndarray) -> str:
    return "x".join(map(str, x.shape))
