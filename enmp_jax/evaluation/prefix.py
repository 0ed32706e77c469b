"""Masks that differ from a common parent only from some layer on: the layers before it run once for all.

What a merge does in a layer depends on the mask's entries of that layer alone. So a member's hidden states
are its parent's up to the first layer in which the two masks differ, exactly, and its forward pass starts
there. Leaving out one module at a time, half of the layers are the parent's in the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from enmp_jax.data.batches import Batches
from enmp_jax.deltas import Delta, LowRank, member_axes
from enmp_jax.devices.mesh import make_mesh
from enmp_jax.evaluation import budget
from enmp_jax.evaluation.delta_format import delta_shapes
from enmp_jax.evaluation.fitness import FITNESS, Fitness
from enmp_jax.evaluation.kinds import Start, count_batch
from enmp_jax.evaluation.population import (
    MEMBERS,
    SHARED,
    EvalInputs,
    equal_chunks,
    on_mesh,
    sum_over_batches,
)
from enmp_jax.evaluation.scoring import Counts
from enmp_jax.merges.base import Keep, Merge, merge_population
from enmp_jax.models.base import Backbone

EvaluateFrom = Callable[[EvalInputs, Keep, Float[Array, ""] | float, Shaped[Array, "member *module"]], Counts]


def first_changed(
    parent: Shaped[Array | np.ndarray, "*module"], keep: Shaped[Array | np.ndarray, "member *module"]
) -> Int[Array, " member"]:
    """The first layer in which each mask differs from the parent; the number of layers if none does."""
    differs = jnp.asarray(keep != parent).reshape(len(keep), len(parent), -1).any(axis=-1)
    return jnp.where(differs.any(axis=-1), differs.argmax(axis=-1), len(parent))


def make_evaluate_from(
    backbone: Backbone,
    merge: Merge,
    n_tasks: int,
    mesh: Mesh | None = None,
    member_chunk: int | None = None,
    kind: Fitness = FITNESS["accuracy"],
) -> EvaluateFrom:
    """Build ``evaluate(inputs, parent [*module], scale [], keep [P, *module]) -> Counts [P, T]``; jit it.

    Scores what ``population.make_evaluate`` (same arguments) scores. Any order of members is right; in that
    of ``first_changed`` it costs least, as members evaluated together start at the earliest first layer
    among them. On every device the deltas of all its members, and the parent's hidden states for one
    batch, are held at the same time.
    """
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    n_shards = mesh.shape["population"]

    def shard(inputs: EvalInputs, parent: Array, keep: Array, first: Array, scale: Array) -> Counts:
        """One device's rounds: keep [1, round, chunk, *module], first [1, round]."""
        keep, first = keep[0], first[0]
        common = merge.merge(inputs.ingredients, parent, scale)

        def own_parts(keep: Array) -> dict[str, Array]:
            scales = jnp.broadcast_to(scale, keep.shape[:1])
            members = merge_population(merge, inputs.ingredients, keep, scales)
            return {name: _own(delta) for name, delta in members.items()}

        own = jax.lax.map(own_parts, keep)  # once for all batches; a chunk's temporaries at a time
        axes = {name: member_axes(delta) for name, delta in common.items()}

        def count_members(batch: Batches) -> Counts:
            hidden = backbone.hidden_states(inputs.params, batch.inputs, common)

            def together(args: tuple[Array, dict[str, Array]]) -> Counts:
                start, parts = args
                entering = jax.lax.dynamic_index_in_dim(hidden, start, keepdims=False)

                def member(deltas: dict[str, Delta]) -> Counts:
                    begin = Start(entering, start)
                    return count_batch(
                        backbone, inputs.params, inputs.heads, batch, deltas, n_tasks, kind, begin
                    )

                deltas = {name: _with_own(delta, parts[name]) for name, delta in common.items()}
                return jax.vmap(member, in_axes=(axes,))(deltas)

            return jax.lax.map(together, (first, own))

        return jax.tree.map(lambda x: x[None], sum_over_batches(count_members, inputs.batches))

    def evaluate(inputs: EvalInputs, parent: Keep, scale: Array | float, keep: Array) -> Counts:
        size = len(keep)
        share = math.ceil(size / n_shards)
        rounds, chunk = equal_chunks(share, member_chunk or share)
        # filled up with the parent, which runs no layer again
        keep = _pad(jnp.asarray(keep), parent, n_shards * rounds * chunk)
        # each device has a chunk of every round: with a block of the order one would have all the long ones
        keep = keep.reshape(rounds, n_shards, chunk, *keep.shape[1:]).swapaxes(0, 1)
        first = (
            first_changed(parent, keep.reshape(-1, *parent.shape)).reshape(n_shards, rounds, chunk).min(-1)
        )
        arguments = SHARED, MEMBERS, MEMBERS, SHARED
        counts = on_mesh(shard, mesh, arguments)(inputs, parent, keep, first, jnp.float32(scale))
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[3:])[:size], counts)

    return evaluate


def most_members(
    backbone: Backbone, merge: Merge, inputs: EvalInputs, keep_shape: tuple[int, ...], mesh: Mesh, chunk: int
) -> int:
    """How many members one call may have, so that their deltas fit beside all else; 0: none do.

    Args:
        backbone: the base model.
        merge: the merge method, with its deltas in the format in which they are applied.
        inputs: arrays on the mesh.
        keep_shape: of a mask.
        mesh: the devices.
        chunk: members evaluated together on a device.
    """
    working, _ = budget.delta_bytes(merge, inputs.ingredients, keep_shape)
    working += budget.largest_activations(backbone, inputs.batches)
    free = budget.free_bytes(inputs) - budget.largest_states(backbone, inputs.batches) - chunk * working
    shapes = delta_shapes(merge, inputs.ingredients, keep_shape)
    own = budget.n_bytes([_own(delta) for delta in shapes.values()])
    return max(0, free // max(own, 1)) * mesh.shape["population"]


def pays(first: Int[np.ndarray, " member"], n_layers: int, most: int, shards: int, chunk: int) -> bool:
    """Whether reuse runs fewer layers than evaluating each member from the inputs, on the busiest device.

    Args:
        first: see ``first_changed``.
        n_layers: of the base model.
        most: members of one call, in each of which every device runs the parent once.
        shards: devices that members are divided over.
        chunk: members that one device evaluates together.
    """
    if not most:
        return False
    chunk = min(chunk, math.ceil(len(first) / shards))
    starts = np.sort(first)[:: shards * chunk]
    parent = math.ceil(len(first) / most) * n_layers
    return parent + chunk * int((n_layers - starts).sum()) < chunk * n_layers * len(starts)


def in_calls(
    evaluate: Callable[[Shaped[np.ndarray, "member *module"]], Counts],
    parent: Shaped[np.ndarray, "*module"],
    keep: Shaped[np.ndarray, "member *module"],
    most: int,
) -> Counts:
    """Call a compiled evaluation with at most ``most`` members, in the order of their first changed layers.

    Calls are filled up with the parent to a power of two: few shapes, so few compilations.
    """
    order = np.argsort(np.asarray(first_changed(parent, keep)), kind="stable")
    size = min(most, 1 << (len(keep) - 1).bit_length())
    parts: list[Counts] = []
    for start in range(0, len(keep), size):
        rows = order[start : start + size]
        members = np.concatenate([keep[rows], np.repeat(parent[None], size - len(rows), axis=0)])
        parts.append(Counts(*(np.asarray(x)[: len(rows)] for x in evaluate(members))))
    back = np.argsort(order)
    return Counts(*(np.concatenate(column)[back] for column in zip(*parts, strict=True)))


def _own(delta: Delta) -> Any:
    """The part of a delta that depends on the mask: an array, or the shape of one."""
    return delta.core if isinstance(delta, LowRank) else delta.weight


def _with_own(delta: Delta, part: Array) -> Delta:
    return delta.replace(**{"core" if isinstance(delta, LowRank) else "weight": part})  # type: ignore[attr-defined]


def _pad(keep: Array, parent: Keep, size: int) -> Array:
    extra = jnp.broadcast_to(jnp.asarray(parent, keep.dtype), (size - len(keep), *parent.shape))
    return jnp.concatenate([keep, extra])
