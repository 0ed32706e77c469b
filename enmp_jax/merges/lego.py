"""LoRA-LEGO: the rank-one units of all adapters, clustered; each cluster becomes one unit.

Zhao et al., "Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes Through
Rank-Wise Clustering", ICLR 2025. A minimal semantic unit is a row of A with its column of B. Two
choices of ours, so that the result does not depend on where alpha / r was folded in or on the order
of the tasks: each unit is balanced (row and column get equal norms, which leaves their product as
it is), and k-means starts from the longest unit and then those farthest from the units chosen
before. Not in the reference.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from enmp_jax.deltas import LowRank
from enmp_jax.merges.base import LayerInputs, LayerMethod
from enmp_jax.merges.hyperparameters import Range

_ITERATIONS = 30


class _Units(NamedTuple):
    left: Float[Array, "out unit"]
    right: Float[Array, "unit in"]
    gram: Float[Array, "unit unit"]
    rank: Int[Array, " task"]


def lego(space: str = "full", clusters: Annotated[int, Range(1, 1_000_000)] | None = None) -> LayerMethod:
    """LoRA-LEGO with the paper's dual reweighting.

    A centroid is stretched to the mean norm of its members, and the whole delta is multiplied by
    ``sqrt(mean rank / clusters)``. Low-rank: export as a PEFT adapter is exact.

    Args:
        space: full only; clustering needs the adapters' own factors.
        clusters: rank of the merged adapter; otherwise, for each module, the largest rank that a kept
            adapter has there.
    """

    def prepare(inputs: LayerInputs) -> _Units:
        tasks, out, rank = inputs.b.shape
        left = jnp.moveaxis(inputs.b, 0, 1).reshape(out, tasks * rank)
        right = inputs.a.reshape(tasks * rank, -1)
        norm_left, norm_right = jnp.linalg.norm(left, axis=0), jnp.linalg.norm(right, axis=1)
        real = (norm_left > 0) & (norm_right > 0)
        ratio = jnp.sqrt(jnp.where(real, norm_right, 1) / jnp.where(real, norm_left, 1))
        left, right = jnp.where(real, left * ratio, 0), jnp.where(real[:, None], right / ratio[:, None], 0)
        return _Units(left, right, left.T @ left + right @ right.T, inputs.rank)

    def merge(units: _Units, weights: Float[Array, " task"]) -> LowRank:
        rank = units.gram.shape[0] // weights.shape[0]
        most = min(clusters or rank, units.gram.shape[0])  # the shapes'; a module may have fewer
        largest = jnp.max(jnp.where(weights > 0, units.rank, 0))
        k = jnp.asarray(most) if clusters else jnp.minimum(jnp.maximum(largest, 1), most)
        lengths = jnp.sqrt(jnp.diag(units.gram))
        weight = jnp.repeat(weights, rank) * (lengths > 0)
        members = _k_means(units.gram, jax.lax.stop_gradient(weight > 0), most, k) * weight[:, None]
        total = members.sum(0)
        share = members / jnp.where(total > 0, total, 1)  # centroids in terms of units
        squared = jnp.einsum("ic,ij,jc->c", share, units.gram, share)
        alive = squared > jnp.finfo(squared.dtype).eps * jnp.max(units.gram)
        stretch = jnp.where(alive, (share.T @ lengths) ** 2 / jnp.where(alive, squared, 1), 0)
        kept_ranks = jnp.sum(jnp.where(weights > 0, units.rank, 0)) / jnp.maximum(jnp.sum(weights > 0), 1)
        output = jnp.sqrt(kept_ranks.astype(weights.dtype) / k)
        return LowRank(units.left, output * (share * stretch) @ share.T, units.right)

    return LayerMethod(prepare, merge)


def _k_means(
    gram: Float[Array, "unit unit"], active: Array, most: int, k: Int[Array, ""]
) -> Float[Array, "unit most"]:
    """Membership (0 or 1) of the active units in k clusters, of ``most``, from inner products alone."""
    squared = jnp.diag(gram)

    def choose(c: Int[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
        chosen, nearest = state
        unit = jnp.argmax(jnp.where(active, nearest, -jnp.inf)).astype(chosen.dtype)
        return chosen.at[c].set(unit), jnp.minimum(nearest, squared + squared[unit] - 2 * gram[unit])

    chosen, _ = jax.lax.fori_loop(0, most, choose, (jnp.zeros(most, jnp.int32), squared))
    share = jax.nn.one_hot(chosen, gram.shape[0], dtype=gram.dtype).T * (jnp.arange(most) < k)

    def members(share: Float[Array, "unit most"]) -> Float[Array, "unit most"]:
        inner = gram @ share
        distance = jnp.einsum("ic,ic->c", share, inner) - 2 * inner
        distance = jnp.where(share.sum(0) > 0, distance, jnp.inf)
        return jax.nn.one_hot(jnp.argmin(distance, axis=1), most, dtype=gram.dtype) * active[:, None]

    def step(_: Int[Array, ""], share: Float[Array, "unit most"]) -> Float[Array, "unit most"]:
        belongs = members(share)
        return belongs / jnp.maximum(belongs.sum(0), 1)

    return members(jax.lax.fori_loop(0, _ITERATIONS, step, share))
