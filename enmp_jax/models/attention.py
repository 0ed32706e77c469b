"""Attention: JAX's own, but for bfloat16 on CPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from enmp_jax.devices.matmul import bfloat16_on_cpu


def attend(
    q: Float[Array, "batch query heads dim"],
    k: Float[Array, "batch token kv_heads dim"],
    v: Float[Array, "batch token kv_heads dim"],
    mask: Bool[Array, "#batch #query token"] | None = None,
) -> Float[Array, "batch query heads dim"]:
    """Scaled dot-product attention; softmax in float32.

    Args:
        q: queries; ``heads`` a multiple of ``kv_heads``, each of which serves that many in a row.
        k: keys.
        v: values.
        mask: True where a query may look at a token.
    """
    if not bfloat16_on_cpu(q.dtype):
        return jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask[:, None])
    # there jax.nn.dot_product_attention multiplies weights and values as float32, which is slower
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[3] ** -0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores).astype(q.dtype)
    attended = jnp.einsum("bkgts,bskd->btkgd", weights, v, preferred_element_type=jnp.float32)
    return attended.astype(q.dtype).reshape(q.shape)
