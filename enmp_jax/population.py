"""Masks -> merged deltas -> scores: a whole population in one compiled call, on any mesh.

Members are spread over the mesh axis ``population`` and examples over ``data``; both are manual
(``jax.shard_map``), so that the only communication is one sum at the end. The axis ``model`` is
left to the compiler: sharded base weights decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Num

from enmp_jax.data.batches import Batches
from enmp_jax.errors import UserError
from enmp_jax.merges.base import Ingredients, Merge
from enmp_jax.models.base import Backbone, Params
from enmp_jax.tasks import Counts, Heads, class_log_probabilities, count

AXES = ("population", "data", "model")


class Fixed(NamedTuple):
    """Everything that all members share; an argument of the compiled call, never a constant of it."""

    params: Params
    ingredients: Ingredients
    heads: Heads
    batches: tuple[Batches, ...]  # one per bucket of input lengths


Evaluate = Callable[[Fixed, Num[Array, "member ..."], Float[Array, " member"]], Counts]


def make_mesh(
    population: int = 1, data: int = 1, model: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with the axes ``population``, ``data`` and ``model``, on the first devices.

    Raises:
        UserError: fewer devices than asked for.
    """
    n = population * data * model
    devices = list(devices) if devices is not None else jax.devices()
    if n > len(devices):
        raise UserError(
            f"a mesh of {population} x {data} x {model} needs {n} devices; there are {len(devices)}"
        )
    # Auto axes: under Explicit ones, vmap of scan and evosax's tell fail.
    return jax.make_mesh(
        (population, data, model), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:n]
    )


def make_evaluate(
    backbone: Backbone, merge: Merge, n_tasks: int, mesh: Mesh | None = None, member_chunk: int | None = None
) -> Evaluate:
    """Build ``evaluate(fixed, keep [P, ...], scale [P]) -> Counts [P, T]``; jit it or call it under jit.

    Args:
        backbone: the base model.
        merge: the merge method.
        n_tasks: number of tasks T.
        mesh: devices; default: one device.
        member_chunk: members evaluated together on a device (memory); default: all of them.

    Any P works on any mesh: it is padded with copies of the last member, which are dropped.
    """
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    manual = {"population", "data"}
    n_shards = mesh.shape["population"]

    def member(fixed: Fixed, keep: Array, scale: Array) -> Counts:
        deltas = merge.merge(fixed.ingredients, keep, scale)

        def step(total: Counts, batch: Batches) -> tuple[Counts, None]:
            features = backbone.features(fixed.params, batch.inputs, deltas)
            scores = class_log_probabilities(fixed.heads, features, batch.task)
            counts = count(scores, batch.label, batch.task, batch.mask, n_tasks)
            return jax.tree.map(jnp.add, total, counts), None

        zero = jnp.zeros(n_tasks, jnp.float32)
        total = Counts(zero, zero)
        for bucket in fixed.batches:
            total, _ = jax.lax.scan(step, total, bucket)
        return total

    def shard(fixed: Fixed, keep: Array, scale: Array) -> Counts:
        # member_chunk None is a plain vmap: shared base weights, one batched matmul over all members.
        counts = jax.lax.map(
            lambda args: member(fixed, *args), (keep, scale), batch_size=member_chunk or keep.shape[0]
        )
        return jax.lax.psum(counts, "data")

    def evaluate(fixed: Fixed, keep: Num[Array, "member ..."], scale: Float[Array, " member"]) -> Counts:
        size = keep.shape[0]
        keep, scale = (_pad(x, -size % n_shards) for x in (keep, scale))
        members, replicated = PartitionSpec("population"), PartitionSpec()
        specs = Fixed(replicated, replicated, replicated, PartitionSpec(None, "data"))  # type: ignore[arg-type]
        # No check of varying axes: merges and models, which know no mesh, have scans of their own.
        counts = jax.shard_map(
            shard,
            mesh=mesh,
            in_specs=(specs, members, members),
            out_specs=members,
            axis_names=manual,
            check_vma=False,
        )(fixed, keep, scale)
        counts = jax.lax.with_sharding_constraint(counts, NamedSharding(mesh, replicated))
        return jax.tree.map(lambda x: x[:size], counts)

    return evaluate


def place(fixed: Fixed, mesh: Mesh) -> Fixed:
    """Put what all members share on the mesh: batches split over ``data``, the rest replicated."""
    batches = jax.device_put(fixed.batches, NamedSharding(mesh, PartitionSpec(None, "data")))
    rest = jax.device_put(fixed._replace(batches=()), NamedSharding(mesh, PartitionSpec()))
    return rest._replace(batches=batches)


def _pad(x: Array, extra: int) -> Array:
    return jnp.concatenate([x, jnp.repeat(x[-1:], extra, axis=0)]) if extra else x
