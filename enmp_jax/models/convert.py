"""Checkpoints to parameters and back, by the families' key tables."""

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
from enmp_jax.models.layers import AXES

Sharding = jax.sharding.Sharding
Axes = tuple[str | None, ...]
Placement = Callable[[str, tuple[int, ...], Axes], Sharding | None] | Any
"""``place(path, shape, axes) -> sharding`` or a pytree of shardings like the parameters."""
Head = tuple[Float[np.ndarray, "classes width"], Float[np.ndarray, " classes"] | None]

MAX_NAMED = 8  # names listed per kind of fault; the rest is counted


def logical_axes(params: Params) -> Any:
    """Names of the axes of every parameter, a pytree like ``params`` with tuples as leaves.

    ``layer``; ``embed`` (the width), ``heads``, ``kv_heads``, ``mlp`` of the layers' weights; ``vocab``;
    None for axes that nobody shards.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _axes(_join(path), leaf.ndim), params)


def _axes(path: str, ndim: int) -> Axes:
    *parents, name, last = ("", *path.split("/"))
    if parents and parents[-1] == "layers":
        axes = AXES.get(name)
        if axes is None:
            return ("layer", *(None,) * (ndim - 1))
        return ("layer", *axes) if last == "weight" else ("layer", axes[0])
    if last == "tokens" or name == "lm_head":
        return ("vocab", "embed")
    return (None,) * ndim


def _join(path: Any) -> str:
    return "/".join(str(getattr(entry, "key", entry)) for entry in path)


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
    shapes = jax.eval_shape(backbone.init, jax.random.key(0))
    wanted = {_join(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    shardings = _shardings(shapes, place)
    with checkpoint.open_tensors(directory) as tensors:
        sources = _match(backbone, wanted, tensors, directory)
        placed = {
            path: _place(tensors, sources[path], leaf, shardings[path]) for path, leaf in wanted.items()
        }
    return jax.tree_util.tree_map_with_path(lambda path, _: placed[_join(path)], shapes)


def _shardings(shapes: Params, place: Any) -> dict[str, Any]:
    leaves = [(_join(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)]
    if place is None:
        return {path: None for path, _ in leaves}
    if callable(place):
        return {path: place(path, leaf.shape, _axes(path, leaf.ndim)) for path, leaf in leaves}
    return {_join(path): sharding for path, sharding in jax.tree_util.tree_leaves_with_path(place)}


def _match(
    backbone: Backbone, wanted: Mapping[str, Any], tensors: checkpoint.Tensors, directory: Path
) -> dict[str, list[str]]:
    """Which tensors make each parameter, in layer order."""
    keys = backbone.keys
    found: dict[tuple[str, int | None], str] = {}
    extra: list[str] = []
    for name in tensors:
        plain = keys.plain(name)
        place = keys.path(plain)
        if place is not None and place[0] in wanted and (place[1] or 0) < backbone.n_layers:
            found[place] = name
        elif not keys.is_ignored(plain):
            extra.append(name)
    missing, misshapen = [], []
    sources: dict[str, list[str]] = {}
    for path, leaf in wanted.items():
        stacked = path.startswith("layers/")
        places = [(path, i) for i in range(leaf.shape[0])] if stacked else [(path, None)]
        shape = leaf.shape[1:] if stacked else leaf.shape
        for place in places:
            if place not in found:
                name = keys.file_name(path)
                missing.append(name if place[1] is None else name.replace("{}", str(place[1])))
            elif tensors.shape(found[place]) != shape:
                has = "x".join(map(str, tensors.shape(found[place])))
                misshapen.append(f"{found[place]} ({has}, not {'x'.join(map(str, shape))})")
        sources[path] = [found[place] for place in places if place in found]
    faults = [
        f"{len(names)} {kind}: {', '.join(names[:MAX_NAMED])}{', ...' if len(names) > MAX_NAMED else ''}"
        for kind, names in (("missing", missing), ("extra", sorted(extra)), ("misshapen", misshapen))
        if names
    ]
    if faults:
        raise UserError(f"{directory} does not fit its config.json ({backbone.family}): {'; '.join(faults)}")
    return sources


@partial(jax.jit, donate_argnums=0)
def _set_layer(stacked: Array, layer: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, layer.astype(stacked.dtype), i, 0)


def _place(tensors: checkpoint.Tensors, names: list[str], leaf: Any, sharding: Sharding | None) -> Array:
    if len(names) == 1 and tensors.shape(names[0]) == leaf.shape:
        return _read(tensors, names[0], sharding).astype(leaf.dtype)
    one = None
    if isinstance(sharding, jax.sharding.NamedSharding):
        one = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
    elif sharding is not None:
        one = sharding
    stacked = jnp.zeros(leaf.shape, leaf.dtype, device=sharding)
    for i, name in enumerate(names):
        stacked = _set_layer(stacked, _read(tensors, name, one), jnp.asarray(i))
    return stacked


def _read(tensors: checkpoint.Tensors, name: str, sharding: Sharding | None) -> Array:
    if sharding is None:
        return jnp.asarray(tensors.read(name))
    shape = tensors.shape(name)
    return jax.make_array_from_callback(shape, sharding, lambda index: tensors.read(name, index))


def to_tensors(backbone: Backbone, params: Params) -> dict[str, np.ndarray]:
    """Parameters under the names and shapes of Hugging Face files, one tensor per layer, C-contiguous."""
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, value = backbone.keys.file_name(_join(path)), np.asarray(leaf)
        if _join(path).startswith("layers/"):
            tensors |= {name.replace("{}", str(i)): np.asarray(v, order="C") for i, v in enumerate(value)}
        else:
            tensors[name] = np.asarray(value, order="C")  # keeps scalars scalar
    return tensors


def read_head(backbone_keys: Any, directory: Path) -> Head | None:
    """The classification head in a model's files, in float32, or None when there is none."""
    with checkpoint.open_tensors(directory) as tensors:
        named = {backbone_keys.plain(name): name for name in tensors}
        for head in backbone_keys.heads:
            if f"{head}.weight" in named:
                weight = tensors.read(named[f"{head}.weight"]).astype(np.float32)
                bias = named.get(f"{head}.bias")
                return weight, None if bias is None else tensors.read(bias).astype(np.float32)
    return None
