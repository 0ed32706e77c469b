"""Backbones: base models as pure functions that take deltas, read from and written to Hugging Face files.

May import ``deltas``, ``devices``, ``io`` and all below them; knows nothing of merge methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from enmp_jax.errors import UserError
from enmp_jax.models import bert, checkpoint, clip, convert, gemma, gpt2, llama, phi3, quantised, vit
from enmp_jax.models.base import Backbone, Inputs, Params
from enmp_jax.models.convert import Head, Placement
from enmp_jax.models.parameters import Declared, flatten, initialise, unflatten
from enmp_jax.models.sharding import logical_axes

__all__ = [
    "FAMILIES", "Backbone", "Inputs", "Params", "build", "load", "load_head", "logical_axes", "save",
]  # fmt: skip

FAMILIES: dict[str, Callable[..., Backbone]] = {
    "vit": vit.build,
    "clip": clip.build,
    "clip_vision_model": clip.build,
    "clip_text_model": clip.build_text,
    "bert": bert.build,
    "roberta": bert.build,
    "xlm-roberta": bert.build,
    "llama": llama.build,
    "mistral": llama.build,
    "qwen2": llama.build,
    "qwen3": llama.build,
    "gemma": gemma.build,
    "gemma2": gemma.build,
    "gemma3_text": gemma.build,
    "phi3": phi3.build,
    "gpt2": gpt2.build,
}
"""``model_type`` of config.json -> ``build(config, dtype)``. ``clip`` is its vision tower."""

# Adapters of these can be merged, inspected and exported: that needs no backbone.
WITHOUT_BACKBONE = {
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "olmoe", "deepseek_v2", "deepseek_v3"),
        "a mixture of experts",
    ),
    **dict.fromkeys(("gemma3", "phi4_multimodal"), "a model of text and images"),
}

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def build(
    config: Mapping[str, Any], dtype: Any = "float32", family: str | None = None, quantization: str = "none"
) -> Backbone:
    """The backbone of a Hugging Face ``config.json``.

    Args:
        config: its content; ``image_mean`` and ``image_std`` may be added (default 0.5).
        dtype: ``float32`` or ``bfloat16``, of weights and activations. Norms, softmax and whatever
            the backbone returns are float32 in both.
        family: key of ``FAMILIES`` instead of the config's ``model_type``: ``clip_text_model`` for the
            text tower of a ``clip``.
        quantization: ``int8`` or ``int4``: matrices are kept so on the device (``models.quantised``).

    Raises:
        UserError: unknown ``model_type``, dtype or quantization, sizes that it cannot hold, or a config
            that contradicts itself.
    """
    kind = family or config.get("model_type")
    if kind in WITHOUT_BACKBONE:
        raise UserError(
            f"config.json: model_type {kind!r} is {WITHOUT_BACKBONE[kind]}, which cannot be evaluated here: "
            "its adapters can be inspected, merged and exported (enmp merge), but not searched or trained"
        )
    if kind not in FAMILIES:
        raise UserError(
            f"config.json: model_type {kind!r} is not known; known are {', '.join(FAMILIES)} (adapters of "
            "any model can be merged, inspected and exported: enmp merge)"
        )
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not known; known are {', '.join(DTYPES)}")
    backbone = FAMILIES[kind](config, DTYPES[name])
    if quantization == "none":
        return backbone
    if quantization not in quantised.KINDS:
        raise UserError(f"quantization {quantization!r} is not known; known are none, int8, int4")
    declared = quantised.declare(backbone.parameters, quantization)
    return backbone._replace(parameters=declared, init=partial(_initialise, declared))


def _initialise(declared: Declared, key: Array) -> Params:
    params = flatten(initialise(declared, key))
    stored = {
        path: quantised.store(params[path], p.dtype, p.quantization) for path, p in flatten(declared).items()
    }
    return unflatten(stored)


def load(
    path: str | Path,
    dtype: Any = "float32",
    place: Placement = None,
    family: str | None = None,
    quantization: str = "none",
    gradient_checkpointing: bool = False,
) -> tuple[Backbone, Params]:
    """Read a base model.

    Args:
        path: directory in Hugging Face layout, hub id (``name`` or ``name@revision``) or GGUF file.
        dtype: see ``build``.
        place: how to shard parameters (see ``convert.Placement``); None: the default device.
        family: see ``build``.
        quantization: see ``build``.
        gradient_checkpointing: keep no activations inside a layer for the backward pass; needs less memory.

    Raises:
        UserError: not found, unreadable, or not what its config.json says.
    """
    directory = checkpoint.find(path)
    config = checkpoint.read_config(directory) | {"gradient_checkpointing": gradient_checkpointing}
    backbone = build(config, dtype, family, quantization)
    return backbone, convert.read_params(backbone, directory, place)


def load_head(path: str | Path) -> Head | None:
    """The base model's own classification head ([classes, width], [classes] or None), None without one.

    Raises:
        UserError: as ``load``.
    """
    directory = checkpoint.find(path)
    return convert.read_head(build(checkpoint.read_config(directory)).spelling, directory)


def save(
    path: str | Path,
    backbone: Backbone,
    params: Params,
    extra_heads: Mapping[str, tuple[Any, Any | None]] | None = None,
) -> None:
    """Write a base model in Hugging Face layout, readable by ``load`` and by transformers.

    Args:
        path: directory; created if need be.
        backbone: of the parameters.
        params: parameters.
        extra_heads: heads to write along, module name (``classifier``) -> (weight [classes, width], bias or
            None). The number of classes of a ``classifier`` goes into config.json.

    Raises:
        UserError: a head's name or shape is wrong, or the directory cannot be written.
    """
    tensors, config = convert.to_tensors(backbone, params), dict(backbone.config.raw)
    for name, (weight, bias) in (extra_heads or {}).items():
        weight = np.asarray(weight)
        if name not in backbone.spelling.heads:
            known = ", ".join(backbone.spelling.heads)
            raise UserError(f"a {backbone.family} model has no head called {name!r}; known are {known}")
        if weight.ndim != 2 or weight.shape[1] != backbone.width:
            raise UserError(f"head {name!r} is {weight.shape}, the features are {backbone.width} wide")
        tensors[f"{name}.weight"] = weight
        if bias is not None:
            tensors[f"{name}.bias"] = np.asarray(bias)
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(weight.shape[0])}
        config["label2id"] = {label: int(i) for i, label in config["id2label"].items()}
    checkpoint.write(Path(path), config, tensors, images="image" in backbone.input_spec)
