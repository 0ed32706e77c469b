"""Shared transformer blocks (flax linen): one layer serves every family, deltas applied unmerged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from enmp_jax.deltas import Delta, Deltas, Dense, LowRank
from enmp_jax.devices.matmul import bfloat16_on_cpu, times_transposed
from enmp_jax.errors import UserError
from enmp_jax.models.attention import attend


def _gelu(x: Array) -> Array:
    """``x`` times the normal distribution function, float32 inside."""
    y = x.astype(jnp.float32)  # nn.gelu takes erfc, which is slower on CPUs, most of all in bfloat16
    return (0.5 * y * (1 + lax.erf(y * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": jnp.tanh,
}

# Names of the axes of a layer's weights [out, in], for sharding over a mesh (see ``logical_axes``).
AXES: dict[str, tuple[str, ...]] = {
    "q": ("heads", "embed"),
    "k": ("kv_heads", "embed"),
    "v": ("kv_heads", "embed"),
    "o": ("embed", "heads"),
    "gate": ("mlp", "embed"),
    "up": ("mlp", "embed"),
    "down": ("embed", "mlp"),
}


@dataclass(frozen=True)
class BlockSpec:
    """Shape and kind of a transformer layer.

    ``post_norm``: normalise after the residual sum (BERT) instead of before attention and MLP.
    ``gated``: MLP of the form ``down(activation(gate(x)) * up(x))``. ``qk_norm``: RMSNorm of each
    head's queries and keys (Qwen3). ``eps``: of every norm.
    """

    width: int
    heads: int
    hidden: int
    activation: str = "gelu"
    eps: float = 1e-12
    kv_heads: int | None = None
    head_dim: int | None = None
    rms: bool = False
    post_norm: bool = False
    gated: bool = False
    qk_norm: bool = False
    qkv_bias: bool = True
    o_bias: bool = True
    mlp_bias: bool = True
    init_std: float = 0.02
    dtype: Any = jnp.float32

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UserError(f"config.json: activation {self.activation!r} is not known; known are {known}")
        if self.width % self.heads and self.head_dim is None:
            raise UserError(f"config.json: hidden size {self.width} is not a multiple of {self.heads} heads")
        if self.heads % (self.kv_heads or self.heads):
            raise UserError(f"config.json: {self.heads} heads do not divide into {self.kv_heads} key heads")

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every weight of the layer that takes a delta."""
        head_dim = self.head_dim or self.width // self.heads
        inner, kv = self.heads * head_dim, (self.kv_heads or self.heads) * head_dim
        shapes = {"q": (inner, self.width), "k": (kv, self.width), "v": (kv, self.width)}
        shapes |= {
            "o": (self.width, inner),
            "up": (self.hidden, self.width),
            "down": (self.width, self.hidden),
        }
        return shapes | ({"gate": (self.hidden, self.width)} if self.gated else {})


class Linear(nn.Module):
    """``x (W + delta)^T + b``, the weight kept [out, in] as Hugging Face and PEFT do.

    Low-rank deltas stay factored, so that population members share the weight; a dense delta belongs
    to one member anyway, and adding it first saves the second large product.
    """

    out: int
    bias: bool = True
    init_std: float = 0.02
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch in"], delta: Delta | None = None
    ) -> Float[Array, "*batch out"]:
        """Apply to the last axis."""
        shape = (self.out, x.shape[-1])
        weight = self.param("weight", nn.initializers.truncated_normal(self.init_std), shape, self.dtype)
        if isinstance(delta, Dense):
            weight = (weight + delta.weight).astype(weight.dtype)
        y = times_transposed(x, weight)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.out,), self.dtype)
        return y + delta.apply(x) if isinstance(delta, LowRank) else y


def normalise(
    x: Float[Array, "*batch width"], params: Mapping[str, Array], eps: float
) -> Float[Array, "*batch width"]:
    """LayerNorm, or RMSNorm where ``params`` has no bias, over the last axis; float32 inside."""
    y = x.astype(jnp.float32)
    if "bias" in params:
        y = y - jnp.mean(y, -1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps) * params["weight"]
    return (y + params["bias"] if "bias" in params else y).astype(x.dtype)


def init_norm(width: int, rms: bool = False) -> dict[str, Array]:
    """Parameters of ``normalise``, float32 whatever the model's type."""
    weight = {"weight": jnp.ones(width, jnp.float32)}
    return weight if rms else weight | {"bias": jnp.zeros(width, jnp.float32)}


class Norm(nn.Module):
    """``normalise`` with its parameters."""

    eps: float
    rms: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Normalise; the result has the type of ``x``."""
        init = init_norm(x.shape[-1], self.rms)
        params = {name: self.param(name, lambda _, value=value: value) for name, value in init.items()}
        return normalise(x, params, self.eps)


Rotary = tuple[Float[Array, "batch token half"], Float[Array, "batch token half"]]


def rotate(x: Float[Array, "batch token heads dim"], rotary: Rotary) -> Float[Array, "batch token heads dim"]:
    """Rotary position embedding, halves convention (Llama); computed in float32."""
    cos, sin = (part[:, :, None, :] for part in rotary)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def take_token(x: Float[Array, "batch token *rest"], token: Int[Array, " batch"] | int) -> Array:
    """The given token of each example; the token axis stays, with size 1."""
    if isinstance(token, int):
        return lax.slice_in_dim(x, token, token + 1, axis=1)
    index = token.reshape((-1,) + (1,) * (x.ndim - 1))
    return jnp.take_along_axis(x, index, axis=1)


class Block(nn.Module):
    """One transformer layer."""

    spec: BlockSpec

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch token width"],
        deltas: Mapping[str, Delta],
        mask: Bool[Array, "#batch #query token"] | None = None,
        rotary: Rotary | None = None,
        token: Int[Array, " batch"] | int | None = None,
    ) -> Float[Array, "batch query width"]:
        """Apply the layer.

        Args:
            x: hidden states.
            deltas: by short name (q, k, v, o, gate, up, down), of this layer.
            mask: True where a query may look at a token.
            rotary: cosines and sines of the tokens' positions.
            token: compute the output of this one token per example only (the last layer of a
                classifier needs no other).
        """
        s = self.spec
        shapes = s.shapes()

        def linear(name: str, bias: bool, inputs: Array) -> Array:
            layer = Linear(shapes[name][0], bias, s.init_std, s.dtype, name=name)
            return layer(inputs, deltas.get(name))

        def norm(name: str, inputs: Array) -> Array:
            return Norm(s.eps, s.rms, name=name)(inputs)

        def split(inputs: Array, heads: int) -> Array:
            return inputs.reshape(*inputs.shape[:-1], heads, -1)

        h = x if s.post_norm else norm("norm1", x)
        k = split(linear("k", s.qkv_bias, h), s.kv_heads or s.heads)
        v = split(linear("v", s.qkv_bias, h), s.kv_heads or s.heads)
        rotary_q = rotary
        if token is not None:
            x, h = take_token(x, token), take_token(h, token)
            if rotary is not None:
                rotary_q = (take_token(rotary[0], token), take_token(rotary[1], token))
            if mask is not None and mask.shape[1] > 1:
                mask = take_token(jnp.broadcast_to(mask, (x.shape[0], *mask.shape[1:])), token)
        q = split(linear("q", s.qkv_bias, h), s.heads)
        if s.qk_norm:
            q, k = norm("q_norm", q), norm("k_norm", k)
        if rotary is not None and rotary_q is not None:
            q, k = rotate(q, rotary_q), rotate(k, rotary)
        attended = attend(q, k, v, mask)
        x = x + linear("o", s.o_bias, attended.reshape(*attended.shape[:-2], -1))
        if s.post_norm:
            x = norm("norm1", x)

        h = x if s.post_norm else norm("norm2", x)
        activation = ACTIVATIONS[s.activation]
        if s.gated:
            h = activation(linear("gate", s.mlp_bias, h)) * linear("up", s.mlp_bias, h)
        else:
            h = activation(linear("up", s.mlp_bias, h))
        x = x + linear("down", s.mlp_bias, h)
        return norm("norm2", x) if s.post_norm else x


def init_layers(key: Array, spec: BlockSpec, n_layers: int) -> Any:
    """Random parameters of ``n_layers`` blocks, stacked on axis 0."""
    x = jnp.zeros((1, 1, spec.width), spec.dtype)
    one = (jnp.ones((1, 1, (spec.head_dim or spec.width // spec.heads) // 2)),) * 2
    init = Block(spec).init
    return jax.vmap(lambda k: init(k, x, {}, None, one)["params"])(jax.random.split(key, n_layers))


def run_layers(
    spec: BlockSpec,
    params: Any,
    x: Float[Array, "batch token width"],
    deltas: Mapping[str, Delta],
    *,
    mask: Bool[Array, "#batch #query token"] | None = None,
    rotary: Rotary | None = None,
    token: Int[Array, " batch"] | int | None = None,
) -> tuple[Array, Array]:
    """All layers, one compiled body.

    The stacked weights are read by index inside the loop, never sliced outside it: the last layer
    can then run by itself, for ``token`` only, without a copy of the others.

    Returns:
        The last hidden states ([batch, 1, width] if ``token`` is given), and the hidden states after
        each layer of the loop, [layer, batch, token, width] (dropped by the compiler where unused).
    """
    n_layers = jax.tree.leaves(params)[0].shape[0]
    block = Block(spec)

    def layer(hidden: Array, i: Any, token: Any = None) -> Array:
        weights, delta = jax.tree.map(lambda a: _index(a, i), (params, dict(deltas)))
        return cast(Array, block.apply({"params": weights}, hidden, delta, mask, rotary, token))

    def step(hidden: Array, i: Array) -> tuple[Array, Array]:
        hidden = layer(hidden, i)
        return hidden, hidden

    x, states = lax.scan(step, x, jnp.arange(n_layers if token is None else n_layers - 1))
    return (x if token is None else layer(x, n_layers - 1, token)), states


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


def short_deltas(deltas: Deltas | None, modules: Mapping[str, str]) -> dict[str, Delta]:
    """Deltas by the block's short names; ``modules`` maps templates to those.

    Raises:
        UserError: a template that the backbone does not have.
    """
    unknown = sorted(set(deltas or {}) - set(modules))
    if unknown:
        raise UserError(f"deltas for modules that the base model does not have: {', '.join(unknown)}")
    return {modules[name]: delta for name, delta in (deltas or {}).items()}
