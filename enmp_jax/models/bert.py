"""BERT (Devlin et al., arXiv 1810.04805), MiniLM and RoBERTa encoders as in Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from enmp_jax.errors import UserError
from enmp_jax.models import parameters
from enmp_jax.models.base import Backbone, Inputs, Params
from enmp_jax.models.block import BlockSpec, declare_layers
from enmp_jax.models.layers import Stream, normalise
from enmp_jax.models.names import Spelling
from enmp_jax.models.transformer import mean_pool, transformer

SPELLING = Spelling(
    prefix="bert.",
    old_aliases=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
    ignored=r"pooler\.|cls\.|embeddings\.position_ids$",
    heads=("classifier",),
)
# RoBERTa's classifier is two layers: the first, with its tanh, is what BERT calls the pooler.
ROBERTA_SPELLING = replace(
    SPELLING,
    prefix="roberta.",
    unprefixed=("classifier.dense.weight", "classifier.dense.bias"),
    ignored=r"pooler\.|lm_head\.|classifier\.dense\.|embeddings\.position_ids$",
    heads=("classifier.out_proj",),
)
LAYER = {
    "q": "encoder.layer.{}.attention.self.query",
    "k": "encoder.layer.{}.attention.self.key",
    "v": "encoder.layer.{}.attention.self.value",
    "o": "encoder.layer.{}.attention.output.dense",
    "up": "encoder.layer.{}.intermediate.dense",
    "down": "encoder.layer.{}.output.dense",
    "norm1": "encoder.layer.{}.attention.output.LayerNorm",
    "norm2": "encoder.layer.{}.output.LayerNorm",
}

POOLINGS = ("pooled", "mean", "cls")


@dataclass(frozen=True)
class BertConfig:
    """Encoder. ``pad`` is RoBERTa's padding id, after which it counts positions; BERT has None."""

    block: BlockSpec
    n_layers: int
    vocabulary: int
    positions: int
    types: int
    pooling: str
    pad: int | None
    raw: Mapping[str, Any] = field(hash=False)


def build(config: Mapping[str, Any], dtype: Any = jnp.float32) -> Backbone:
    """A BERT-style encoder.

    The key ``pooling`` says what the features are: ``pooled`` (default: tanh of a linear layer on
    the first token, as sequence classifiers have it), ``mean`` (over the tokens that are not padding;
    sentence-transformers directories say so themselves) or ``cls`` (the first token).

    Raises:
        UserError: sizes that do not fit each other, an unknown activation, pooling or position type.
    """
    roberta = config["model_type"] != "bert"
    kind = config.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise UserError(f"config.json: position_embedding_type {kind!r} is not supported, only 'absolute'")
    pooling = config.get("pooling", "pooled")
    if pooling not in POOLINGS:
        raise UserError(f"config.json: pooling {pooling!r} is not known; known are {', '.join(POOLINGS)}")
    block = BlockSpec(
        width=config.get("hidden_size", 768),
        heads=config.get("num_attention_heads", 12),
        hidden=config.get("intermediate_size", 3072),
        activation=config.get("hidden_act", "gelu"),
        eps=config.get("layer_norm_eps", 1e-12),
        post_norm=True,
        init_std=config.get("initializer_range", 0.02),
        dtype=jnp.dtype(dtype),
    )
    c = BertConfig(
        block,
        n_layers=config.get("num_hidden_layers", 12),
        vocabulary=config.get("vocab_size", 50265 if roberta else 30522),
        positions=config.get("max_position_embeddings", 512),
        types=config.get("type_vocab_size", 2),
        pooling=pooling,
        pad=config.get("pad_token_id", 1) if roberta else None,
        raw=config,
    )

    def table(name: str, rows: int, axes: parameters.Axes | None = None) -> parameters.Param:
        name = f"embeddings.{name}_embeddings.weight"
        return parameters.normal(name, (rows, block.width), block.init_std, block.dtype, axes)

    declared = {
        "embeddings": {
            "tokens": table("word", c.vocabulary, ("vocab", "embed")),
            "positions": table("position", c.positions),
            "types": table("token_type", c.types),
            "norm": parameters.norm("embeddings.LayerNorm", block.width),
        },
        "layers": declare_layers(block, c.n_layers, LAYER),
    }
    if c.pooling == "pooled":
        name, shape = "classifier.dense" if roberta else "pooler.dense", (block.width, block.width)
        declared["pooler"] = parameters.linear(name, shape, block.init_std, block.dtype)

    def embed(params: Params, inputs: Inputs) -> Stream:
        ids, e = inputs["input_ids"], params["embeddings"]
        types = inputs.get("token_type_ids")
        if c.pad is None:
            x = e["tokens"][ids] + e["positions"][: ids.shape[1]]
        else:
            real = (ids != c.pad).astype(jnp.int32)
            x = e["tokens"][ids] + e["positions"][jnp.cumsum(real, axis=1) * real + c.pad]
        x = x + (e["types"][0] if types is None else e["types"][types])
        x = normalise(x, e["norm"], block.eps)
        token = None if c.pooling == "mean" else 0
        return Stream(x, (inputs["attention_mask"] > 0)[:, None], token=token)

    def pool(params: Params, hidden: Array, inputs: Inputs) -> Float[Array, "batch width"]:
        if c.pooling == "mean":
            return mean_pool(hidden, inputs["attention_mask"])
        x = hidden[:, 0].astype(jnp.float32)
        if c.pooling == "cls":
            return x
        weight, bias = (params["pooler"][k].astype(jnp.float32) for k in ("weight", "bias"))
        return jnp.tanh(x @ weight.T + bias)

    text = {name: ((None,), jnp.int32) for name in ("input_ids", "attention_mask")}
    return transformer(
        str(config["model_type"]),
        c,
        ROBERTA_SPELLING if roberta else SPELLING,
        width=block.width,
        parameters=declared,
        embed=embed,
        pool=pool,
        input_spec=text if c.types < 2 else text | {"token_type_ids": ((None,), jnp.int32)},
    )
