"""Greedy decoding with a cache of keys and values, for all members of a population in one compiled call.

Prompts are padded on the right. The new tokens go to the slots after the longest prompt, the same slot for
all rows; what lies between a shorter prompt's end and its first new token is never looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from enmp_jax.deltas import Deltas, member_axes
from enmp_jax.errors import UserError
from enmp_jax.models.base import Backbone, Params
from enmp_jax.models.causal import empty_cache
from enmp_jax.models.layers import KeyValues, take_token


class Decoding(NamedTuple):
    """Texts under way, of every member.

    Attributes:
        cache: keys and values of all tokens but the newest.
        tokens: what was generated so far; what is not there yet, or comes after the end, is the first end
            token.
        newest: the token that was generated last.
        done: True where an end token has come.
        length: tokens of each prompt; members share them.
        made: how many tokens have been generated.
    """

    cache: KeyValues
    tokens: Int[Array, "member batch new"]
    newest: Int[Array, "member batch"]
    done: Bool[Array, "member batch"]
    length: Int[Array, " batch"]
    made: Int[Array, ""]


def generate(
    backbone: Backbone,
    params: Params,
    deltas: Deltas | None,
    tokens: Int[Array, "batch token"],
    lengths: Int[Array, " batch"],
    max_new_tokens: int,
    eos: tuple[int, ...],
) -> Int[Array, "member batch new"]:
    """The likeliest next token again and again, until an end token. Call it under ``jit``.

    Stops as soon as all texts of all members have ended.

    Args:
        backbone: a causal model.
        params: its parameters, shared by all members.
        deltas: of all members: cores (of dense deltas, weights) have a leading member axis. None: the base
            model, one member.
        tokens: prompts, padded on the right with anything.
        lengths: tokens of each prompt, 1 or more.
        max_new_tokens: most tokens that are generated, the end token included.
        eos: the tokens that end a text; static. The rest of the row is filled with the first of them.

    Raises:
        UserError: the base model has no language-model head.
    """
    started = start(backbone, params, deltas, tokens, lengths, max_new_tokens, eos)
    return advance(backbone, params, deltas, started, max_new_tokens, eos).tokens


def start(
    backbone: Backbone,
    params: Params,
    deltas: Deltas | None,
    tokens: Int[Array, "batch token"],
    lengths: Int[Array, " batch"],
    max_new_tokens: int,
    eos: tuple[int, ...],
) -> Decoding:
    """Read the prompts and generate the first token; arguments as in ``generate``."""
    if backbone.extend is None:
        raise UserError(f"the base model is a {backbone.family} encoder: it generates no text")
    batch, width = tokens.shape
    real = (jnp.arange(width) < lengths[:, None]).astype(jnp.int32)
    inputs = {"input_ids": tokens, "attention_mask": real}

    def member(own: Deltas | None) -> tuple[KeyValues, Array]:
        hidden, cache = backbone.extend(params, inputs, empty_cache(backbone, batch, width), 0, own)  # type: ignore[misc]
        room = [(0, 0), (0, 0), (0, max_new_tokens - 1), (0, 0), (0, 0)]
        longer = KeyValues(*(jnp.pad(x, room) for x in cache))
        return longer, _likeliest(backbone, params, take_token(hidden, lengths - 1))

    cache, newest = _over_members(member, deltas)
    members = newest.shape[0]
    found = jnp.full((members, batch, max_new_tokens), eos[0], jnp.int32).at[..., 0].set(newest)
    return Decoding(cache, found, newest, _ended(newest, eos), lengths, jnp.int32(1))


def advance(
    backbone: Backbone,
    params: Params,
    deltas: Deltas | None,
    decoding: Decoding,
    stop: int | Array,
    eos: tuple[int, ...],
) -> Decoding:
    """Generate until there are ``stop`` tokens or all texts have ended; arguments as in ``generate``."""
    slots, width = decoding.cache.keys.shape[3], decoding.cache.keys.shape[3] - decoding.tokens.shape[2] + 1
    slot, length = jnp.arange(slots), decoding.length[:, None]
    # later slots have later positions, so that the causal mask hides what is not generated yet
    shared = {
        "attention_mask": ((slot < length) | (slot >= width)).astype(jnp.int32),
        "key_position": jnp.where(slot < width, slot, length + slot - width),
    }

    def going(state: Decoding) -> Array:
        return (state.made < stop) & ~state.done.all()

    def step(state: Decoding) -> Decoding:
        done = state.made - 1  # tokens whose keys are in the cache

        def member(own: Deltas | None, cache: KeyValues, newest: Array) -> tuple[KeyValues, Array]:
            inputs = {"input_ids": newest[:, None], "position": length + done, **shared}
            hidden, cache = backbone.extend(params, inputs, cache, width + done, own)  # type: ignore[misc]
            return cache, _likeliest(backbone, params, hidden)

        cache, newest = _over_members(member, deltas, state.cache, state.newest)
        newest = jnp.where(state.done, eos[0], newest)
        tokens = jax.lax.dynamic_update_index_in_dim(state.tokens, newest, state.made, 2)
        return Decoding(cache, tokens, newest, state.done | _ended(newest, eos), state.length, state.made + 1)

    return jax.lax.while_loop(going, step, decoding)


def one_member(deltas: Deltas) -> Deltas:
    """The deltas of one model as those of a population of one."""
    return jax.tree.map(
        lambda x, axis: x if axis is None else x[None],
        deltas,
        {name: member_axes(delta) for name, delta in deltas.items()},
        is_leaf=lambda x: x is None,
    )


def _over_members(
    function: Callable[..., tuple[KeyValues, Array]], deltas: Deltas | None, *others: Any
) -> tuple[KeyValues, Array]:
    """vmap over the members' deltas and the leading axis of the others."""
    if deltas is None:
        one = jax.tree.map(lambda x: x[0], others)
        return jax.tree.map(lambda x: x[None], function(None, *one))
    axes = {name: member_axes(delta) for name, delta in deltas.items()}
    return jax.vmap(function, in_axes=(axes, *[0] * len(others)))(deltas, *others)


def _likeliest(
    backbone: Backbone, params: Params, hidden: Float[Array, "batch 1 width"]
) -> Int[Array, " batch"]:
    return jnp.argmax(backbone.logits(params, hidden[:, 0]), axis=-1).astype(jnp.int32)  # type: ignore[misc]


def _ended(token: Int[Array, "*batch"], eos: tuple[int, ...]) -> Bool[Array, "*batch"]:
    return jnp.isin(token, jnp.asarray(eos))
