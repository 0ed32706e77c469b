"""What all causal language models share: who sees whom, and the vocabulary product where it is needed.

Inputs of a causal model are ``input_ids`` and ``attention_mask`` [batch, token] (padding on the right) and
may hold

- ``position`` [batch, token]: where a token stands in its own text; default: its index in the row.
- ``branch`` [batch, token]: several continuations of one prompt lie in one row, one after another. The
  tokens of branch 0 (the prompt) are seen by all that come later, those of another branch only by their
  own. Every continuation so gets what it would get in a row of its own, and the prompt is run once.
- ``target_ids`` and ``target_from`` [batch, target]: tokens whose probability is asked for, and the index in
  the row of the token before each. The last token of an answer need not be in the row. Padding: zeros.
- ``key_position`` [batch, slot]: the tokens are few and look at a cache of keys of these positions;
  ``attention_mask`` then tells which slots of the cache hold a token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from enmp_jax.deltas import Deltas
from enmp_jax.errors import UserError
from enmp_jax.models.base import Backbone, Inputs, Params
from enmp_jax.models.layers import KeyValues, Rotary

LOGITS_BYTES = 16 * 2**20
"""Most bytes of float32 logits that one model holds at a time."""


def positions(inputs: Inputs) -> Int[Array, "batch token"]:
    """Where each token stands in its text, from 0."""
    ids = inputs["input_ids"]
    given = inputs.get("position")
    return jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape) if given is None else given


def causal_mask(inputs: Inputs, window: int | None = None) -> Bool[Array, "batch token slot"]:
    """True where a token may look at another: a real one of its text, not later than itself.

    Args:
        inputs: see the module.
        window: how many tokens back a token sees, itself included; None: all.
    """
    query = positions(inputs)
    key = inputs.get("key_position", query)
    back = query[:, :, None] - key[:, None, :]
    visible = (back >= 0) & (inputs["attention_mask"] > 0)[:, None]
    if window is not None:
        visible &= back < window
    branch = inputs.get("branch")
    if branch is not None:
        visible &= (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    return visible


def rotary(frequencies: tuple[float, ...], inputs: Inputs) -> Rotary:
    """Cosines and sines of each token's position (RoPE, arXiv 2104.09864).

    Args:
        frequencies: angle per position of each pair of dimensions.
        inputs: see the module.
    """
    angle = positions(inputs).astype(jnp.float32)[..., None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angle), jnp.sin(angle)


def empty_cache(backbone: Backbone, batch: int, slots: int) -> KeyValues:
    """A cache of zeros for ``Backbone.extend``."""
    s = backbone.config.block
    shape = (backbone.n_layers, batch, slots, s.kv_heads or s.heads, s.head_dim or s.width // s.heads)
    return KeyValues(jnp.zeros(shape, s.dtype), jnp.zeros(shape, s.dtype))


def in_blocks(
    logits: Callable[[Float[Array, "token width"]], Float[Array, "token vocabulary"]],
    read: Callable[..., Any],
    hidden: Float[Array, "*batch width"],
    *others: Array,
) -> Any:
    """``read(logits(hidden), *others)``, a block of positions at a time, so that few logits exist at once.

    The backward pass computes the logits of a block again instead of keeping them.

    Args:
        logits: see ``Backbone.logits``, its parameters given.
        read: from the logits of positions [n, vocabulary] and the others' rows [n, ...] to arrays [n, ...].
        hidden: last hidden states.
        others: more arrays with the same leading axes.
    """
    batch, n = hidden.shape[:-1], hidden[..., 0].size
    flat = [x.reshape(n, *x.shape[len(batch) :]) for x in (hidden, *others)]
    vocabulary = jax.eval_shape(logits, flat[0]).shape[-1]
    blocks = -(-n * 4 * vocabulary // LOGITS_BYTES)
    size = -(-n // blocks)
    padded = [jnp.pad(x, ((0, blocks * size - n), *[(0, 0)] * (x.ndim - 1))) for x in flat]
    folded = [x.reshape(blocks, size, *x.shape[1:]) for x in padded]
    found = lax.map(jax.checkpoint(lambda rows: read(logits(rows[0]), *rows[1:])), tuple(folded))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n].reshape(*batch, *x.shape[2:]), found)


def log_probability(
    logits: Float[Array, "token vocabulary"], target: Int[Array, " token"]
) -> Float[Array, " token"]:
    """Log probability (nats) of the given token at each position."""
    chosen = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=1)


def at_answers(
    backbone: Backbone,
    params: Params,
    inputs: Inputs,
    read: Callable[..., Any],
    *others: Array,
    deltas: Deltas | None = None,
    hidden: Float[Array, "batch token width"] | None = None,
    first: int | Array = 0,
) -> Any:
    """Read the next-token logits before the target tokens of every row; no others are computed.

    Args:
        backbone: a causal model.
        params: its parameters.
        inputs: see the module; with ``target_from``.
        read: see ``in_blocks``.
        others: what ``read`` needs besides, [batch, target, ...].
        deltas: what is added to the weights.
        hidden: states that enter layer ``first``; default: the embeddings.
        first: see ``Backbone``.

    Returns:
        What ``read`` returns, [batch, target, ...].

    Raises:
        UserError: the base model has no language-model head.
    """
    logits = backbone.logits
    if logits is None:
        raise UserError(f"the base model is a {backbone.family} encoder: it has no next-token logits")
    stream = backbone.embed(params, inputs)._replace(token=inputs["target_from"])
    stream = stream if hidden is None else stream._replace(hidden=hidden)
    states = backbone.run(params, stream, deltas, first)
    return in_blocks(partial(logits, params), read, states, *others)


def answer_log_probabilities(
    backbone: Backbone, params: Params, inputs: Inputs, deltas: Deltas | None = None
) -> Float[Array, "batch target"]:
    """Log probability (nats, float32) of the target tokens; arguments as in ``at_answers``."""
    return at_answers(backbone, params, inputs, log_probability, inputs["target_ids"], deltas=deltas)


def next_token_log_likelihood(
    logits: Callable[[Float[Array, "token width"]], Float[Array, "token vocabulary"]],
    hidden: Float[Array, "batch token width"],
    ids: Int[Array, "batch token"],
    mask: Int[Array, "batch token"],
) -> Float[Array, "batch token"]:
    """Log probability of each token's successor, float32; 0 where that is padding, and at the end."""
    target = jnp.roll(ids, -1, axis=1)
    real = (mask > 0) & (jnp.roll(mask, -1, axis=1) > 0)
    real = real.at[:, -1].set(False)
    return jnp.where(real, in_blocks(logits, log_probability, hidden, target), 0.0)


def choice_scores(
    log_probability: Float[Array, "*batch target"],
    target_branch: Int[Array, "*batch target"],
    choice_length: Float[Array, "*batch choice"],
) -> Float[Array, "*batch choice"]:
    """Score of each choice: the log-likelihood of its tokens given the prompt, divided by its length.

    Args:
        log_probability: of the choices' tokens.
        target_branch: c + 1 for a token of choice c; 0: padding.
        choice_length: 1 for the sum, its number of tokens for the mean; 0: there is no such choice, which
            gets -inf.
    """
    choice = jnp.arange(1, choice_length.shape[-1] + 1)
    own = target_branch[..., None, :] == choice[:, None]
    total = jnp.sum(jnp.where(own, log_probability[..., None, :], 0.0), axis=-1)
    there = choice_length > 0
    return jnp.where(there, total / jnp.where(there, choice_length, 1.0), -jnp.inf)


def language_model_loss(
    log_likelihood: Float[Array, "batch token"], mask: Int[Array, "batch token"]
) -> Float[Array, ""]:
    """Mean negative log-likelihood per predicted token (nats), as Hugging Face's causal loss."""
    predicted = (mask[:, 1:] > 0) & (mask[:, :-1] > 0)
    return -jnp.sum(log_likelihood) / jnp.maximum(jnp.sum(predicted), 1)
