"""GPT-2 (Radford et al., 2019): learned positions, and weights that files hold as [in, out] (Conv1D)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from enmp_jax.errors import UserError
from enmp_jax.models.base import Backbone
from enmp_jax.models.block import BlockSpec
from enmp_jax.models.decoder import DecoderConfig, Names, decoder, head_of
from enmp_jax.models.names import Spelling

SPELLING = Spelling(
    prefix="transformer.",
    unprefixed=("lm_head.weight",),
    ignored=r"lm_head\.|h\.\d+\.attn\.(bias|masked_bias)$",
    heads=("score",),
)
LAYER = {
    "qkv": "h.{}.attn.c_attn",
    "o": "h.{}.attn.c_proj",
    "up": "h.{}.mlp.c_fc",
    "down": "h.{}.mlp.c_proj",
    "norm1": "h.{}.ln_1",
    "norm2": "h.{}.ln_2",
}
# Options of config.json that change the forward pass, and what they are unless set.
_PLAIN = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


def build(config: Mapping[str, Any], dtype: Any = jnp.float32) -> Backbone:
    """A causal model; see ``decoder``.

    Raises:
        UserError: sizes that do not fit each other, an unknown activation, options that are not supported.
    """
    for option, plain in _PLAIN.items():
        if config.get(option, plain) != plain:
            raise UserError(f"config.json: {option} {config[option]} is not supported, only {plain}")
    width = config.get("n_embd", 768)
    block = BlockSpec(
        width=width,
        heads=config.get("n_head", 12),
        hidden=config.get("n_inner") or 4 * width,
        activation=config.get("activation_function", "gelu_new"),
        eps=config.get("layer_norm_epsilon", 1e-5),
        fused=True,
        transposed=True,
        init_std=config.get("initializer_range", 0.02),
        dtype=jnp.dtype(dtype),
    )
    c = DecoderConfig(
        block,
        n_layers=config.get("n_layer", 12),
        vocabulary=config.get("vocab_size", 50257),
        head=head_of(config, tied=True),
        raw=config,
        positions=config.get("n_positions", 1024),
    )
    return decoder(c, SPELLING, LAYER, Names("wte.weight", "wpe.weight", "ln_f"))
