"""The device mesh: its axes, its choice, and what is put where on it.

Members go over ``population``, examples over ``data``, the base weights over ``model``. Parameters
name their axes (``models.logical_axes``); ``RULES`` says which of those the mesh divides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from enmp_jax.devices.distributed import put
from enmp_jax.errors import UserError

AXES = ("population", "data", "model")


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


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put a pytree that every process holds on all devices of the mesh."""
    return put(tree, NamedSharding(mesh, PartitionSpec()))
