"""Llama (Touvron et al., arXiv 2302.13971), Mistral, Qwen2 and Qwen3: causal models, one file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from enmp_jax.devices.matmul import times_transposed
from enmp_jax.errors import UserError
from enmp_jax.models import parameters
from enmp_jax.models.base import Backbone, Inputs, Params
from enmp_jax.models.causal import causal_mask, rotary
from enmp_jax.models.layers import BlockSpec, Stream, declare_layers, normalise
from enmp_jax.models.names import Spelling
from enmp_jax.models.quantised import dense
from enmp_jax.models.transformer import last_token, transformer

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


@dataclass(frozen=True)
class LlamaConfig:
    """Causal model. ``window``: a token sees so many tokens back, itself included; None: all.

    ``head`` says where next-token logits come from: ``lm_head``, ``tied`` (the embeddings) or, for a
    sequence classifier's checkpoint, None.
    """

    block: BlockSpec
    n_layers: int
    vocabulary: int
    frequencies: tuple[float, ...]
    window: int | None
    head: str | None
    raw: Mapping[str, Any] = field(hash=False)


def rope_frequencies(config: Mapping[str, Any], head_dim: int) -> tuple[float, ...]:
    """Angle per position of each pair of dimensions (RoPE, arXiv 2104.09864), Llama 3's scaling included.

    Reads ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (4).

    Raises:
        UserError: a kind of scaling that is not known.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    # as float32, step for step as transformers does, so that angles at position 8000 agree too
    exponent = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
    frequencies = (np.float32(1) / np.power(np.float32(theta), exponent)).astype(np.float32)
    if kind == "linear":
        frequencies = frequencies / np.float32(rope["factor"])
    elif kind == "llama3":
        original = rope["original_max_position_embeddings"]
        low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        wavelength = 2 * math.pi / frequencies
        smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
        frequencies = (1 - smooth) * frequencies / factor + smooth * frequencies
    elif kind != "default":
        raise UserError(f"config.json: rope type {kind!r} is not supported, only default, linear and llama3")
    return tuple(float(f) for f in frequencies)


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


def _window(config: Mapping[str, Any]) -> int | None:
    if config["model_type"] == "mistral":
        return config.get("sliding_window", 4096)
    if config.get("use_sliding_window", False):
        raise UserError("config.json: use_sliding_window (a window in some layers only) is not supported")
    return None


def _head(config: Mapping[str, Any]) -> str | None:
    if any("ForSequenceClassification" in name for name in config.get("architectures") or ()):
        return None
    return "tied" if config.get("tie_word_embeddings", False) else "lm_head"


def build(config: Mapping[str, Any], dtype: Any = jnp.float32) -> Backbone:
    """A causal model; features: the last token that is not padding, after the final norm.

    Padding belongs on the right. Positions count from 0.

    Raises:
        UserError: sizes that do not fit each other, an unknown activation, RoPE or window kind.
    """
    block = _block(config, dtype)
    frequencies = rope_frequencies(config, block.head_dim or block.width // block.heads)
    n_layers, vocabulary = config.get("num_hidden_layers", 32), config.get("vocab_size", 32000)
    c = LlamaConfig(block, n_layers, vocabulary, frequencies, _window(config), _head(config), config)

    def table(name: str) -> parameters.Param:
        shape = (c.vocabulary, block.width)
        return parameters.normal(name, shape, block.init_std, block.dtype, ("vocab", "embed"))

    declared = {
        "embeddings": {"tokens": table("embed_tokens.weight")},
        "layers": declare_layers(block, c.n_layers, LAYER),
        "norm": parameters.norm("norm", block.width, rms=True),
    }
    if c.head == "lm_head":
        declared["lm_head"] = {"weight": table("lm_head.weight")}

    def embed(params: Params, inputs: Inputs) -> Stream:
        hidden = params["embeddings"]["tokens"][inputs["input_ids"]]
        token = last_token(inputs["attention_mask"])
        return Stream(hidden, causal_mask(inputs, c.window), rotary(c.frequencies, inputs), token)

    def pool(params: Params, hidden: Array, inputs: Inputs) -> Float[Array, "batch width"]:
        return normalise(hidden[:, 0].astype(jnp.float32), params["norm"], block.eps)

    def logits(params: Params, hidden: Array) -> Float[Array, "*token vocabulary"]:
        if c.head is None:
            raise UserError(
                "the base model is a sequence classifier: it has no language-model head to score with"
            )
        hidden = normalise(hidden, params["norm"], block.eps)
        weight = params["embeddings"]["tokens"] if c.head == "tied" else params["lm_head"]["weight"]
        return times_transposed(hidden, dense(weight), jnp.float32)

    return transformer(
        str(config["model_type"]),
        c,
        SPELLING,
        width=block.width,
        parameters=declared,
        embed=embed,
        pool=pool,
        input_spec={name: ((None,), jnp.int32) for name in ("input_ids", "attention_mask")},
        logits=logits,
    )
