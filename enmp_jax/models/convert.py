"""Checkpoints to parameters and back, by the declared names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from enmp_jax.errors import UserError
from enmp_jax.models import checkpoint
from enmp_jax.models.base import Backbone, Params
from enmp_jax.models.names import Spelling, split_index
from enmp_jax.models.parameters import Axes, Param, flatten, is_stacked, unflatten
from enmp_jax.models.quantised import Quantised, arrays, store

Sharding = jax.sharding.Sharding
Placement = Callable[[str, tuple[int, ...], Axes], Sharding | None] | Any
"""``place(path, shape, axes) -> sharding`` or a pytree of shardings like the parameters."""
Head = tuple[Float[np.ndarray, "classes width"], Float[np.ndarray, " classes"] | None]

MAX_NAMED = 8  # names listed per kind of fault; the rest is counted


def read_params(backbone: Backbone, directory: Path, place: Placement = None) -> Params:
    """Read a checkpoint straight to the devices.

    The files are memory-mapped; each layer's tensor is placed in its part of the stacked parameter
    (donated, so updated in place), and with shardings every process reads only its own slices: the
    host holds one tensor at a time.

    Args:
        backbone: says which parameters there are.
        directory: model in Hugging Face layout.
        place: see ``Placement``; None: the default device.

    Raises:
        UserError: unreadable files; all missing, extra and misshapen keys at once.
    """
    wanted: dict[str, Param] = flatten(backbone.parameters)
    shardings = _shardings(wanted, place)
    with checkpoint.open_tensors(directory) as tensors:
        sources = _match(backbone, wanted, tensors, directory)
        return unflatten(
            {path: _place(tensors, sources[path], p, shardings[path]) for path, p in wanted.items()}
        )


def _shardings(wanted: Mapping[str, Param], place: Any) -> dict[str, Any]:
    if place is None:
        return {path: None for path in wanted}
    if callable(place):
        return {
            path: arrays(p, lambda shape, _, axes, at=path: place(at, shape, axes))
            for path, p in wanted.items()
        }
    return flatten(place)


def _match(
    backbone: Backbone, wanted: Mapping[str, Param], tensors: checkpoint.Tensors, directory: Path
) -> dict[str, list[str]]:
    """Which tensors make each parameter, in layer order.

    Raises:
        UserError: all missing, extra and misshapen tensors.
    """
    spelling, known = backbone.spelling, {p.name for p in wanted.values()}
    found: dict[tuple[str, int | None], str] = {}
    extra: list[str] = []
    for name in tensors:
        plain = spelling.plain(name)
        template, layer = split_index(plain)
        if template in known and (layer or 0) < backbone.n_layers:
            found[template, layer] = name
        elif not spelling.is_ignored(plain):
            extra.append(name)
    missing, misshapen = [], []
    sources: dict[str, list[str]] = {}
    for path, p in wanted.items():
        layers = range(p.shape[0]) if is_stacked(path) else [None]
        shape = p.shape[1:] if is_stacked(path) else p.shape
        shape = shape[::-1] if p.transposed else shape
        for layer in layers:
            source = found.get((p.name, layer))
            if source is None:
                missing.append(spelling.in_file(p.name).replace("{}", str(layer)))
            elif tensors.shape(source) != shape:
                has = "x".join(map(str, tensors.shape(source)))
                misshapen.append(f"{source} ({has}, not {'x'.join(map(str, shape))})")
        sources[path] = [found[p.name, layer] for layer in layers if (p.name, layer) in found]
    faults = [
        f"{len(names)} {kind}: {', '.join(names[:MAX_NAMED])}{', ...' if len(names) > MAX_NAMED else ''}"
        for kind, names in (("missing", missing), ("extra", sorted(extra)), ("misshapen", misshapen))
        if names
    ]
    if faults:
        raise UserError(f"{directory} does not fit its config.json ({backbone.family}): {'; '.join(faults)}")
    return sources


@partial(jax.jit, donate_argnums=0, static_argnums=(3, 4))
def _set_layer(stacked: Any, layer: Array, i: Array, dtype: Any, kind: str | None) -> Any:
    def put(whole: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(whole, part, i, 0)

    return jax.tree.map(put, stacked, store(layer, dtype, kind))


def _place(tensors: checkpoint.Tensors, names: list[str], p: Param, sharding: Any) -> Any:
    whole: Any = sharding.values if isinstance(sharding, Quantised) else sharding  # of the tensor in the file
    if len(names) == 1 and tensors.shape(names[0]) == p.shape:
        value = store(_read(tensors, names[0], whole), p.dtype, p.quantization)
        return jax.device_put(value, sharding) if p.quantization else value
    one: Any = None
    if isinstance(whole, jax.sharding.NamedSharding):
        one = jax.sharding.NamedSharding(whole.mesh, jax.sharding.PartitionSpec(*whole.spec[1:]))
    elif whole is not None:
        one = whole
    shapes = arrays(p, lambda shape, dtype, _: jax.ShapeDtypeStruct(shape, dtype))
    if sharding is None:
        stacked = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    else:
        stacked = jax.tree.map(lambda a, at: jnp.zeros(a.shape, a.dtype, device=at), shapes, sharding)
    for i, name in enumerate(names):
        layer = _read(tensors, name, one, p.transposed)
        stacked = _set_layer(stacked, layer, jnp.asarray(i), jnp.dtype(p.dtype), p.quantization)
    return stacked


def _read(
    tensors: checkpoint.Tensors, name: str, sharding: Sharding | None, transposed: bool = False
) -> Array:
    if sharding is None:
        value = tensors.read(name)
        return jnp.asarray(value.T if transposed else value)
    shape = tensors.shape(name)
    if not transposed:
        return jax.make_array_from_callback(shape, sharding, lambda index: tensors.read(name, index))

    def columns(index: tuple[slice, ...] | None) -> np.ndarray:
        return tensors.read(name, index and index[::-1]).T

    return jax.make_array_from_callback(shape[::-1], sharding, columns)


def to_tensors(backbone: Backbone, params: Params) -> dict[str, np.ndarray]:
    """Parameters under the names and shapes of Hugging Face files, one tensor per layer, C-contiguous."""
    tensors: dict[str, np.ndarray] = {}
    declared = flatten(backbone.parameters)
    for path, leaf in flatten(params).items():
        whole = leaf.dequantise() if isinstance(leaf, Quantised) else leaf  # arrays may be numpy's
        name, value = backbone.spelling.in_file(declared[path].name), np.asarray(whole)
        value = value.swapaxes(-1, -2) if declared[path].transposed else value
        if is_stacked(path):
            tensors |= {name.replace("{}", str(i)): np.asarray(v, order="C") for i, v in enumerate(value)}
        else:
            tensors[name] = np.asarray(value, order="C")  # keeps scalars scalar
    return tensors


def read_head(spelling: Spelling, directory: Path) -> Head | None:
    """The classification head in a model's files, in float32, or None when there is none."""
    with checkpoint.open_tensors(directory) as tensors:
        named = {spelling.plain(name): name for name in tensors}
        for head in spelling.heads:
            if f"{head}.weight" in named:
                weight = tensors.read(named[f"{head}.weight"]).astype(np.float32)
                bias = named.get(f"{head}.bias")
                return weight, None if bias is None else tensors.read(bias).astype(np.float32)
    return None
