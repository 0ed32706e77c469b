"""What is divided over the mesh axis ``model``: parameters, by the logical axes that they name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from enmp_jax.models.base import Params
from enmp_jax.models.convert import logical_axes

RULES: Mapping[str, str] = {"heads": "model", "kv_heads": "model", "mlp": "model", "vocab": "model"}
"""Logical axis of a parameter -> mesh axis; axes not named here stay whole on every device.

Column-parallel into attention and MLP, row-parallel out of them (Megatron-LM, arXiv 1909.08053):
two sums over ``model`` a layer.
"""


def param_sharding(mesh: Mesh) -> Callable[[str, tuple[int, ...], tuple[str | None, ...]], NamedSharding]:
    """``place`` for ``models.load``: the sharding of a parameter by its logical axes.

    An axis that the mesh does not divide evenly stays whole.
    """

    def place(path: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> NamedSharding:
        spec: list[str | None] = []
        for size, axis in zip(shape, axes, strict=True):
            name = RULES.get(axis) if axis else None
            free = name is not None and name not in spec and mesh.shape[name] > 1
            spec.append(name if free and size % mesh.shape[name] == 0 else None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return place


def shard_params(params: Params, mesh: Mesh) -> Any:
    """The shardings of a parameter pytree (of arrays or of ``ShapeDtypeStruct``)."""
    place = param_sharding(mesh)
    leaves, structure = jax.tree.flatten(params)
    axes = jax.tree.leaves(logical_axes(params), is_leaf=lambda x: isinstance(x, tuple))
    return structure.unflatten([place("", leaf.shape, axis) for leaf, axis in zip(leaves, axes, strict=True)])
