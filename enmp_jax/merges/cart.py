"""CART: the average, plus what tasks add to it, each truncated to low rank.

Choi et al., "Revisiting Weight Averaging for Model Merging", 2024, section 4. In the reference:
``get_cart_delta_w``.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from enmp_jax.merges.base import LayerMethod
from enmp_jax.merges.hyperparameters import PositiveShare
from enmp_jax.merges.spaces import Coordinates, MatrixMethod, Size, matrix_method_in_space
from enmp_jax.merges.spectral import truncate


def cart(space: str = "full", rank_fraction: PositiveShare = 0.04, coefficient: float = 0.1) -> LayerMethod:
    """CART. Low-rank in every space: export as a PEFT adapter is exact.

    Args:
        space: see ``SPACES``.
        rank_fraction: ``ceil(rank_fraction * min(shape of the space))`` triplets of each centred
            task are kept (4 %: the reference's default, the smallest of the paper's).
        coefficient: weight of the centred tasks (0.1: the reference's default; the paper tunes it).
    """

    def combine(x: Coordinates, weights: Float[Array, " task"], size: Size) -> Float[Array, "p q"]:
        matrices = x.matrices()
        total = weights.sum()
        average = jnp.tensordot(weights, matrices, 1) / jnp.where(total > 0, total, 1)
        count = size.lookup(lambda rows, columns: math.ceil(rank_fraction * min(rows, columns)))
        centred = jax.vmap(lambda matrix, w: truncate(matrix - average, count, w != 0))(matrices, weights)
        return average + coefficient * jnp.tensordot(weights, centred, 1)

    return matrix_method_in_space(space, MatrixMethod(lambda x: x, combine), sequential=True)
