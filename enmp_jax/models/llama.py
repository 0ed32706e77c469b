"""Llama (Touvron et al., arXiv 2302.13971), Mistral, Qwen2 and Qwen3: causal models, one file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from enmp_jax.errors import UserError
from enmp_jax.models import parameters
from enmp_jax.models.base import Backbone, Inputs, Params
from enmp_jax.models.layers import BlockSpec, Rotary, Stream, declare_layers, normalise
from enmp_jax.models.names import Spelling
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
        ids = inputs["input_ids"]
        position = jnp.arange(ids.shape[1])
        back = position[:, None] - position[None, :]
        visible = (back >= 0) if c.window is None else (back >= 0) & (back < c.window)
        mask = visible[None] & (inputs["attention_mask"] > 0)[:, None]
        hidden, token = params["embeddings"]["tokens"][ids], last_token(inputs["attention_mask"])
        return Stream(hidden, mask, _rotary(c.frequencies, ids), token)

    def pool(params: Params, hidden: Array, inputs: Inputs) -> Float[Array, "batch width"]:
        return normalise(hidden[:, 0].astype(jnp.float32), params["norm"], block.eps)

    def score(params: Params, hidden: Array, inputs: Inputs) -> Float[Array, "batch token"]:
        if c.head is None:
            raise UserError(
                "the base model is a sequence classifier: it has no language-model head to score with"
            )
        hidden = normalise(hidden, params["norm"], block.eps)
        weight = params["embeddings"]["tokens"] if c.head == "tied" else params["lm_head"]["weight"]
        return next_token_log_likelihood(hidden, weight, inputs["input_ids"], inputs["attention_mask"])

    return transformer(
        str(config["model_type"]),
        c,
        SPELLING,
        width=block.width,
        parameters=declared,
        embed=embed,
        pool=pool,
        input_spec={name: ((None,), jnp.int32) for name in ("input_ids", "attention_mask")},
        score=score,
    )


def _rotary(frequencies: tuple[float, ...], ids: Int[Array, "batch token"]) -> Rotary:
    angle = jnp.arange(ids.shape[1], dtype=jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)
    angle = jnp.broadcast_to(angle, (ids.shape[0], *angle.shape))
    return jnp.cos(angle), jnp.sin(angle)


def next_token_log_likelihood(
    hidden: Float[Array, "batch token width"],
    weight: Float[Array, "vocabulary width"],
    ids: Int[Array, "batch token"],
    mask: Int[Array, "batch token"],
) -> Float[Array, "batch token"]:
    """Log probability of each token's successor, float32; 0 where that is padding, and at the end.

    One example at a time, so that logits take tokens x vocabulary, not that times the batch.
    """
    target = jnp.roll(ids, -1, axis=1)
    real = (mask > 0) & (jnp.roll(mask, -1, axis=1) > 0)
    real = real.at[:, -1].set(False)

    def one(example: tuple[Array, Array]) -> Array:
        states, wanted = example
        logits = jnp.einsum("td,vd->tv", states, weight, preferred_element_type=jnp.float32)
        chosen = jnp.take_along_axis(logits, wanted[:, None], axis=1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=1)

    return jnp.where(real, lax.map(one, (hidden, target)), 0.0)


def option_scores(
    log_likelihood: Float[Array, "*options token"],
    option: Int[Array, "*options token"],
    per_token: bool = False,
) -> Float[Array, "*options"]:
    """Score of each option of a choice task: the log-likelihood of its own tokens given the prompt.

    Args:
        log_likelihood: of ``prompt + option`` sequences, from ``Backbone.log_likelihood``.
        option: 1 on the tokens of the option, 0 on prompt and padding.
        per_token: divide by the number of tokens, so that long options are not at a disadvantage.
    """
    # column t scores token t + 1
    scored = jnp.roll(option, -1, axis=-1).at[..., -1].set(0) > 0
    total = jnp.sum(jnp.where(scored, log_likelihood, 0.0), axis=-1)
    return total / jnp.maximum(jnp.sum(scored, axis=-1), 1) if per_token else total


def language_model_loss(
    log_likelihood: Float[Array, "batch token"], mask: Int[Array, "batch token"]
) -> Float[Array, ""]:
    """Mean negative log-likelihood per predicted token (nats), as Hugging Face's causal loss."""
    predicted = (mask[:, 1:] > 0) & (mask[:, :-1] > 0)
    return -jnp.sum(log_likelihood) / jnp.maximum(jnp.sum(predicted), 1)
