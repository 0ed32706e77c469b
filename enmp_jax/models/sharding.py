"""What is divided over the mesh axis ``model``: parameters, by the logical axes that they name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from enmp_jax.models.base import Backbone
from enmp_jax.models.parameters import flatten, unflatten
from enmp_jax.models.quantised import arrays

RULES: Mapping[str, str] = {"heads": "model", "kv_heads": "model", "mlp": "model", "vocab": "model"}
"""Logical axis of a parameter -> mesh axis; axes not named here stay whole on every device.

Column-parallel into attention and MLP, row-parallel out of them (Megatron-LM, arXiv 1909.08053):
two sums over ``model`` a layer.
"""


def logical_axes(backbone: Backbone) -> Any:
    """Names of the axes of every parameter (see ``Param``), a pytree like them with tuples as leaves."""
    return unflatten({path: p.axes for path, p in flatten(backbone.parameters).items()})


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


def shard_params(backbone: Backbone, mesh: Mesh) -> Any:
    """The shardings of a backbone's parameters, a pytree like them."""
    place = param_sharding(mesh)
    params = flatten(backbone.parameters)
    return unflatten(
        {
            path: arrays(p, lambda shape, _, axes, at=path: place(at, shape, axes))
            for path, p in params.items()
        }
    )
