"""The causal decoder that Llama, Gemma, Phi-3, GPT-2 and their kin share; a family says how it differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from enmp_jax.devices.matmul import times_transposed
from enmp_jax.errors import UserError
from enmp_jax.models import parameters
from enmp_jax.models.base import Backbone, Inputs, Params
from enmp_jax.models.block import BlockSpec, declare_layers
from enmp_jax.models.causal import causal_mask, positions, rotary
from enmp_jax.models.layers import Rotary, Stream, Windowed, normalise
from enmp_jax.models.names import Spelling
from enmp_jax.models.quantised import dense
from enmp_jax.models.rope import Rope
from enmp_jax.models.transformer import last_token, transformer


@dataclass(frozen=True)
class DecoderConfig:
    """A causal model.

    Attributes:
        block: a layer.
        n_layers: how many.
        vocabulary: number of tokens.
        head: where next-token logits come from: ``lm_head``, ``tied`` (the embeddings) or, for a sequence
            classifier's checkpoint, None.
        raw: config.json.
        rope: rotary angles; None: positions are learned.
        positions: number of learned positions.
        window: a token sees so many tokens back, itself included; None: all.
        windowed: which layers have the window; empty: all of them.
        window_rope: rotary angles of the layers with a window; None: those of the others.
        embed_scale: what embeddings are multiplied with.
        softcap: logits become ``softcap tanh(logit / softcap)``; None: they stay.
    """

    block: BlockSpec
    n_layers: int
    vocabulary: int
    head: str | None
    raw: Mapping[str, Any] = field(hash=False)
    rope: Rope | None = None
    positions: int | None = None
    window: int | None = None
    windowed: tuple[bool, ...] = ()
    window_rope: Rope | None = None
    embed_scale: float | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Names:
    """Plain names of what a decoder has besides its layers."""

    tokens: str = "embed_tokens.weight"
    positions: str = "position_embeddings.weight"
    norm: str = "norm"


LLAMA_NAMES = Names()


def head_of(config: Mapping[str, Any], tied: bool = False) -> str | None:
    """``DecoderConfig.head`` of a config.json; ``tied``: what the family does unless told."""
    if any("ForSequenceClassification" in name for name in config.get("architectures") or ()):
        return None
    return "tied" if config.get("tie_word_embeddings", tied) else "lm_head"


def windowed_layers(config: Mapping[str, Any], n_layers: int, default: tuple[bool, ...]) -> tuple[bool, ...]:
    """``DecoderConfig.windowed`` from ``layer_types``; ``default`` where config.json has none.

    Raises:
        UserError: a kind of layer that is not known, or not one for each layer.
    """
    kinds = config.get("layer_types")
    if not kinds:
        return default
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown or len(kinds) != n_layers:
        fault = f"has {unknown[0]!r}" if unknown else f"has {len(kinds)} entries for {n_layers} layers"
        raise UserError(
            f"config.json: layer_types {fault}: it must say full_attention or sliding_attention per layer"
        )
    return tuple(kind == "sliding_attention" for kind in kinds)


def decoder(
    c: DecoderConfig, spelling: Spelling, layer: Mapping[str, str], names: Names = LLAMA_NAMES
) -> Backbone:
    """A causal model; features: the last token that is not padding, after the final norm.

    Padding belongs on the right. Positions count from 0.

    Args:
        c: the model.
        spelling: of its parameters.
        layer: see ``declare_layers``.
        names: of its other parameters.
    """
    block = c.block

    def table(name: str, rows: int, axes: parameters.Axes) -> parameters.Param:
        return parameters.normal(name, (rows, block.width), block.init_std, block.dtype, axes)

    tokens = ("vocab", "embed")
    declared: parameters.Declared = {
        "embeddings": {"tokens": table(names.tokens, c.vocabulary, tokens)},
        "layers": declare_layers(block, c.n_layers, layer),
        "norm": parameters.norm(names.norm, block.width, block.rms, 1.0 - block.norm_offset),
    }
    if c.positions is not None:
        declared["embeddings"]["positions"] = table(names.positions, c.positions, (None, "embed"))
    if c.head == "lm_head":
        declared["lm_head"] = {"weight": table("lm_head.weight", c.vocabulary, tokens)}

    def embed(params: Params, inputs: Inputs) -> Stream:
        _check_length(c, inputs)
        hidden = params["embeddings"]["tokens"][inputs["input_ids"]]
        if c.positions is not None:
            hidden = hidden + params["embeddings"]["positions"][positions(inputs)]
        if c.embed_scale is not None:
            hidden = hidden * jnp.asarray(c.embed_scale, hidden.dtype)
        mask, angles = causal_mask(inputs, None if c.windowed else c.window), _rotary(c.rope, inputs)
        windowed = None
        if c.windowed:
            near = causal_mask(inputs, c.window)
            near_angles = angles if c.window_rope is None else _rotary(c.window_rope, inputs)
            windowed = Windowed(jnp.asarray(c.windowed), near, near_angles)
        return Stream(hidden, mask, angles, last_token(inputs["attention_mask"]), windowed=windowed)

    def norm(params: Params, hidden: Array) -> Array:
        return normalise(hidden, params["norm"], block.eps, block.norm_offset)

    def pool(params: Params, hidden: Array, inputs: Inputs) -> Float[Array, "batch width"]:
        return norm(params, hidden[:, 0].astype(jnp.float32))

    def logits(params: Params, hidden: Array) -> Float[Array, "*token vocabulary"]:
        if c.head is None:
            raise UserError(
                "the base model is a sequence classifier: it has no language-model head to score with"
            )
        weight = params["embeddings"]["tokens"] if c.head == "tied" else params["lm_head"]["weight"]
        scores = times_transposed(norm(params, hidden), dense(weight), jnp.float32)
        return scores if c.softcap is None else c.softcap * jnp.tanh(scores / c.softcap)

    return transformer(
        str(c.raw["model_type"]),
        c,
        spelling,
        width=block.width,
        parameters=declared,
        embed=embed,
        pool=pool,
        input_spec={name: ((None,), jnp.int32) for name in ("input_ids", "attention_mask")},
        logits=logits,
    )


def _rotary(rope: Rope | None, inputs: Inputs) -> Rotary | None:
    if rope is None:
        return None
    cos, sin = rotary(rope.frequencies, inputs)
    return (cos, sin) if rope.scale == 1.0 else (rope.scale * cos, rope.scale * sin)


def _check_length(c: DecoderConfig, inputs: Inputs) -> None:
    """Refuse texts that are longer than positions or angles reach, where the shapes tell.

    Raises:
        UserError: too many tokens.
    """
    limit = c.positions if c.rope is None else c.rope.limit
    if "position" in inputs and "key_position" not in inputs:
        return  # several texts in one row: its length says nothing
    length = inputs["attention_mask"].shape[1]
    if limit is not None and length > limit:
        raise UserError(
            f"texts of {length} tokens: this base model ({c.raw['model_type']}) takes at most {limit}: "
            "give a smaller max_length"
        )
