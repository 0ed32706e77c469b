"""LiNeS: merged deltas scaled by a factor that grows linearly from the first layer to the last.

Wang et al., "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", ICLR 2025,
arXiv 2410.17146: layer l of L is multiplied by ``alpha + beta (l - 1) / (L - 1)``. All methods here work
layer by layer and scale with their inputs, so scaling the merged delta is scaling the tasks' deltas.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from enmp_jax.deltas import Deltas, Dense, LowRank
from enmp_jax.errors import UserError
from enmp_jax.merges.base import Keep, Merge


def layer_scaled(merge: Merge, scaling: Any) -> Merge:
    """A method whose merged deltas are scaled layer by layer.

    Args:
        merge: the method.
        scaling: factor of the first layer (the paper's alpha) and of the last (alpha + beta).

    Raises:
        UserError: not two finite numbers.
    """
    pair = isinstance(scaling, list | tuple) and len(scaling) == 2
    if not pair or not all(
        isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in scaling
    ):
        raise UserError(
            f"layer_scaling must be two numbers, the factors of the first and the last layer, not {scaling!r}"
        )
    first, last = scaling

    def merged(ingredients: Any, keep: Keep, scale: Float[Array, ""] | float) -> Deltas:
        deltas: Deltas = {}
        for name, delta in merge.merge(ingredients, keep, scale).items():
            values = delta.core if isinstance(delta, LowRank) else delta.weight
            scaled = values * jnp.linspace(first, last, values.shape[0], dtype=values.dtype)[:, None, None]
            low_rank = isinstance(delta, LowRank)
            deltas[name] = LowRank(delta.left, scaled, delta.right) if low_rank else Dense(scaled)
        return deltas

    return Merge(merge.prepare, merged)
