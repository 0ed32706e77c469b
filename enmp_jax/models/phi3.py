"""Phi-3 (Abdin et al., arXiv 2404.14219) and Phi-4: Llama with fused projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from enmp_jax.models.base import Backbone
from enmp_jax.models.block import BlockSpec
from enmp_jax.models.decoder import DecoderConfig, decoder, head_of
from enmp_jax.models.llama import LAYER, SPELLING
from enmp_jax.models.rope import rope

FUSED = {
    "qkv": "layers.{}.self_attn.qkv_proj",
    "gate_up": "layers.{}.mlp.gate_up_proj",
    **{name: LAYER[name] for name in ("o", "down", "norm1", "norm2")},
}


def build(config: Mapping[str, Any], dtype: Any = jnp.float32) -> Backbone:
    """A causal model; see ``decoder``.

    Raises:
        UserError: sizes that do not fit each other, an unknown activation or RoPE.
    """
    block = BlockSpec(
        width=config.get("hidden_size", 3072),
        heads=config.get("num_attention_heads", 32),
        hidden=config.get("intermediate_size", 8192),
        activation=config.get("hidden_act", "silu"),
        eps=config.get("rms_norm_eps", 1e-5),
        kv_heads=config.get("num_key_value_heads"),
        rms=True,
        gated=True,
        fused=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        init_std=config.get("initializer_range", 0.02),
        dtype=jnp.dtype(dtype),
    )
    c = DecoderConfig(
        block,
        n_layers=config.get("num_hidden_layers", 32),
        vocabulary=config.get("vocab_size", 32064),
        head=head_of(config),
        raw=config,
        rope=rope(config, block.width // block.heads),
        window=config.get("sliding_window"),
    )
    return decoder(c, SPELLING, FUSED)
