"""BERT (Devlin et al., arXiv 1810.04805), MiniLM and RoBERTa encoders as in Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from enmp_jax.errors import UserError
from enmp_jax.models.base import Backbone, Inputs, Params
from enmp_jax.models.layers import BlockSpec, init_layers, init_norm, normalise
from enmp_jax.models.names import KeyTable
from enmp_jax.models.transformer import Embedded, init_normal, mean_pool, transformer

KEYS = KeyTable(
    prefix="bert.",
    file_prefix="bert.",
    prefixes=("base_model.model.", "bert."),
    layer="encoder.layer.{}.",
    modules={
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
    },
    norms={"norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm"},
    other={
        "embeddings/tokens": "embeddings.word_embeddings.weight",
        "embeddings/positions": "embeddings.position_embeddings.weight",
        "embeddings/types": "embeddings.token_type_embeddings.weight",
        "embeddings/norm/weight": "embeddings.LayerNorm.weight",
        "embeddings/norm/bias": "embeddings.LayerNorm.bias",
        "pooler/weight": "pooler.dense.weight",
        "pooler/bias": "pooler.dense.bias",
    },
    old_aliases=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
    ignored=r"pooler\.|cls\.|embeddings\.position_ids$",
    heads=("classifier",),
)
# RoBERTa's classifier is two layers: the first, with its tanh, is what BERT calls the pooler.
ROBERTA_KEYS = replace(
    KEYS,
    prefix="roberta.",
    file_prefix="roberta.",
    prefixes=("base_model.model.", "roberta."),
    other={
        **KEYS.other,
        "pooler/weight": "classifier.dense.weight",
        "pooler/bias": "classifier.dense.bias",
    },
    unprefixed=("classifier.dense.weight", "classifier.dense.bias"),
    ignored=r"pooler\.|lm_head\.|classifier\.dense\.|embeddings\.position_ids$",
    heads=("classifier.out_proj",),
)

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

    def init(key: Array) -> Params:
        keys = jax.random.split(key, 5)
        normal = partial(init_normal, std=block.init_std, dtype=block.dtype)
        embeddings = {
            "tokens": normal(keys[0], (c.vocabulary, block.width)),
            "positions": normal(keys[1], (c.positions, block.width)),
            "types": normal(keys[2], (c.types, block.width)),
            "norm": init_norm(block.width),
        }
        params = {"embeddings": embeddings, "layers": init_layers(keys[3], block, c.n_layers)}
        if c.pooling == "pooled":
            weight = normal(keys[4], (block.width, block.width))
            params["pooler"] = {"weight": weight, "bias": jnp.zeros(block.width, block.dtype)}
        return params

    def embed(params: Params, inputs: Inputs) -> Embedded:
        ids, e = inputs["input_ids"], params["embeddings"]
        types = inputs.get("token_type_ids")
        if c.pad is None:
            x = e["tokens"][ids] + e["positions"][: ids.shape[1]]
        else:
            real = (ids != c.pad).astype(jnp.int32)
            x = e["tokens"][ids] + e["positions"][jnp.cumsum(real, axis=1) * real + c.pad]
        x = x + (e["types"][0] if types is None else e["types"][types])
        x = normalise(x, e["norm"], block.eps)
        return Embedded(x, (inputs["attention_mask"] > 0)[:, None])

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
        ROBERTA_KEYS if roberta else KEYS,
        width=block.width,
        init=init,
        embed=embed,
        token=lambda inputs: None if c.pooling == "mean" else 0,
        pool=pool,
        input_spec=text if c.types < 2 else text | {"token_type_ids": ((None,), jnp.int32)},
    )
