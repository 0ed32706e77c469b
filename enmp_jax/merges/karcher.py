"""Karcher mean: the directions of the deltas averaged on the sphere, with their mean length.

mergekit's ``karcher`` (Goddard et al., "Arcee's MergeKit", arXiv 2403.13257), of deltas instead of weights:
the point m of the unit sphere at which ``sum_i a_i log_m(D_i / |D_i|) = 0``, a_i the tasks' shares, found by
``m <- exp_m(sum_i a_i log_m(u_i))`` from the normalised mean; the result is ``m sum_i a_i |D_i|``. Of two
deltas with equal norms it is their SLERP (Shoemake, 1985) at one half. All iterates are combinations of the
deltas, so inner products are all that is needed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from enmp_jax.deltas import Delta
from enmp_jax.merges.base import Ingredients, LayerInputs, LayerMethod
from enmp_jax.merges.sum import sum_

_ITERATIONS = 10  # mergekit's
_NEAR = 1e-5  # angle (in cosines: squared) below which a direction counts as the mean itself


class _Ingredients(NamedTuple):
    summed: Ingredients
    gram: Float[Array, "task task"]


def karcher(space: str = "full") -> LayerMethod:
    """Karcher mean of the deltas.

    Low-rank: export as a PEFT adapter is exact.

    Args:
        space: full or core, which give the same.
    """
    plain = sum_(space)

    def prepare(inputs: LayerInputs) -> _Ingredients:
        # <B_i A_i, B_j A_j> = <B_i^T B_j, A_i A_j^T>
        left = jnp.einsum("ior,jos->ijrs", inputs.b, inputs.b)
        right = jnp.einsum("irn,jsn->ijrs", inputs.a, inputs.a)
        return _Ingredients(plain.prepare(inputs), jnp.sum(left * right, axis=(2, 3)))

    def merge(x: _Ingredients, weights: Float[Array, " task"]) -> Delta:
        return plain.merge(x.summed, _coefficients(x.gram, weights))

    return LayerMethod(prepare, merge)


def _coefficients(gram: Float[Array, "task task"], weights: Float[Array, " task"]) -> Float[Array, " task"]:
    """Of the deltas in their Karcher mean."""
    squared = jnp.diag(gram)
    real = squared > 0
    norms = jnp.sqrt(jnp.where(real, squared, 1))
    total = jnp.sum(weights)
    share = weights / jnp.where(total > 0, total, 1)  # of all kept tasks: a zero delta shortens the mean
    length = jnp.sum(share * jnp.where(real, norms, 0))
    unit = gram / (norms[:, None] * norms)
    share = jnp.where(real, share, 0)
    directed = jnp.sum(share)
    share = share / jnp.where(directed > 0, directed, 1)

    def normalised(m: Array, otherwise: Array) -> Array:
        size = m @ unit @ m
        safe = size > _NEAR**2
        return jnp.where(safe, m / jnp.sqrt(jnp.where(safe, size, 1)), otherwise)

    first = jax.nn.one_hot(jnp.argmax(share > 0), share.shape[0], dtype=share.dtype)

    def step(_: Int[Array, ""] | int, m: Array) -> Array:
        cosine = unit @ m
        inside = jnp.abs(cosine) < 1 - _NEAR**2 / 2
        angle = jnp.arccos(jnp.where(inside, cosine, 0))
        gain = jnp.where(inside, angle / jnp.where(inside, jnp.sin(angle), 1), 0)
        tangent = share * gain - jnp.sum(share * gain * cosine) * m
        size = tangent @ unit @ tangent
        far = size > _NEAR**2
        size = jnp.sqrt(jnp.where(far, size, 1))
        moved = jnp.cos(size) * m + jnp.sin(size) / size * tangent
        return jnp.where(far, normalised(moved, m), m)

    mean = jax.lax.fori_loop(0, _ITERATIONS, step, normalised(share, first))
    return length * mean / norms
