"""The transformer layer that all families share, and the loop over layers; deltas are applied unmerged."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from enmp_jax.deltas import Delta, Dense, LowRank
from enmp_jax.devices.matmul import bfloat16_on_cpu, times_transposed
from enmp_jax.models.attention import attend
from enmp_jax.models.block import ACTIVATIONS, BlockSpec
from enmp_jax.models.quantised import dense


def linear(
    x: Float[Array, "*batch in"], params: Mapping[str, Any], delta: Delta | None = None
) -> Float[Array, "*batch out"]:
    """``x (W + delta)^T + b``; no ``b`` where ``params`` has no bias.

    Low-rank deltas stay factored, so that population members share the weight; a dense delta belongs
    to one member anyway, and adding it first saves the second large product.
    """
    weight = dense(params["weight"])
    if isinstance(delta, Dense):
        weight = (weight + delta.weight).astype(weight.dtype)
    y = times_transposed(x, weight)
    if "bias" in params:
        y = y + params["bias"]
    return y + delta.apply(x) if isinstance(delta, LowRank) else y


def normalise(
    x: Float[Array, "*batch width"], params: Mapping[str, Array], eps: float, offset: float = 0.0
) -> Float[Array, "*batch width"]:
    """LayerNorm, or RMSNorm where ``params`` has no bias, over the last axis; float32 inside.

    Args:
        x: inputs.
        params: ``weight`` and maybe ``bias``.
        eps: added to the mean square.
        offset: added to the weight.
    """
    y = x.astype(jnp.float32)
    if "bias" in params:
        y = y - jnp.mean(y, -1, keepdims=True)
    weight = params["weight"] + offset if offset else params["weight"]
    y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps) * weight
    return (y + params["bias"] if "bias" in params else y).astype(x.dtype)


Rotary = tuple[Float[Array, "batch token half"], Float[Array, "batch token half"]]


def rotate(x: Float[Array, "batch token heads dim"], rotary: Rotary) -> Float[Array, "batch token heads dim"]:
    """Rotary position embedding, halves convention (Llama); computed in float32.

    Dimensions beyond twice the number of angles stay as they are (Phi-4's partial rotation).
    """
    cos, sin = (part[:, :, None, :] for part in rotary)
    half = cos.shape[-1]
    a, b, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1).astype(x.dtype)


Tokens = Int[Array, " batch"] | Int[Array, "batch query"] | int


def take_token(x: Shaped[Array, "batch token *rest"], token: Tokens) -> Array:
    """The given token of each example, or tokens; the token axis stays, with that size."""
    if isinstance(token, int):
        return lax.slice_in_dim(x, token, token + 1, axis=1)
    index = token.reshape((token.shape[0], -1) + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


class Windowed(NamedTuple):
    """What the layers with a sliding window need instead of the other layers' mask and rotary angles.

    Attributes:
        layers: True for these layers.
        mask: their ``Stream.mask``.
        rotary: their ``Stream.rotary``.
    """

    layers: Bool[Array, " layer"]
    mask: Bool[Array, "#batch #query token"] | None
    rotary: Rotary | None


class KeyValues(NamedTuple):
    """Keys and values of tokens, of one layer or stacked [layer, ..]; those of a cache lie in its slots."""

    keys: Float[Array, "*layer batch slot kv_heads dim"]
    values: Float[Array, "*layer batch slot kv_heads dim"]

    def put(self, own: KeyValues, slot: int | Array) -> KeyValues:
        """The cache of one layer with the keys and values of new tokens in the slots from ``slot`` on."""
        return KeyValues(*(lax.dynamic_update_slice_in_dim(a, b, slot, 1) for a, b in zip(self, own)))


class Stream(NamedTuple):
    """Hidden states on their way through the layers, and what every layer needs besides.

    Attributes:
        hidden: the hidden states.
        mask: True where a query may look at a token; None: everywhere.
        rotary: cosines and sines of the tokens' positions.
        token: the one token of each example that the features are made of, or the tokens that answers are
            read from: the last layer computes no other. None: all tokens.
        cache: of one layer, and the slot in it for the first of these tokens; all of it is attended to, so
            the mask is [batch, query, slot]. None: tokens attend to each other.
        windowed: where layers differ in their attention.
    """

    hidden: Float[Array, "batch token width"]
    mask: Bool[Array, "#batch #query token"] | None = None
    rotary: Rotary | None = None
    token: Tokens | None = None
    cache: tuple[KeyValues, int | Array] | None = None
    windowed: Windowed | None = None


def apply_layer(
    spec: BlockSpec, params: Mapping[str, Any], stream: Stream, deltas: Mapping[str, Delta]
) -> tuple[Float[Array, "batch query width"], KeyValues]:
    """One layer; only for the stream's ``token`` if it names any. Also the tokens' own keys and values.

    Args:
        spec: the layer.
        params: its parameters, by short name.
        stream: what enters it.
        deltas: by short name (see ``declare_layers``), of this layer.
    """
    s = spec
    x, mask, rotary, token, *_ = stream
    kv_heads = s.kv_heads or s.heads

    def project(name: str, inputs: Array) -> Array:
        return linear(inputs, params[name], deltas.get(name))

    def norm(name: str, inputs: Array) -> Array:
        return normalise(inputs, params[name], s.eps, s.norm_offset)

    def split(inputs: Array, heads: int) -> Array:
        return inputs.reshape(*inputs.shape[:-1], heads, -1)

    h = x if s.post_norm else norm("norm1", x)
    if s.fused:
        fused = split(project("qkv", h), s.heads + 2 * kv_heads)
        q, k, v = jnp.split(fused, (s.heads, s.heads + kv_heads), axis=-2)
    else:
        q, k, v = h, split(project("k", h), kv_heads), split(project("v", h), kv_heads)
    rotary_q = rotary
    if token is not None:
        x, q = take_token(x, token), take_token(q, token)
        if rotary is not None:
            rotary_q = (take_token(rotary[0], token), take_token(rotary[1], token))
        if mask is not None and mask.shape[1] > 1:
            mask = take_token(jnp.broadcast_to(mask, (x.shape[0], *mask.shape[1:])), token)
    q = q if s.fused else split(project("q", q), s.heads)
    if s.qk_norm:
        q, k = norm("q_norm", q), norm("k_norm", k)
    if rotary is not None and rotary_q is not None:
        q, k = rotate(q, rotary_q), rotate(k, rotary)
    own = KeyValues(k, v)
    if stream.cache is not None:
        k, v = stream.cache[0].put(own, stream.cache[1])
    attended = attend(q, k, v, mask, s.scale, s.softcap)
    h = project("o", attended.reshape(*attended.shape[:-2], -1))
    x = x + (norm("post1", h) if s.sandwich else h)
    if s.post_norm:
        x = norm("norm1", x)

    h = x if s.post_norm else norm("norm2", x)
    activation = ACTIVATIONS[s.activation]
    if s.fused and s.gated:
        gate, up = jnp.split(project("gate_up", h), 2, axis=-1)
        h = activation(gate) * up
    else:
        h = activation(project("gate", h)) * project("up", h) if s.gated else activation(project("up", h))
    h = project("down", h)
    x = x + (norm("post2", h) if s.sandwich else h)
    return (norm("norm2", x) if s.post_norm else x), own


def run_layers(
    spec: BlockSpec,
    params: Any,
    stream: Stream,
    deltas: Mapping[str, Delta],
    first: int | Array = 0,
    remat: bool = False,
) -> Float[Array, "batch query width"]:
    """The hidden states after the layers from ``first`` to the last, one compiled body.

    Args:
        spec: a layer.
        params: of all layers, stacked on axis 0.
        stream: what enters layer ``first``.
        deltas: by short name, with a leading layer axis.
        first: 0 to the number of layers. An array makes the number of steps unknown to the compiler: one
            program for every ``first``, but none that has a reverse-mode derivative.
        remat: keep no activations inside a layer for the backward pass but compute them again.

    Returns:
        Those of the tokens that the stream names, [batch, 1, width] for one, else of all tokens.
    """
    n_layers = jax.tree.leaves(params)[0].shape[0]
    apply = partial(_apply_indexed, spec, params, deltas)
    all_tokens = stream._replace(token=None)
    stop = n_layers if stream.token is None else n_layers - 1

    def step(i: Any, hidden: Array) -> Array:
        return apply(all_tokens._replace(hidden=hidden), i)[0]

    if isinstance(first, int):
        layers = jnp.arange(first, stop)
        one = jax.checkpoint(step, prevent_cse=False) if remat else step
        hidden, _ = lax.scan(lambda hidden, i: (one(i, hidden), None), stream.hidden, layers)
    else:
        hidden = lax.fori_loop(first, stop, step, stream.hidden)
    if stream.token is None:
        return hidden
    last, _ = apply(stream._replace(hidden=hidden), n_layers - 1)
    if isinstance(first, int) and first < n_layers:
        return last
    return jnp.where(first < n_layers, last, take_token(hidden, stream.token))


def layer_outputs(
    spec: BlockSpec, params: Any, stream: Stream, deltas: Mapping[str, Delta]
) -> Float[Array, "layer batch token width"]:
    """The hidden states of all tokens after each layer; arguments as in ``run_layers``."""
    all_tokens = stream._replace(token=None)

    def step(hidden: Array, i: Array) -> tuple[Array, Array]:
        hidden, _ = _apply_indexed(spec, params, deltas, all_tokens._replace(hidden=hidden), i)
        return hidden, hidden

    return lax.scan(step, stream.hidden, jnp.arange(jax.tree.leaves(params)[0].shape[0]))[1]


def extend_layers(
    spec: BlockSpec,
    params: Any,
    stream: Stream,
    deltas: Mapping[str, Delta],
    cache: KeyValues,
    slot: int | Array,
) -> tuple[Float[Array, "batch query width"], KeyValues]:
    """The hidden states after all layers of tokens that attend to a cache, and the cache with theirs in it.

    Args:
        spec: a layer.
        params: of all layers, stacked on axis 0.
        stream: the tokens; its mask [batch, query, slot] says which slots each sees.
        deltas: by short name, with a leading layer axis.
        cache: keys and values [layer, batch, slot, kv_heads, dim].
        slot: where the first of the tokens goes.
    """

    def step(i: Any, carried: tuple[Array, KeyValues]) -> tuple[Array, KeyValues]:
        hidden, cache = carried
        layer = KeyValues(*(_index(a, i) for a in cache))
        inputs = stream._replace(hidden=hidden, token=None, cache=(layer, slot))
        hidden, own = _apply_indexed(spec, params, deltas, inputs, i)
        # only the new slots are written, so that the loop changes the cache in place
        start = (i, 0, slot, 0, 0)
        return hidden, KeyValues(*(lax.dynamic_update_slice(a, b[None], start) for a, b in zip(cache, own)))

    n_layers = jax.tree.leaves(params)[0].shape[0]
    return lax.fori_loop(0, n_layers, step, (stream.hidden, cache))


def _apply_indexed(
    spec: BlockSpec, params: Any, deltas: Mapping[str, Delta], stream: Stream, i: Any
) -> tuple[Array, KeyValues]:
    """Layer ``i`` of the stacked ones.

    Its weights are read by index here, inside the loop, never sliced outside it: the last layer can
    then run by itself, for one token only, without a copy of the others.
    """
    weights, delta = jax.tree.map(lambda a: _index(a, i), (params, dict(deltas)))
    if stream.windowed is not None:
        layers, *windowed = stream.windowed
        others = [stream.mask, stream.rotary]
        mask, rotary = jax.tree.map(lambda a, b: jnp.where(layers[i], a, b), windowed, others)
        stream = stream._replace(mask=mask, rotary=rotary, windowed=None)
    return apply_layer(spec, weights, stream, delta)


@jax.custom_jvp
def _index(stacked: Array, i: Any) -> Array:
    """``stacked[i]``, clamped."""
    if not bfloat16_on_cpu(stacked.dtype):
        return lax.dynamic_index_in_dim(stacked, i, keepdims=False)
    # XLA would convert the whole stack to float32 before it takes a slice
    stacked, i = lax.optimization_barrier((stacked, i))
    bits = lax.dynamic_index_in_dim(lax.bitcast_convert_type(stacked, jnp.uint16), i, keepdims=False)
    return lax.bitcast_convert_type(bits, jnp.bfloat16)


@_index.defjvp
def _index_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (stacked, i), (tangent, _) = primals, tangents
    return _index(stacked, i), lax.dynamic_index_in_dim(tangent, i, keepdims=False)
