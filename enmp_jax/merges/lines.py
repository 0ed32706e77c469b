"""Merged deltas scaled layer by layer; LiNeS: by a factor that grows linearly from the first to the last.

Wang et al., "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", ICLR 2025,
arXiv 2410.17146: layer l of L is multiplied by ``alpha + beta (l - 1) / (L - 1)``. All methods here work
layer by layer and scale with their inputs, so scaling the merged delta is scaling the tasks' deltas. Any
other rule of layers (LARV's: see ``larv``) is given as one factor for each.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from enmp_jax.deltas import Deltas, Dense, LowRank
from enmp_jax.errors import UserError, one_line
from enmp_jax.lora import LoraStack
from enmp_jax.merges.base import Keep, Merge


def layer_scaled(merge: Merge, scaling: Any) -> Merge:
    """A method whose merged deltas are scaled layer by layer.

    Args:
        merge: the method.
        scaling: factor of the first layer (the paper's alpha) and of the last (alpha + beta), linear between;
            or one factor for every layer.

    Raises:
        UserError: not two or more finite numbers; later, other than one for every layer.
    """
    several = isinstance(scaling, list | tuple) and len(scaling) >= 2
    if not several or not all(
        isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in scaling
    ):
        raise UserError(
            "layer_scaling must be two numbers, the factors of the first and the last layer, or one for "
            f"every layer, not {one_line(repr(scaling))}"
        )

    def every(layers: int) -> Float[Array, " layer"]:
        if len(scaling) == 2:
            first, last = scaling
            return jnp.linspace(first, last, layers)
        if len(scaling) != layers:
            raise UserError(
                f"layer_scaling: give two numbers, or one for each of the {layers} layers, not {len(scaling)}"
            )
        return jnp.asarray(scaling, jnp.float32)

    def prepare(stack: LoraStack) -> Any:
        """Ingredients, and the factors of projections that not all layers have."""
        if not all(isinstance(group, int) for group in stack.groups or ()):
            raise UserError(
                "layer_scaling needs one stack of numbered layers: these adapters also have "
                + one_line(next(group for group in stack.groups or () if isinstance(group, str)))
            )
        factors = every(stack.n_layers)
        own = {
            name: None if pair.rows is None else factors[np.asarray(pair.rows)]
            for name, pair in stack.pairs.items()
        }
        return merge.prepare(stack), own

    def merged(ingredients: Any, keep: Keep, scale: Float[Array, ""] | float) -> Deltas:
        inner, own = ingredients
        deltas: Deltas = {}
        for name, delta in merge.merge(inner, keep, scale).items():
            values = delta.core if isinstance(delta, LowRank) else delta.weight
            factors = own[name]
            if factors is None:
                factors = every(values.shape[0])
            scaled = values * factors.astype(values.dtype)[:, None, None]
            low_rank = isinstance(delta, LowRank)
            deltas[name] = LowRank(delta.left, scaled, delta.right) if low_rank else Dense(scaled)
        return deltas

    return Merge(prepare, merged)
