"""Attention: JAX's own where that can do it and is fast."""

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
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "batch query heads dim"]:
    """Scaled dot-product attention; softmax in float32.

    Args:
        q: queries; ``heads`` a multiple of ``kv_heads``, each of which serves that many in a row.
        k: keys.
        v: values.
        mask: True where a query may look at a token.
        scale: what scores are multiplied with; None: one over the root of ``dim``.
        softcap: scores become ``softcap tanh(score / softcap)``; None: they stay.
    """
    if softcap is None and not bfloat16_on_cpu(q.dtype):
        mask = None if mask is None else mask[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale)
    # jax.nn.dot_product_attention has no cap; on CPUs it multiplies bfloat16 weights and values as float32,
    # which is slower
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores = scores * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores).astype(q.dtype)
    attended = jnp.einsum("bkgts,bskd->btkgd", weights, v, preferred_element_type=jnp.float32)
    return attended.astype(q.dtype).reshape(q.shape)
