"""Isotropic merging: all singular values of the merged delta become their mean.

Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
Subspaces", ICML 2025, algorithm 1 (Iso-C). In the reference: ``isotropize_matrix``, which leaves
out singular values up to 5e-5; so does this.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from enmp_jax.deltas import Delta, Dense, LowRank
from enmp_jax.merges.base import Ingredients, LayerInputs, LayerMethod
from enmp_jax.merges.linalg import qr
from enmp_jax.merges.spectral import isotropic
from enmp_jax.merges.sum import sum_


class _Ingredients(NamedTuple):
    inner: Ingredients
    left: tuple[Float[Array, "out k"], Float[Array, "k k"]] | None
    right: tuple[Float[Array, "in j"], Float[Array, "j j"]] | None


def iso(space: str = "full") -> LayerMethod:
    """Iso-C: the sum, isotropic. The same delta in every space; low-rank, so export to PEFT is exact."""
    return isotropized(sum_(space))


def isotropized(method: LayerMethod) -> LayerMethod:
    """Any method, its delta made isotropic afterwards.

    Low-rank deltas have left and right factors that no mask changes: with their QR done once,
    only the core is decomposed per mask.
    """
    if method.isotropic is not None:
        return LayerMethod(method.prepare, method.isotropic, method.sequential)

    def prepare(inputs: LayerInputs) -> _Ingredients:
        inner = method.prepare(inputs)
        delta = method.merge(inner, jnp.ones(inputs.b.shape[0], inputs.b.dtype))
        if isinstance(delta, Dense):
            return _Ingredients(inner, None, None)
        right = None if delta.right is None else qr(delta.right.T)
        return _Ingredients(inner, qr(delta.left), right)

    def merge(ingredients: _Ingredients, weights: Float[Array, " task"]) -> Delta:
        delta = method.merge(ingredients.inner, weights)
        if isinstance(delta, Dense):
            return Dense(isotropic(delta.weight))
        assert ingredients.left is not None
        q_left, r_left = ingredients.left
        if ingredients.right is None:
            return LowRank(q_left, isotropic(r_left @ delta.core), None)
        q_right, r_right = ingredients.right
        return LowRank(q_left, isotropic(r_left @ delta.core @ r_right.T), q_right.T)

    return LayerMethod(prepare, merge, method.sequential, statistics=method.statistics)
