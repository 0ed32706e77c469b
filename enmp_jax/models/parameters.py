"""The parameters of a backbone, each declared once: its name in files, shape, axes, initial values and type.

Random initialisation, sharding, reading and writing of checkpoints and the modules that take deltas all
follow from the declaration.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

Axes = tuple[str | None, ...]
Declared = dict[str, Any]
"""Nested dict with ``Param`` as leaves, shaped like the parameters. What belongs to the repeated layers is
under ``layers``, with the layers stacked on axis 0."""


@dataclass(frozen=True)
class Param:
    """One parameter.

    Attributes:
        name: its plain name in Hugging Face files (see ``Spelling``), ``{}`` for the layer's index.
        shape: of the array.
        axes: one name per axis, for sharding (see ``models.sharding``): ``layer``; ``embed`` (the width),
            ``heads``, ``kv_heads`` and ``mlp`` of the layers' weights; ``vocab``; None: never divided.
        dtype: of the array.
        std: random values are ``std`` times a normal distribution cut off at 2; 0: all are ``fill``.
        fill: the initial value where nothing is random.
        transposed: files hold a layer's matrix as [in, out] (GPT-2's Conv1D).
        quantization: ``int8`` or ``int4`` where the device keeps a ``models.quantised.Quantised`` instead.
    """

    name: str
    shape: tuple[int, ...]
    axes: Axes
    dtype: Any
    std: float = 0.0
    fill: float = 0.0
    transposed: bool = False
    quantization: str | None = None


def normal(name: str, shape: tuple[int, ...], std: float, dtype: Any, axes: Axes | None = None) -> Param:
    """A parameter with random initial values."""
    return Param(name, shape, axes or (None,) * len(shape), dtype, std)


def linear(
    name: str,
    shape: tuple[int, ...],
    std: float,
    dtype: Any,
    axes: Axes | None = None,
    bias: bool = True,
    transposed: bool = False,
) -> Declared:
    """Weight, [out, in] as PEFT counts it whether files hold it ``transposed`` or not, and bias."""
    weight = replace(normal(f"{name}.weight", shape, std, dtype, axes), transposed=transposed)
    return {"weight": weight} | (
        {"bias": Param(f"{name}.bias", shape[:1], weight.axes[:1], dtype)} if bias else {}
    )


def norm(name: str, width: int, rms: bool = False, fill: float = 1.0) -> Declared:
    """Parameters of ``layers.normalise``: float32 whatever the model's type, no bias for RMSNorm."""
    weight = {"weight": Param(f"{name}.weight", (width,), (None,), jnp.float32, fill=fill)}
    return weight if rms else weight | {"bias": Param(f"{name}.bias", (width,), (None,), jnp.float32)}


def flatten(tree: Mapping[str, Any], parent: str = "") -> dict[str, Any]:
    """Leaves of a nested dict by path (``layers/q/weight``), in the order of the dict."""
    leaves: dict[str, Any] = {}
    for name, entry in tree.items():
        leaves |= flatten(entry, f"{parent}{name}/") if isinstance(entry, Mapping) else {parent + name: entry}
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict that ``flatten`` took apart."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def is_stacked(path: str) -> bool:
    """Whether the parameter at this path has one slice per layer on axis 0."""
    return path.startswith("layers/")


def initialise(declared: Declared, key: Array) -> dict[str, Any]:
    """Random parameters."""
    params = flatten(declared)
    # one key per parameter in the order of declaration; all layers together have one
    groups = dict.fromkeys("layers" if is_stacked(path) else path for path, p in params.items() if p.std)
    keys = dict(zip(groups, jax.random.split(key, len(groups)), strict=True))

    def value(path: str, p: Param) -> Array:
        if not p.std:
            return jnp.full(p.shape, p.fill, p.dtype)
        if not is_stacked(path):
            return _draw(p, keys[path], p.shape)
        module = path.split("/")[1]
        layer_keys = jax.random.split(keys["layers"], p.shape[0])
        return jax.vmap(lambda k: _draw(p, jax.random.fold_in(k, _number(module)), p.shape[1:]))(layer_keys)

    return unflatten({path: value(path, p) for path, p in params.items()})


def _draw(p: Param, key: Array, shape: tuple[int, ...]) -> Array:
    return p.std * jax.random.truncated_normal(key, -2, 2, shape, p.dtype)


def _number(module: str) -> int:
    """A number for a module's name, the one with which flax.linen would fold it into the layer's key.

    A module's initial values thus do not depend on which other modules the layer has.
    """
    return int.from_bytes(hashlib.sha1(module.encode() + b"\x01", usedforsecurity=False).digest()[:4], "big")
