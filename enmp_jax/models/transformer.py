"""A backbone from a family's parts: its parameters, how it embeds and how it pools."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from enmp_jax.deltas import Delta, Deltas
from enmp_jax.errors import UserError
from enmp_jax.models.base import Backbone, Inputs, Params
from enmp_jax.models.causal import next_token_log_likelihood
from enmp_jax.models.layers import KeyValues, Stream, extend_layers, layer_outputs, run_layers
from enmp_jax.models.names import Spelling
from enmp_jax.models.parameters import Declared, initialise


def transformer(
    family: str,
    config: Any,
    spelling: Spelling,
    *,
    width: int,
    parameters: Declared,
    embed: Callable[[Params, Inputs], Stream],
    pool: Callable[[Params, Array, Inputs], Float[Array, "batch width"]],
    input_spec: Mapping[str, tuple[tuple[int | None, ...], Any]],
    logits: Callable[[Params, Array], Float[Array, "*token vocabulary"]] | None = None,
) -> Backbone:
    """Put a backbone together.

    Args:
        family: key of ``FAMILIES``.
        config: the family's configuration, with ``block``, ``n_layers`` and ``raw``.
        spelling: of the family's parameters in files.
        width: of the features.
        parameters: those of the embeddings and the pooling, and ``layers`` (``declare_layers``).
        embed: from inputs to the first layer.
        pool: from the last hidden states (of one token if the stream names one) to float32 features.
        input_spec: see ``Backbone``.
        logits: causal models: from last hidden states to next-token logits, see ``Backbone``.
    """
    weights = {name: entry["weight"] for name, entry in parameters["layers"].items()}
    short = {  # a weight of a layer is [layer, out, in], that of a norm [layer, width]
        spelling.prefix + weight.name.removesuffix(".weight"): name
        for name, weight in weights.items()
        if len(weight.shape) == 3
    }

    remat = bool(config.raw.get("gradient_checkpointing", False))

    def run(params: Params, stream: Stream, deltas: Deltas | None = None, first: int | Array = 0) -> Array:
        by_name = _by_short_name(deltas, short)
        return run_layers(config.block, params["layers"], stream, by_name, first, remat)

    def features(params: Params, inputs: Inputs, deltas: Deltas | None = None) -> Array:
        return pool(params, run(params, embed(params, inputs), deltas), inputs)

    def features_from(
        params: Params, inputs: Inputs, hidden: Array, first: int | Array, deltas: Deltas | None = None
    ) -> Array:
        stream = embed(params, inputs)._replace(hidden=hidden)
        return pool(params, run(params, stream, deltas, first), inputs)

    def hidden_states(params: Params, inputs: Inputs, deltas: Deltas | None = None) -> Array:
        stream = embed(params, inputs)
        states = layer_outputs(config.block, params["layers"], stream, _by_short_name(deltas, short))
        return jnp.concatenate([stream.hidden[None], states])

    backbone = Backbone(
        family=family,
        n_layers=config.n_layers,
        width=width,
        modules={template: weights[name].shape[1:] for template, name in short.items()},
        parameters=parameters,
        init=partial(initialise, parameters),
        embed=embed,
        run=run,
        pool=pool,
        features=features,
        features_from=features_from,
        hidden_states=hidden_states,
        canonical=lambda template: _known(spelling.prefix + spelling.plain(template), short),
        input_spec=input_spec,
        config=config,
        spelling=spelling,
    )
    if logits is None:
        return backbone

    def log_likelihood(params: Params, inputs: Inputs, deltas: Deltas | None = None) -> Array:
        return scored(params, inputs, run(params, embed(params, inputs)._replace(token=None), deltas))

    def log_likelihood_from(
        params: Params, inputs: Inputs, hidden: Array, first: int | Array, deltas: Deltas | None = None
    ) -> Array:
        stream = embed(params, inputs)._replace(hidden=hidden, token=None)
        return scored(params, inputs, run(params, stream, deltas, first))

    def scored(params: Params, inputs: Inputs, hidden: Array) -> Array:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        return next_token_log_likelihood(partial(logits, params), hidden, ids, mask)

    def extend(
        params: Params, inputs: Inputs, cache: KeyValues, slot: int | Array, deltas: Deltas | None = None
    ) -> tuple[Array, KeyValues]:
        stream, own = embed(params, inputs), _by_short_name(deltas, short)
        return extend_layers(config.block, params["layers"], stream, own, cache, slot)

    return backbone._replace(
        logits=logits,
        extend=extend,
        log_likelihood=log_likelihood,
        log_likelihood_from=log_likelihood_from,
    )


def _known(template: str, modules: Mapping[str, str]) -> str | None:
    return template if template in modules else None


def _by_short_name(deltas: Deltas | None, modules: Mapping[str, str]) -> dict[str, Delta]:
    """Deltas by the layer's short names; ``modules`` maps templates to those.

    Raises:
        UserError: a template that the backbone does not have.
    """
    unknown = sorted(set(deltas or {}) - set(modules))
    if unknown:
        raise UserError(f"deltas for modules that the base model does not have: {', '.join(unknown)}")
    return {modules[name]: delta for name, delta in (deltas or {}).items()}


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
