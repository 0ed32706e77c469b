"""Masks -> merged deltas -> scores: a whole population in one compiled call, on any mesh.

Members are spread over the mesh axis ``population`` and examples over ``data``; both are manual
(``jax.shard_map``), so that the only communication is one sum at the end. The axis ``model`` is
left to the compiler: sharded base weights decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped

from enmp_jax.data.batches import Batches
from enmp_jax.deltas import Deltas
from enmp_jax.devices.mesh import make_mesh, put, replicate
from enmp_jax.evaluation.fitness import FITNESS, Fitness
from enmp_jax.evaluation.kinds import count_batch
from enmp_jax.evaluation.scoring import Counts, Heads
from enmp_jax.merges.base import Ingredients, Merge
from enmp_jax.models.base import Backbone, Params
from enmp_jax.models.sharding import shard_params


class EvalInputs(NamedTuple):
    """Everything that all members share; an argument of the compiled call, never a constant of it."""

    params: Params
    ingredients: Ingredients
    heads: Heads
    batches: tuple[Batches, ...]  # one per bucket of input lengths


MEMBERS = PartitionSpec("population")
SHARED = PartitionSpec()
EvaluateMasks = Callable[[EvalInputs, Shaped[Array, "member ..."], Float[Array, " member"]], Counts]


def make_evaluate(
    backbone: Backbone,
    merge: Merge,
    n_tasks: int,
    mesh: Mesh | None = None,
    member_chunk: int | None = None,
    kind: Fitness = FITNESS["accuracy"],
) -> EvaluateMasks:
    """Build ``evaluate(inputs, keep [P, ...], scale [P]) -> Counts [P, T]``; jit it or call it under jit.

    Args:
        backbone: the base model.
        merge: the merge method.
        n_tasks: number of tasks T.
        mesh: devices; default: one device.
        member_chunk: most members evaluated together on a device (memory); default: all of them.
        kind: the fitness whose values are summed.

    Any P works on any mesh: it is padded with copies of the last member, which are dropped.
    """
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    n_shards = mesh.shape["population"]

    def member(inputs: EvalInputs, keep: Array, scale: Array) -> Counts:
        deltas = merge.merge(inputs.ingredients, keep, scale)
        return count_all(backbone, inputs, deltas, n_tasks, kind)

    def shard(inputs: EvalInputs, keep: Array, scale: Array, chunk: int) -> Counts:
        # One chunk is a plain vmap: shared base weights, one batched matmul over all members.
        return jax.lax.map(lambda args: member(inputs, *args), (keep, scale), batch_size=chunk)

    def evaluate(
        inputs: EvalInputs, keep: Shaped[Array, "member ..."], scale: Float[Array, " member"]
    ) -> Counts:
        size = keep.shape[0]
        share = math.ceil(size / n_shards)
        rounds, chunk = equal_chunks(share, member_chunk or share)
        keep, scale = (_pad(x, n_shards * rounds * chunk - size) for x in (keep, scale))
        counts = on_mesh(partial(shard, chunk=chunk), mesh, (MEMBERS, MEMBERS))(inputs, keep, scale)
        return jax.tree.map(lambda x: x[:size], counts)

    return evaluate


def on_mesh(
    shard: Callable[..., Counts], mesh: Mesh, arguments: tuple[PartitionSpec, ...]
) -> Callable[..., Counts]:
    """``(inputs, *arguments) -> Counts`` from what one device does: members over ``population``, rows
    over ``data``, the sum over rows and the gathering of members at the end.

    Args:
        shard: the same function of one device's part of the inputs and arguments.
        mesh: the devices.
        arguments: how each argument after the inputs is divided.
    """
    specs = EvalInputs(SHARED, SHARED, SHARED, PartitionSpec(None, "data"))  # type: ignore[arg-type]

    def summed(*args: Any) -> Array:
        counts = shard(*args).packed()  # one array, so one sum and one gather
        return jax.lax.psum(counts, "data") if mesh.shape["data"] > 1 else counts

    # No check of varying axes: merges and models, which know no mesh, have scans of their own.
    divided = jax.shard_map(
        summed,
        mesh=mesh,
        in_specs=(specs, *arguments),
        out_specs=MEMBERS,
        axis_names={"population", "data"},
        check_vma=False,
    )

    def gathered(inputs: EvalInputs, *args: Any) -> Counts:
        counts = jax.lax.with_sharding_constraint(divided(inputs, *args), NamedSharding(mesh, SHARED))
        return Counts.unpacked(counts, inputs.heads.logit_scale.shape[0])

    return gathered


def count_all(
    backbone: Backbone, inputs: EvalInputs, deltas: Deltas, n_tasks: int, kind: Fitness, remat: bool = False
) -> Counts:
    """Counts of one merged model over all batches.

    Args:
        backbone: the base model.
        inputs: what all members share.
        deltas: of the merged model.
        n_tasks: number of tasks.
        kind: the fitness whose values are summed.
        remat: keep no activations of a batch for the backward pass but compute them again.
    """

    def one(batch: Batches) -> Counts:
        return count_batch(backbone, inputs.params, inputs.heads, batch, deltas, n_tasks, kind)

    return sum_over_batches(jax.checkpoint(one) if remat else one, inputs.batches)


def sum_over_batches(counts: Callable[[Batches], Counts], batches: tuple[Batches, ...]) -> Counts:
    """The sum of the counts of every batch, one batch at a time."""
    shapes = jax.eval_shape(counts, jax.tree.map(lambda x: x[0], batches[0]))
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    for bucket in batches:
        total, _ = jax.lax.scan(lambda t, b: (jax.tree.map(jnp.add, t, counts(b)), None), total, bucket)
    return total


def place(inputs: EvalInputs, mesh: Mesh, backbone: Backbone) -> EvalInputs:
    """Put what all members share on the mesh.

    Batches are split over ``data``, base weights over ``model`` by their logical axes, adapters and
    heads are everywhere. Parameters that are there already (``models.load(place=...)``) do not move.
    """
    return EvalInputs(
        jax.tree.map(put, inputs.params, shard_params(backbone, mesh)),
        replicate(inputs.ingredients, mesh),
        replicate(inputs.heads, mesh),
        put(inputs.batches, NamedSharding(mesh, PartitionSpec(None, "data"))),
    )


def _pad(x: Array, extra: int) -> Array:
    return jnp.concatenate([x, jnp.repeat(x[-1:], extra, axis=0)]) if extra else x


def equal_chunks(members: int, most: int) -> tuple[int, int]:
    """How many chunks of how many members: equal ones, as a remainder would compile all of it again.

    Args:
        members: of all chunks together.
        most: of one chunk.
    """
    rounds = math.ceil(members / most)
    return rounds, math.ceil(members / rounds)


def score_in_chunks(
    evaluate: Callable[[Any, Any], Counts],
    keep: Shaped[np.ndarray, "member ..."],
    scale: Float[np.ndarray, " member"],
    size: int,
) -> Counts:
    """Call a compiled evaluation ``size`` masks at a time: one shape, so one compilation.

    The last chunk is filled up with copies; fewer masks than ``size`` are a chunk of their own.
    """
    size = min(size, len(keep))
    parts: list[Counts] = []
    for start in range(0, len(keep), size):
        rows = np.minimum(np.arange(start, start + size), len(keep) - 1)
        counts = evaluate(keep[rows], scale[rows])  # numpy: every process gives the same
        parts.append(Counts(*(np.asarray(x)[: len(keep) - start] for x in counts)))
    return Counts(*(np.concatenate(column) for column in zip(*parts, strict=True)))
