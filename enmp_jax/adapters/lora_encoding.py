"""Factors of matrices -> the tensors that PEFT keeps of a LoRA, by the kind of layer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from enmp_jax.adapters.stored import Storage, is_expert, parameter_of
from enmp_jax.errors import UserError

Factors = tuple[np.ndarray, np.ndarray]
PARAMETERS = ("gate_up_proj", "gate_proj", "up_proj", "w1", "w3", "down_proj", "w2")
"""PEFT nests the parameters of one module in the order in which it defines them, the first innermost."""


def encode(modules: Mapping[str, Factors], stored: Storage, rank: int) -> dict[str, np.ndarray]:
    """Factors of matrices -> tensors of ``adapter_model.safetensors``, without ``base_model.model.``.

    Smaller ranks are padded with zeros to ``rank``.

    Raises:
        UserError: factors that do not fit the rank.
    """
    found: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, Factors]] = {}
    for path, (a, b) in modules.items():
        pad = rank - a.shape[0]
        if pad < 0 or a.shape[0] != b.shape[1]:
            raise UserError(f"{path}: A {a.shape} and B {b.shape} do not fit rank {rank}")
        a, b = np.pad(np.asarray(a), ((0, pad), (0, 0))), np.pad(np.asarray(b), ((0, 0), (0, pad)))
        kept = stored.get(path)
        if is_expert(path, stored):
            experts.setdefault(parameter_of(path), {})[int(path.rpartition(".")[2])] = a, b
        elif kept is not None and kept.kind == "embedding":
            found[f"{path}.lora_embedding_A"], found[f"{path}.lora_embedding_B"] = a, b
        else:
            if kept is not None and kept.kind == "convolution":
                a, b = kept.kernels(a, b)
            found[f"{path}.lora_A.weight"], found[f"{path}.lora_B.weight"] = a, b
    by_module: dict[str, list[str]] = {}
    for name in experts:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    for module, names in by_module.items():
        ordered = sorted(names, key=lambda name: _order(name.rpartition(".")[2]), reverse=True)
        for depth, name in enumerate(ordered):
            count, out, inner = next(s.shape for p, s in stored.items() if parameter_of(p) == name)
            a, b = np.zeros((count, rank, inner), np.float32), np.zeros((out, rank, count), np.float32)
            for e, (rows, columns) in experts[name].items():
                a[e], b[..., e] = rows, columns
            key = module + ".base_layer" * depth
            found[f"{key}.lora_A.weight"] = a.reshape(count * rank, inner)
            found[f"{key}.lora_B.weight"] = b.reshape(out, rank * count)
    return found


def _order(parameter: str) -> int:
    return PARAMETERS.index(parameter) if parameter in PARAMETERS else len(PARAMETERS)
