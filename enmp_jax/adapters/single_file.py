"""LoRA in one safetensors file without a configuration: kohya's and LyCORIS' (plain LoCon), and diffusers'.

kohya names modules with underscores for dots (``lora_unet_down_blocks_0_attentions_0_proj_in``), with
``alpha`` beside the factors. Here their paths get dots around the numbers, which is what layers are found by
and what can be undone: ``lora_unet_down_blocks.0.attentions.0.proj_in``. diffusers names them as PEFT does,
with the part of the pipeline before (``unet.``, ``transformer.``).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from enmp_jax.adapters.lora_config import LoraSettings
from enmp_jax.adapters.lora_encoding import Factors
from enmp_jax.adapters.lora_kinds import decode
from enmp_jax.adapters.stored import Storage, Stored
from enmp_jax.errors import UserError, one_line
from enmp_jax.io.reading import open_tensors, read_float
from enmp_jax.io.writing import write_tensors

NAMES = ("pytorch_lora_weights.safetensors", "lora.safetensors")
"""What diffusers and we call such a file."""
_KEY = re.compile(
    r"(?P<path>.+?)\.(?:processor\.(?P<processor>\w+)_lora|lora|lora_linear_layer)?\.?"
    r"(?P<side>lora_down|lora_up|lora_A|lora_B|down|up)(?:\.default)?\.weight"
)
_SIDES = {"lora_down": "A", "down": "A", "lora_A": "A", "lora_up": "B", "up": "B", "lora_B": "B"}
_OTHERS = {
    "hada_": "LoHa multiplies low-rank matrices entry by entry, which is no low-rank delta",
    "lokr_": "LoKr is a Kronecker product, which is no low-rank delta",
    "lora_mid": "it is a Tucker decomposition of a convolution: train again with use_tucker false",
    "dora_scale": "DoRA rescales the base model's weights, which are not known here",
    "oft_": "OFT rotates the base model's weights, which is no low-rank delta",
    "lora_magnitude_vector": "DoRA rescales the base model's weights, which are not known here",
}
_FLAT = re.compile(r"lora_(unet|te\d?|transformer)_")


class SingleFile(NamedTuple):
    """What a file holds: modules and how the base keeps them, as of ``Adapter``; settings as far as known."""

    modules: dict[str, Factors]
    stored: dict[str, Stored]
    settings: LoraSettings


def is_one(source: str | Path) -> bool:
    """Whether a source is a safetensors file itself."""
    path = Path(source).expanduser()
    return path.suffix == ".safetensors" and path.is_file()


def find(directory: Path) -> str | None:
    """The file in a directory that has nothing else to be an adapter."""
    found = sorted(path.name for path in directory.glob("*.safetensors"))
    named = [name for name in NAMES if name in found]
    return named[0] if named else None


def is_flat(path: str) -> bool:
    """Whether a path is kohya's, underscores for dots."""
    return _FLAT.match(path) is not None


def dotted(flat: str) -> str:
    """kohya's name of a module with dots around its numbers."""
    return re.sub(r"(?<=\.)(\d+)_", r"\1.", re.sub(r"_(\d+)(?=_|$)", r".\1", flat))


def without_part(path: str) -> str:
    """kohya's path without the part of the pipeline before it."""
    return _FLAT.sub("", path, count=1)


def flat(path: str) -> str:
    """A path, or a tensor's name, as kohya's files spell it; others as they are."""
    if not is_flat(path):
        return path
    weight = ".weight" * path.endswith(".weight")
    return path.removesuffix(weight).replace(".", "_") + weight


def read(path: Path) -> SingleFile:
    """Read a file.

    Raises:
        UserError: damaged, or something that is no plain LoRA.
    """
    raw: dict[str, dict[str, np.ndarray]] = {}
    alphas: dict[str, float] = {}
    with open_tensors(path) as handle:
        metadata = _metadata(handle.metadata() or {})
        for key in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            refused = next((reason for part, reason in _OTHERS.items() if part in key), None)
            if refused:
                raise UserError(f"{path}: {one_line(key)}: {refused}")
            tensor, match = read_float(handle, key, path), _KEY.fullmatch(key)
            if key.endswith(".alpha") and tensor.size == 1:
                alphas[_path(key.removesuffix(".alpha"))] = float(tensor.reshape(()))
            elif match is None:
                raise UserError(
                    f"{path}: unknown tensor {one_line(key)}: there is no adapter_config.json, so it should "
                    "be a LoRA of kohya's, LyCORIS' or diffusers' spelling (lora_down, lora_up, alpha)"
                )
            else:
                processor = f".{match['processor']}" if match["processor"] else ""
                module = _path(match["path"] + processor)
                if raw.setdefault(module, {}).setdefault(_SIDES[match["side"]], tensor) is not tensor:
                    raise UserError(f"{path}: {one_line(module)} is there twice")
    if not raw:
        raise UserError(f"{path} has no LoRA tensors (lora_down and lora_up, or lora_A and lora_B)")
    ranks = {module: len(sides["A"]) for module, sides in raw.items() if "A" in sides and sides["A"].ndim}
    rank = max(ranks.values(), default=1)
    known = {module: alphas.get(module) or _alpha(module, ranks.get(module, 1), metadata) for module in raw}
    alpha = known[max(ranks, key=ranks.__getitem__)] if ranks else 1.0
    config: dict[str, Any] = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha,
        "rank_pattern": {module: r for module, r in ranks.items() if r},
        "alpha_pattern": known, "target_modules": sorted(raw),
    }  # fmt: skip
    settings = dataclasses.replace(LoraSettings.parse(config, str(path)), exact=True)
    modules: dict[str, Factors] = {}
    stored: dict[str, Stored] = {}
    for module, sides in sorted(raw.items()):
        decoded = decode(module, sides, settings, f"{path}: {one_line(module)}")
        modules.update(decoded.modules)
        stored.update(decoded.stored)
    return SingleFile(modules, stored, settings)


def write(directory: Path, modules: Mapping[str, Factors], stored: Storage) -> str:
    """Write factors in the spelling of their paths, scaling included, and return the file's name.

    Raises:
        UserError: an embedding's or an expert's LoRA, which these files do not hold, or a failing disk.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, (a, b) in modules.items():
        kept = stored.get(path)
        if kept is not None and kept.kind == "convolution":
            a, b = kept.kernels(a, b)
        elif kept is not None:
            raise UserError(
                f"{one_line(path)}: a LoRA on a layer of the kind {kept.kind} has no place in this file"
            )
        down, up = ("lora_down", "lora_up") if is_flat(path) else ("lora_A", "lora_B")
        tensors[f"{flat(path)}.{down}.weight"], tensors[f"{flat(path)}.{up}.weight"] = a, b
        if is_flat(path):
            tensors[f"{flat(path)}.alpha"] = np.array(float(len(a)), np.float32)
    name = NAMES[1] if any(map(is_flat, modules)) else NAMES[0]
    write_tensors(directory / name, tensors, {"format": "pt"})
    return name


def _path(key: str) -> str:
    return dotted(key) if is_flat(key) else key.removeprefix("base_model.model.")


def _metadata(header: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings as diffusers writes them into the header (``unet.lora_alpha``); empty without any."""
    try:
        found = json.loads(header.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _alpha(module: str, rank: int, metadata: Mapping[str, Any]) -> float:
    """Alpha by the settings in the header; without any, that of a scaling of 1."""
    part, _, own = module.partition(".")
    pattern = metadata.get(f"{part}.alpha_pattern")
    given = pattern.get(own) if isinstance(pattern, dict) else None
    given = metadata.get(f"{part}.lora_alpha") if given is None else given
    if isinstance(given, bool) or not isinstance(given, int | float):
        return float(rank)
    # the settings' own scaling is alpha / rank
    return given * rank**0.5 if metadata.get(f"{part}.use_rslora") is True else float(given)
