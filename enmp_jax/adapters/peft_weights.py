"""``adapter_model.safetensors`` (or ``.bin``) -> LoRA modules and heads, or refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from enmp_jax.adapters.lora_config import LoraSettings
from enmp_jax.adapters.lora_kinds import decode, decode_experts
from enmp_jax.adapters.peft_files import AdapterHeads, Modules
from enmp_jax.adapters.stored import Stored
from enmp_jax.errors import UserError, one_line
from enmp_jax.io.reading import open_tensors, read_float
from enmp_jax.io.torch_files import read_torch

_LORA_KEY = re.compile(
    r"(?P<path>.+?)\.lora_(?:(?P<side>[AB])(?:\.(?P<name>[^.]+))?\.weight"
    r"|(?P<embedding>embedding_[AB])(?:\.(?P<name2>[^.]+))?"
    r"|(?P<magnitude>magnitude)_vector(?:\.(?P<name3>(?!weight$)[^.]+))?(?:\.weight)?)"
)
_SAVED = re.compile(r"\.(?:modules_to_save|original_module)(?:\.[^.]+)?(?=\.(?:[^.]+\.)*[^.]+$)")
_SHARED = re.compile(r"embed|(^|\.)(wte|wpe|shared)(\.|$)|norm", re.IGNORECASE)
_REFUSED_KEYS = {
    "lora_B.bias": "a bias in LoRA B would be lost by merging: train again with lora_bias false",
    "embed_tokens": (
        "embeddings saved with the adapter would be lost by merging: save again with "
        "save_embedding_layers=False if they were not trained, else train again without them"
    ),
}


class Weights(NamedTuple):
    """What an adapter's file holds.

    Attributes:
        modules: module path, without ``base_model.model.`` -> (A [r, in] as stored, B [out, r] in float32,
            scaling included).
        stored: module path -> how the base keeps its weight, where it is no linear layer's.
        heads: module path -> parameter name -> array, from ``modules_to_save``.
        magnitudes: module path -> DoRA's magnitude of each output.
    """

    modules: Modules
    stored: dict[str, Stored]
    heads: AdapterHeads
    magnitudes: dict[str, np.ndarray]


def read_weights(path: Path, settings: LoraSettings) -> Weights:
    """Read an adapter's tensors.

    Raises:
        UserError: a damaged file, an unknown tensor, or one whose effect merging would lose.
    """
    raw: dict[str, dict[str, np.ndarray]] = {}
    experts: dict[str, dict[str, np.ndarray]] = {}
    heads: AdapterHeads = {}
    names: set[str] = set()
    copies: list[str] = []
    for key, tensor in _tensors(path):
        match = _LORA_KEY.fullmatch(key)
        if key.endswith(".base_layer.weight"):
            copies.append(_strip(key).removesuffix(".base_layer.weight"))
            continue
        refused = next((reason for part, reason in _REFUSED_KEYS.items() if part in key), None)
        if refused and match is None:
            raise UserError(f"{path}: {one_line(key)}: {refused}")
        if match is None:
            _add_head(heads, key, tensor, settings, path)
            continue
        names.add(match["name"] or match["name2"] or match["name3"] or "")
        side = match["side"] or match["embedding"] or match["magnitude"]
        nested = _strip(match["path"])
        module = nested.replace(".base_layer", "")
        of_parameter = _owns_parameter(module, settings)
        sides = (experts if of_parameter else raw).setdefault(nested if of_parameter else module, {})
        if sides.setdefault(side, tensor) is not tensor:
            raise UserError(f"{path}: lora_{side} of {one_line(module)} is there twice")
    if len(names) > 1:
        raise UserError(
            f"{path} holds several adapters ({one_line(', '.join(sorted(names)))}): save one at a time"
        )
    if not raw and not experts:
        raise UserError(f"{path} has no LoRA tensors (keys that end in lora_A.weight and lora_B.weight)")
    for module in copies:
        # PEFT keeps a copy of embeddings that have a LoRA: frozen, so it is the base model's own
        if not ("embedding_A" in raw.get(module, ()) or (module.endswith("lm_head") and module in raw)):
            raise UserError(
                f"{path}: {one_line(module)}.base_layer.weight: it is a weight of the base model: save the "
                "adapter alone"
            )
    found = Weights({}, {}, heads, {})
    for module, sides in sorted(raw.items()):
        where = f"{path}: {one_line(module)}"
        if (magnitude := sides.pop("magnitude", None)) is not None:
            found.magnitudes[module] = magnitude.reshape(-1)
        decoded = decode(module, sides, settings, where)
        if not settings.targets(module):
            raise UserError(f"{where} has a LoRA, but target_modules does not name it: PEFT would ignore it")
        found.modules.update(decoded.modules)
        found.stored.update(decoded.stored)
    decoded = decode_experts(experts, settings, str(path))
    found.modules.update(decoded.modules)
    found.stored.update(decoded.stored)
    return found


def _tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    if path.suffix != ".safetensors":
        yield from read_torch(path).items()
        return
    with open_tensors(path) as handle:
        for key in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            yield key, read_float(handle, key, path)


def _owns_parameter(module: str, settings: LoraSettings) -> bool:
    owners = {name.rpartition(".")[0] for name in settings.target_parameters}
    return any(not owner or module == owner or module.endswith(f".{owner}") for owner in owners)


def _add_head(heads: AdapterHeads, key: str, tensor: np.ndarray, settings: LoraSettings, path: Path) -> None:
    module, _, parameter = _SAVED.sub("", _strip(key)).rpartition(".")
    allowed = settings.modules_to_save
    if settings.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        allowed += ("classifier", "score")  # PEFT adds these by itself
    known = any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", module) for name in allowed)
    if not known or not module:
        raise UserError(
            f"{path}: unknown tensor {one_line(key)}: neither LoRA A or B nor one of modules_to_save"
        )
    if _SHARED.search(module) or re.search(r"\.\d+(\.|$)", module):
        raise UserError(
            f"{path}: modules_to_save has {one_line(module)}, a part of the base model that tasks share: "
            "only heads can be saved with an adapter that is to be merged; train again without it"
        )
    if heads.setdefault(module, {}).setdefault(parameter, tensor) is not tensor:
        raise UserError(f"{path}: {one_line(module)}.{parameter} is there twice")


def _strip(key: str) -> str:
    return key.removeprefix("base_model.model.")
