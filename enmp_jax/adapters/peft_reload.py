"""What others make of our files: PEFT loads an adapter, transformers a checkpoint, where there are any."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from enmp_jax.adapters.checks import Check, Parts, check_deltas
from enmp_jax.adapters.peft_import import Adapter
from enmp_jax.adapters.stored import Stored, parameter_of
from enmp_jax.errors import one_line


def has_peft() -> bool:
    """Whether PEFT and torch are installed."""
    return all(importlib.util.find_spec(name) for name in ("peft", "torch"))


def check_peft(adapter: Adapter, wanted: Mapping[str, Parts], tolerance: float) -> list[Check]:
    """PEFT loads the adapter, all its tensors and no others, and applies these deltas.

    Args:
        adapter: as we read it; its modules say what PEFT has to find.
        wanted: module path -> delta.
        tolerance: relative error of the deltas.
    """
    if not adapter.config:
        return []  # of another spelling than PEFT's
    if adapter.settings.needs_base:
        return [Check("PEFT", True, "needs the base model's weights: not asked", counts=False)]
    if not has_peft():
        return [Check("PEFT", True, "not installed: not asked", counts=False)]
    try:
        found = _load(adapter)
    except Exception as error:  # whatever PEFT raises: the adapter is one that it does not take
        return [Check("PEFT loads it", False, one_line(error))]
    loads = Check("PEFT loads it", True, f"{len(found)} modules")
    return [loads, check_deltas(found, wanted, tolerance, "PEFT applies it")[-1]]


def check_transformers(directory: Path) -> list[Check]:
    """Transformers loads the checkpoint with no tensor missing, extra or of another shape."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    names = config.get("architectures") or []
    if not importlib.util.find_spec("torch") or not names:
        why = "torch is not installed" if names else "config.json names no architecture"
        return [Check("transformers", True, f"{why}: not asked", counts=False)]
    import transformers

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load = getattr(transformers, names[0]).from_pretrained
            _, info = load(directory, output_loading_info=True, dtype="auto")
    except Exception as error:  # whatever it raises: the checkpoint is one that it does not take
        return [Check("transformers loads it", False, one_line(error))]
    wrong = [f"{len(info[key])} {key}" for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
             if info.get(key)]  # fmt: skip
    return [Check("transformers loads it", not wrong, ", ".join(wrong) or names[0])]


def _load(adapter: Adapter) -> dict[str, Parts]:
    """What PEFT makes of an adapter, on a model of empty linear layers: no base model is needed."""
    import peft
    import torch
    from peft.utils import load_peft_weights

    config: Any = peft.LoraConfig.from_pretrained(str(adapter.directory))
    # of PEFT's settings, those that ask for a real model; transposed storage is no matter of the delta
    config.task_type, config.modules_to_save, config.fan_in_fan_out = None, None, False
    if config.target_modules == "all-linear":
        config.target_modules = set(adapter.modules)
    model = torch.nn.Module()
    for path, (a, b) in adapter.modules.items():
        _add(model, path, adapter.stored.get(path), (b.shape[0], a.shape[1]))
    adapted: Any = peft.PeftModel(model, config)  # type: ignore[arg-type]
    saved = load_peft_weights(str(adapter.directory), device="cpu")
    result = peft.set_peft_model_state_dict(adapted, {k: v for k, v in saved.items() if ".lora_" in k})
    missing = [key for key in result.missing_keys if "lora_" in key]
    if missing or result.unexpected_keys:
        raise ValueError(f"missing {missing[:2]}, unexpected {list(result.unexpected_keys)[:2]}")
    found: dict[str, Parts] = {}
    for path, layer in adapted.base_model.model.named_modules():
        kept = adapter.stored.get(path)
        if hasattr(layer, "parameter_name"):
            found |= _experts(path, layer)
        elif kept is not None and kept.kind in ("convolution", "embedding"):
            delta = layer.get_delta_weight("default").detach().float().numpy()
            found[path] = (delta.T if kept.kind == "embedding" else delta.reshape(kept.matrix),)
        elif hasattr(layer, "lora_A") and len(layer.lora_A):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            scaled = b.detach().float().numpy() * np.float32(layer.scaling["default"])
            found[path] = scaled, a.detach().float().numpy()
    return found


def _experts(path: str, layer: Any) -> dict[str, Parts]:
    """What PEFT adds to each expert of a parameter."""
    delta = layer.get_delta_weight("default").detach().float().numpy()
    # nested wrappers adapt the parameters of one module, whose path is the outermost's
    name = f"{path.replace('.base_layer', '')}.{layer.parameter_name}"
    return {f"{name}.{e}": (part,) for e, part in enumerate(delta if delta.ndim == 3 else delta[None])}


def _add(model: Any, path: str, kept: Stored | None, matrix: tuple[int, int]) -> None:
    """A layer under a dotted name; its weight is one zero, seen many times."""
    import torch

    if kept is not None and kept.kind == "experts":
        path = parameter_of(path)
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(model, parent):
            model.add_module(parent, torch.nn.Module())
        model = getattr(model, parent)
    zero = torch.zeros(1)
    if kept is not None and kept.kind == "experts":
        weight = zero.expand(kept.shape) if kept.shape[0] > 1 else zero.expand(matrix)
        model.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))
        return
    layer: Any
    if kept is not None and kept.kind == "convolution":
        convolution = {3: torch.nn.Conv1d, 4: torch.nn.Conv2d, 5: torch.nn.Conv3d}[len(kept.shape)]
        layer = convolution(kept.shape[1], kept.shape[0], kept.shape[2:], bias=False, device="meta")
    elif kept is not None and kept.kind == "embedding":
        layer = torch.nn.Embedding(kept.shape[0], kept.shape[1], device="meta")
    else:
        layer = torch.nn.Linear(matrix[1], matrix[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(zero.expand(layer.weight.shape), requires_grad=False)
    model.add_module(name, layer)
