"""Llama (Touvron et al., arXiv 2302.13971), Mistral, Qwen2 and Qwen3: causal models, one file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from enmp_jax.models.base import Backbone
from enmp_jax.models.block import BlockSpec
from enmp_jax.models.decoder import DecoderConfig, decoder, head_of, windowed_layers
from enmp_jax.models.names import Spelling
from enmp_jax.models.rope import rope

SPELLING = Spelling(
    prefix="model.",
    unprefixed=("lm_head.weight",),
    ignored=r"lm_head\.|.*rotary_emb\.inv_freq$",
    heads=("score",),
)
LAYER = {
    "q": "layers.{}.self_attn.q_proj",
    "k": "layers.{}.self_attn.k_proj",
    "v": "layers.{}.self_attn.v_proj",
    "o": "layers.{}.self_attn.o_proj",
    "gate": "layers.{}.mlp.gate_proj",
    "up": "layers.{}.mlp.up_proj",
    "down": "layers.{}.mlp.down_proj",
    "norm1": "layers.{}.input_layernorm",
    "norm2": "layers.{}.post_attention_layernorm",
    "q_norm": "layers.{}.self_attn.q_norm",
    "k_norm": "layers.{}.self_attn.k_norm",
}


def _block(config: Mapping[str, Any], dtype: Any) -> BlockSpec:
    kind = config["model_type"]
    bias = bool(config.get("attention_bias", False))
    default_kv = {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(kind)
    return BlockSpec(
        width=config.get("hidden_size", 4096),
        heads=config.get("num_attention_heads", 32),
        hidden=config.get("intermediate_size", 11008),
        activation=config.get("hidden_act", "silu"),
        eps=config.get("rms_norm_eps", 1e-6),
        kv_heads=config.get("num_key_value_heads", default_kv),
        head_dim=config.get("head_dim") or (128 if kind == "qwen3" else None),
        rms=True,
        gated=True,
        qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2" or (kind != "mistral" and bias),
        o_bias=kind in ("llama", "qwen3") and bias,
        mlp_bias=kind == "llama" and bool(config.get("mlp_bias", False)),
        init_std=config.get("initializer_range", 0.02),
        dtype=jnp.dtype(dtype),
    )


def _windows(config: Mapping[str, Any], n_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """Size of the window, and which layers have it (none named: all)."""
    if config["model_type"] == "mistral":
        return config.get("sliding_window", 4096), ()
    if not config.get("use_sliding_window", False):
        return None, ()
    first = config.get("max_window_layers", 28)
    default = tuple(i >= first for i in range(n_layers))
    return config.get("sliding_window", 4096), windowed_layers(config, n_layers, default)


def build(config: Mapping[str, Any], dtype: Any = jnp.float32) -> Backbone:
    """A causal model; see ``decoder``.

    Raises:
        UserError: sizes that do not fit each other, an unknown activation, RoPE or kind of layer.
    """
    block = _block(config, dtype)
    n_layers = config.get("num_hidden_layers", 32)
    window, windowed = _windows(config, n_layers)
    c = DecoderConfig(
        block,
        n_layers,
        vocabulary=config.get("vocab_size", 32000),
        head=head_of(config),
        raw=config,
        rope=rope(config, block.head_dim or block.width // block.heads),
        window=window,
        windowed=windowed,
    )
    return decoder(c, SPELLING, LAYER)
