"""The device mesh: its axes, its choice, and what is put where on it.

Members go over ``population``, examples over ``data``, the base weights over ``model``. Parameters
name their axes (``models.logical_axes``); ``RULES`` says which of those the mesh divides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from enmp_jax.distributed import put
from enmp_jax.errors import UserError
from enmp_jax.models.base import Params
from enmp_jax.models.convert import logical_axes

AXES = ("population", "data", "model")

RULES: Mapping[str, str] = {"heads": "model", "kv_heads": "model", "mlp": "model", "vocab": "model"}
"""Logical axis of a parameter -> mesh axis; axes not named here stay whole on every device.

Column-parallel into attention and MLP, row-parallel out of them (Megatron-LM, arXiv 1909.08053):
two sums over ``model`` a layer.
"""


def make_mesh(
    population: int = 1, data: int = 1, model: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with the axes ``population``, ``data`` and ``model``, on the first devices.

    Raises:
        UserError: a size below 1, or fewer devices than asked for.
    """
    n = population * data * model
    devices = list(devices) if devices is not None else jax.devices()
    if min(population, data, model) < 1:
        raise UserError(f"a mesh of {population} x {data} x {model}: sizes start at 1")
    if n > len(devices):
        raise UserError(
            f"a mesh of {population} x {data} x {model} needs {n} devices; there are {len(devices)}"
        )
    if jax.process_count() > 1 and n != len(devices):
        raise UserError(
            f"a mesh of {population} x {data} x {model} leaves devices unused: with several processes "
            f"it must take all {len(devices)}"
        )
    # Auto axes: under Explicit ones, vmap of scan and evosax's tell fail.
    return jax.make_mesh(
        (population, data, model), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:n]
    )


def choose_shape(devices: int, population: int, batch_size: int, model: int = 1) -> dict[str, int]:
    """Sizes of the mesh axes for a number of devices.

    ``model`` is given (the smallest that fits, see ``plan.smallest_model_axis``). What is left goes to
    members before examples, as members need no sum and small batches waste a device; examples take over
    where members leave more than a fifth of the time unused (9 members on 8 devices: 2 x 4).

    Args:
        devices: how many there are.
        population: members of a generation.
        batch_size: rows of a batch, which ``data`` must divide.
        model: size of the axis ``model``.
    """
    rest = devices // model
    sizes = [p for p in range(1, rest + 1) if rest % p == 0 and batch_size % (rest // p) == 0]
    if not sizes:  # no division of the batch fits: members alone
        sizes = [rest]

    def time(p: int) -> float:
        """Rounds of members times the share of a batch in each."""
        return math.ceil(population / p) * p / rest

    best = max(p for p in sizes if time(p) <= 1.25 * min(map(time, sizes)))
    return {"population": best, "data": rest // best, "model": model}


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


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put a pytree that every process holds on all devices of the mesh."""
    return put(tree, NamedSharding(mesh, PartitionSpec()))
