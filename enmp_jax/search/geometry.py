"""Norms of adapters' deltas and angles between them, from inner products that no full matrix is formed for.

With ``D_i = B_i A_i``, ``<D_i, D_j> = trace(B_i^T B_j A_j A_i^T)``: products of matrices of side rank.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from enmp_jax.lora import LoraPair, LoraStack
from enmp_jax.masks import Granularity, MaskSpec

Gram = Float[np.ndarray, "*place task task"]  # place: (layer), or (layer, projection)


def gram(stack: LoraStack, granularity: Granularity) -> Gram:
    """Frobenius inner products of the tasks' deltas; with ``layer``, summed over projections."""
    parts = [np.asarray(_gram(stack.pairs[name]), float) for name in stack.projections]
    by_projection = np.stack(parts, axis=1)
    return by_projection.sum(axis=1) if granularity == "layer" else by_projection


@jax.jit
def _gram(pair: LoraPair) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        left = jnp.einsum("lior,ljos->lijrs", pair.b, pair.b)
        right = jnp.einsum("lirn,ljsn->lijrs", pair.a, pair.a)
        return jnp.sum(left * right, axis=(-2, -1))


def norms(stack: LoraStack, spec: MaskSpec) -> Float[np.ndarray, "*module"]:
    """Frobenius norm of each module's delta; NaN where no module exists."""
    own = np.diagonal(gram(stack, spec.granularity), axis1=-2, axis2=-1)
    return np.where(spec.present(), np.sqrt(np.maximum(own, 0)), np.nan)


def cosines(stack: LoraStack, spec: MaskSpec) -> Float[np.ndarray, "*module"]:
    """Cosine of each module's delta with the sum of the other tasks' at its place.

    0 where either is zero; NaN where no module exists.
    """
    products = gram(stack, spec.granularity)
    own = np.diagonal(products, axis1=-2, axis2=-1)
    with_all = products.sum(axis=-1)
    others = with_all.sum(axis=-1, keepdims=True) - 2 * with_all + own  # squared norm of the others' sum
    length = np.sqrt(np.maximum(own, 0) * np.maximum(others, 0))
    cosine = np.divide(with_all - own, length, out=np.zeros_like(own), where=length > 0)
    return np.where(spec.present(), cosine, np.nan)


def random_like(stack: LoraStack, seed: int) -> LoraStack:
    """Adapters of Gaussian factors whose deltas have the Frobenius norms (and ranks) of the given ones.

    What merging them does cannot come from what the adapters learnt (arXiv 2602.12323).
    """
    pairs = {}
    for i, name in enumerate(stack.projections):
        pair, key = stack.pairs[name], jax.random.fold_in(jax.random.key(seed), i)
        keys = jax.random.split(key)
        a, b = (jax.random.normal(k, x.shape) for k, x in zip(keys, (pair.a, pair.b), strict=True))
        # rows beyond the rank stay zero
        real = jnp.arange(pair.a.shape[2]) < jnp.asarray(pair.rank)[..., None]
        drawn = dataclasses.replace(pair, a=a * real[..., None], b=b * real[:, :, None])
        wanted, has = (jnp.diagonal(_gram(p), axis1=-2, axis2=-1) for p in (pair, drawn))
        factor = jnp.sqrt(wanted / jnp.where(has > 0, has, 1))
        pairs[name] = dataclasses.replace(drawn, b=drawn.b * factor[..., None, None])
    return dataclasses.replace(stack, pairs=pairs).astype(jax.tree.leaves(stack)[0].dtype)
