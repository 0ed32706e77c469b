"""A backbone from a family's parts: what it embeds, which token it reads, how it pools."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from enmp_jax.deltas import Deltas
from enmp_jax.models.base import Backbone, Inputs, Params
from enmp_jax.models.layers import Rotary, run_layers, short_deltas
from enmp_jax.models.names import KeyTable


class Embedded(NamedTuple):
    """What goes into the first layer; ``mask`` is True where a query may look at a token."""

    x: Float[Array, "batch token width"]
    mask: Bool[Array, "#batch #query token"] | None = None
    rotary: Rotary | None = None


def transformer(
    family: str,
    config: Any,
    keys: KeyTable,
    *,
    width: int,
    init: Callable[[Array], Params],
    embed: Callable[[Params, Inputs], Embedded],
    token: Callable[[Inputs], Int[Array, " batch"] | int | None],
    pool: Callable[[Params, Float[Array, "batch token width"], Inputs], Float[Array, "batch width"]],
    input_spec: Mapping[str, tuple[tuple[int | None, ...], Any]],
) -> Backbone:
    """Put a backbone together.

    Args:
        family: key of ``FAMILIES``.
        config: the family's configuration, with ``block``, ``n_layers`` and ``raw``.
        keys: the family's key table.
        width: of the features.
        init: random parameters: those of the embeddings and the pooling, and ``layers``.
        embed: from inputs to the first layer.
        token: which token the features are made of (computed in the last layer for that token only),
            or None for all.
        pool: from the last hidden states (one token if ``token`` says so) to float32 features.
        input_spec: see ``Backbone``.
    """
    short, shapes = keys.modules_by_template(), config.block.shapes()

    def features(params: Params, inputs: Inputs, deltas: Deltas | None = None) -> Float[Array, "batch width"]:
        e = embed(params, inputs)
        hidden, _ = run_layers(
            config.block,
            params["layers"],
            e.x,
            short_deltas(deltas, short),
            mask=e.mask,
            rotary=e.rotary,
            token=token(inputs),
        )
        return pool(params, hidden, inputs)

    def hidden_states(params: Params, inputs: Inputs, deltas: Deltas | None = None) -> Array:
        e = embed(params, inputs)
        _, states = run_layers(
            config.block, params["layers"], e.x, short_deltas(deltas, short), mask=e.mask, rotary=e.rotary
        )
        return jnp.concatenate([e.x[None], states])

    return Backbone(
        family=family,
        n_layers=config.n_layers,
        width=width,
        modules={template: shapes[name] for template, name in short.items()},
        init=init,
        features=features,
        canonical=keys.canonical,
        input_spec=input_spec,
        config=config,
        keys=keys,
        hidden_states=hidden_states,
    )


def init_normal(key: Array, shape: tuple[int, ...], std: float, dtype: Any) -> Array:
    """Truncated normal weights, as Hugging Face starts embeddings with."""
    return std * jax.random.truncated_normal(key, -2, 2, shape, dtype)


def last_token(mask: Int[Array, "batch token"]) -> Int[Array, " batch"]:
    """Index of the last token that is not padding, on either side; 0 where all is padding."""
    return jnp.argmax(jnp.where(mask > 0, jnp.arange(1, mask.shape[1] + 1), 0), axis=1)


def mean_pool(
    hidden: Float[Array, "batch token width"], mask: Int[Array, "batch token"]
) -> Float[Array, "batch width"]:
    """Mean over the tokens that are not padding, in float32."""
    weight = (mask > 0).astype(jnp.float32)[..., None]
    total = jnp.sum(hidden.astype(jnp.float32) * weight, axis=1)
    return total / jnp.maximum(jnp.sum(weight, axis=1), 1.0)
