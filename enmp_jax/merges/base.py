"""The contract of a merge method, and what all methods share.

A method is a factory of static hyperparameters that returns a ``Merge``: two pure functions.
``prepare`` does once what depends on the adapters alone; ``merge`` does, under ``jit`` and
``vmap``, what depends on the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from enmp_jax.deltas import Delta, Deltas
from enmp_jax.lora import LoraStack

Ingredients = Any  # a pytree that only the method that made it understands
Keep = Num[Array, "layer task"] | Num[Array, "layer projection task"]


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
    present: Float[Array, task]  # 1 where the task has a LoRA here; a missing one counts as pruned


class LayerMethod(NamedTuple):
    """A method as a function of one projection in one layer; ``lift`` makes a ``Merge`` of it."""

    prepare: Callable[[LayerInputs], Ingredients]
    merge: Callable[[Ingredients, Float[Array, task]], Delta]


def lift(method: LayerMethod) -> Merge:
    """Apply a layer method to every projection and layer of a stack."""

    def prepare(stack: LoraStack) -> Ingredients:
        ingredients = {}
        for name, pair in stack.pairs.items():
            present = jnp.asarray(pair.present, pair.a.dtype)
            ingredients[name] = (present, jax.vmap(method.prepare)(LayerInputs(pair.a, pair.b, present)))
        return ingredients

    def merge(ingredients: Ingredients, keep: Keep, scale: Float[Array, ""] | float) -> Deltas:
        deltas = {}
        for j, name in enumerate(sorted(ingredients)):
            present, prepared = ingredients[name]
            rows = keep if keep.ndim == 2 else keep[:, j]
            delta = jax.vmap(method.merge)(prepared, rows.astype(present.dtype) * present)
            deltas[name] = scale_delta(delta, scale)
        return deltas

    return Merge(prepare, merge)


def scale_delta(delta: Delta, scale: Float[Array, ""] | float) -> Delta:
    """``scale * delta``, on the part that depends on the mask."""
    from enmp_jax.deltas import Dense, LowRank

    if isinstance(delta, LowRank):
        return LowRank(delta.left, delta.core * jnp.asarray(scale, delta.core.dtype), delta.right)
    return Dense(delta.weight * jnp.asarray(scale, delta.weight.dtype))
