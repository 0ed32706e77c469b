"""The contract of a merge method, and what all methods share.

A method is a factory of static hyperparameters that returns a ``Merge``: two pure functions.
``prepare`` does once what depends on the adapters alone; ``merge`` does, under ``jit`` and
``vmap``, what depends on the mask.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Shaped

from enmp_jax.deltas import Delta, Deltas, member_axes, scale_delta
from enmp_jax.lora import LoraStack
from enmp_jax.merges.statistics import Kind, read_statistics

_FEW = 32  # projections that are compiled as one
Ingredients = Any  # a pytree that only the method that made it understands
Keep = Shaped[Array | np.ndarray, "layer task"] | Shaped[Array | np.ndarray, "layer projection task"]
"""A mask, or weights in its place."""


class Merge(NamedTuple):
    """A merge method in one space.

    ``prepare(stack) -> ingredients`` runs once. ``merge(ingredients, keep, scale) -> deltas`` is
    jit- and vmap-able in ``keep`` (True or 1 = merged; floats between are a relaxed mask with
    useful gradients) and ``scale`` (the merge coefficient, alpha / r already being in the stack).
    """

    prepare: Callable[[LoraStack], Ingredients]
    merge: Callable[[Ingredients, Keep, Float[Array, ""] | float], Deltas]


class LayerInputs(NamedTuple):
    """What ``prepare`` of a method sees of one projection in one layer."""

    a: Float[Array, "task rank in"]
    b: Float[Array, "task out rank"]
    rank: Int[Array, " task"]  # true ranks: rows of a and columns of b beyond them are zero
    key: Key[Array, " task"]  # for random methods; depends on task name, layer and module alone
    # of methods that need them (see ``statistics``)
    statistics: Float[Array | np.ndarray, "task _ _"] | None = None


class LayerMethod(NamedTuple):
    """A method as a function of one projection in one layer; ``lift`` makes a ``Merge`` of it.

    ``merge`` gets weights that are 0 for pruned tasks and for tasks without a LoRA there.
    """

    prepare: Callable[[LayerInputs], Ingredients]
    merge: Callable[[Ingredients, Float[Array, " task"]], Delta]
    sequential: bool = False  # one layer at a time, where the temporaries of a layer are large
    # the merge made isotropic, where there is a cheaper way than to decompose the merged delta
    isotropic: Callable[[Ingredients, Float[Array, " task"]], Delta] | None = None
    statistics: Kind | None = None  # what the method needs to know of the tasks' data


def lift(method: LayerMethod, seed: int = 0, statistics: str | None = None) -> Merge:
    """Apply a layer method to every projection and layer of a stack.

    Args:
        method: the layer method.
        seed: of random methods.
        statistics: path of the file, of methods that need it.

    Matrix products run at full float32 precision on every device: thresholds and iterations
    must not depend on it.
    """

    def over_layers(function: Callable, *arguments: Any) -> Any:
        if method.sequential:
            return jax.lax.map(lambda xs: function(*xs), arguments)
        return jax.vmap(function)(*arguments)

    @jax.jit  # traced once for all projections of a shape
    def merge_layers(prepared: Ingredients, weights: Array, scale: Array | float) -> Delta:
        return over_layers(lambda x, w: scale_delta(method.merge(x, w), scale), prepared, weights)

    # layer by layer: the temporaries of one layer at a time
    prepare_layers = jax.jit(lambda inputs: jax.lax.map(method.prepare, inputs))

    def prepare(stack: LoraStack) -> Ingredients:
        ingredients, known = {}, {}
        if method.statistics is not None:
            assert statistics is not None
            known = read_statistics(Path(statistics), method.statistics, stack)
        with jax.default_matmul_precision("highest"):
            for name, pair in stack.pairs.items():
                keys = _keys(seed, stack, name)
                ranks = jnp.asarray(pair.rank, jnp.int32)
                inputs = LayerInputs(pair.a, pair.b, ranks, keys, known.get(name))
                present = jnp.asarray(pair.present, pair.a.dtype)
                rows = None if pair.rows is None else jnp.asarray(pair.rows, jnp.int32)
                ingredients[name] = (present, rows, prepare_layers(inputs))
        return ingredients

    def merge(ingredients: Ingredients, keep: Keep, scale: Float[Array, ""] | float) -> Deltas:
        deltas = {}
        with jax.default_matmul_precision("highest"):
            for j, name in enumerate(sorted(ingredients)):
                present, rows, prepared = ingredients[name]
                kept = keep if keep.ndim == 2 else keep[:, j]
                kept = kept if rows is None else kept[rows]
                weights = kept.astype(present.dtype) * present
                deltas[name] = merge_layers(prepared, weights, scale)
        return deltas

    return Merge(prepare, merge)


def merge_stack(merge: Merge, stack: LoraStack, keep: Keep, scale: float) -> Deltas:
    """Merge once, outside of a search.

    Stacks of several kinds of layers, and mixtures of experts, have many projections: each shape is compiled
    once then, not each projection.
    """
    ingredients, whole = merge.prepare(stack), jax.jit(merge.merge)
    few = stack.groups is None and len(stack.pairs) <= _FEW
    if few or not isinstance(ingredients, dict):
        return whole(ingredients, keep, scale)
    deltas = {}
    for j, name in enumerate(stack.projections):
        own = keep if keep.ndim == 2 else keep[:, j : j + 1]
        deltas[name] = whole({"one": ingredients[name]}, own, scale)["one"]
    return deltas


def merge_population(
    merge: Merge,
    ingredients: Ingredients,
    keep: Shaped[Array, " member *module"],
    scale: Float[Array, " member"],
) -> Deltas:
    """Merge a population of masks: only ``core`` (or ``weight``) of each delta gets a member axis.

    Args:
        merge: a method.
        ingredients: what its ``prepare`` returned.
        keep: one mask per member, [layer, task] or [layer, projection, task] each.
        scale: merge coefficient of each member.
    """
    shapes = jax.eval_shape(merge.merge, ingredients, keep[0], scale[0])
    axes = {name: member_axes(delta) for name, delta in shapes.items()}
    return jax.vmap(merge.merge, in_axes=(None, 0, 0), out_axes=axes)(ingredients, keep, scale)


def _keys(seed: int, stack: LoraStack, name: str) -> Key[Array, "layer task"]:
    """Random keys by task name, layer and the module's name within its layer.

    So they do not depend on the order or number of tasks, or on the prefix of module names.
    """
    module = zlib.crc32(name.partition("@")[0].rpartition("{}.")[2].encode())
    tasks = np.array([zlib.crc32(task.encode()) for task in stack.tasks], np.uint32)
    key = jax.random.fold_in(jax.random.key(seed), module)
    groups = [g if isinstance(g, int) else zlib.crc32(g.encode()) for g in stack.groups_of(name)]
    by_layer = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(np.array(groups, np.uint32)))
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(by_layer, jnp.asarray(tasks))
