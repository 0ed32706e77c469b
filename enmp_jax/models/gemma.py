"""Gemma (arXiv 2403.08295), Gemma 2 (arXiv 2408.00118) and the text model of Gemma 3 (arXiv 2503.19786)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from enmp_jax.errors import UserError
from enmp_jax.models.base import Backbone
from enmp_jax.models.block import BlockSpec
from enmp_jax.models.decoder import DecoderConfig, decoder, head_of, windowed_layers
from enmp_jax.models.llama import LAYER, SPELLING
from enmp_jax.models.rope import Rope, rope

# What follows attention has Llama's name for what precedes the MLP.
SANDWICH = LAYER | {
    "norm2": "layers.{}.pre_feedforward_layernorm",
    "post1": "layers.{}.post_attention_layernorm",
    "post2": "layers.{}.post_feedforward_layernorm",
}
PERIOD = {"gemma2": 2, "gemma3_text": 6}  # every so many layers one sees all tokens, unless layer_types says


def build(config: Mapping[str, Any], dtype: Any = jnp.float32) -> Backbone:
    """A causal model; see ``decoder``.

    Raises:
        UserError: sizes that do not fit each other, an unknown activation, RoPE or kind of layer; a model
            that is not causal.
    """
    kind = str(config["model_type"])
    if config.get("use_bidirectional_attention"):
        raise UserError("config.json: use_bidirectional_attention (EmbeddingGemma) is not supported")
    block, n_layers = _block(config, dtype), config.get("num_hidden_layers", 28 if kind == "gemma" else 26)
    full, near = _ropes(config, block.head_dim or 256)
    windowed: tuple[bool, ...] = ()
    if kind != "gemma":
        period = config.get("sliding_window_pattern", PERIOD[kind])
        default = tuple((i + 1) % period > 0 for i in range(n_layers))
        windowed = windowed_layers(config, n_layers, default)
    c = DecoderConfig(
        block,
        n_layers,
        vocabulary=config.get("vocab_size", 262208 if kind == "gemma3_text" else 256000),
        head=head_of(config, tied=True),
        raw=config,
        rope=full,
        window=config.get("sliding_window", 4096) if windowed else None,
        windowed=windowed,
        window_rope=near,
        embed_scale=block.width**0.5,
        softcap=config.get("final_logit_softcapping", 30.0 if kind == "gemma2" else None),
    )
    return decoder(c, SPELLING, LAYER if kind == "gemma" else SANDWICH)


def _block(config: Mapping[str, Any], dtype: Any) -> BlockSpec:
    kind = config["model_type"]
    activation = config.get("hidden_activation") or config.get("hidden_act") or "gelu_pytorch_tanh"
    bias = bool(config.get("attention_bias", False))
    softcap = config.get("attn_logit_softcapping", 50.0 if kind == "gemma2" else None)
    scalar = None if kind == "gemma" else config.get("query_pre_attn_scalar", 256)
    return BlockSpec(
        width=config.get("hidden_size", 3072 if kind == "gemma" else 2304),
        heads=config.get("num_attention_heads", 16 if kind == "gemma" else 8),
        hidden=config.get("intermediate_size", 24576 if kind == "gemma" else 9216),
        # the first releases of Gemma say gelu and mean its tanh form; so does transformers read them
        activation="gelu_pytorch_tanh" if (kind, activation) == ("gemma", "gelu") else activation,
        eps=config.get("rms_norm_eps", 1e-6),
        kv_heads=config.get("num_key_value_heads", 16 if kind == "gemma" else 4),
        head_dim=config.get("head_dim", 256),
        rms=True,
        sandwich=kind != "gemma",
        gated=True,
        qk_norm=kind == "gemma3_text",
        norm_offset=1.0,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=False,
        scale=None if scalar is None else scalar**-0.5,
        softcap=None if kind == "gemma" else softcap,
        init_std=config.get("initializer_range", 0.02),
        dtype=jnp.dtype(dtype),
    )


def _ropes(config: Mapping[str, Any], head_dim: int) -> tuple[Rope, Rope | None]:
    """Angles of the layers that see all tokens and of those with a window, where they differ (Gemma 3)."""
    if config["model_type"] != "gemma3_text":
        return rope(config, head_dim), None
    both = config.get("rope_parameters") or {}
    full = {"rope_theta": config.get("rope_theta", 1e6)} | (config.get("rope_scaling") or {})
    near = {"rope_theta": config.get("rope_local_base_freq", 1e4)}
    return (
        rope(config, head_dim, both.get("full_attention") or full),
        rope(config, head_dim, both.get("sliding_attention") or near),
    )
