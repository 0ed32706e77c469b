"""What a transformer layer looks like, as data, and the parameters that it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from enmp_jax.errors import UserError
from enmp_jax.models import parameters
from enmp_jax.models.parameters import Declared


def _gelu(x: Array) -> Array:
    """``x`` times the normal distribution function, float32 inside."""
    y = x.astype(jnp.float32)  # jax.nn.gelu takes erfc, which is slower on CPUs, most of all in bfloat16
    return (0.5 * y * (1 + lax.erf(y * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


@dataclass(frozen=True)
class BlockSpec:
    """Shape and kind of a transformer layer.

    ``post_norm``: normalise after the residual sum (BERT) instead of before attention and MLP.
    ``sandwich``: normalise what attention and MLP return too, before the residual sum (Gemma 2).
    ``gated``: MLP of the form ``down(activation(gate(x)) * up(x))``. ``qk_norm``: RMSNorm of each
    head's queries and keys (Qwen3). ``eps``: of every norm. ``norm_offset``: added to the weight of every
    norm (Gemma: 1). ``fused``: queries, keys and values come from one weight ``qkv``, their rows in this
    order, and those of a gated MLP from one ``gate_up`` (Phi-3, GPT-2). ``transposed``: files hold the
    weights as [in, out] (GPT-2's Conv1D). ``scale``: of the attention scores; None: one over the root of
    the head's size. ``softcap``: bound of the attention scores (see ``attend``).
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
    sandwich: bool = False
    gated: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    fused: bool = False
    transposed: bool = False
    scale: float | None = None
    softcap: float | None = None
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


def declare_layers(spec: BlockSpec, n_layers: int, names: Mapping[str, str]) -> Declared:
    """Parameters of ``n_layers`` layers, stacked on axis 0.

    Args:
        spec: a layer.
        n_layers: how many.
        names: short name (q, k, v, o, gate, up, down or, fused, qkv and gate_up; norm1, norm2, post1, post2,
            q_norm, k_norm) -> plain name with ``{}`` for the layer's index.
    """
    s = spec
    head_dim = s.head_dim or s.width // s.heads
    heads, kv_heads = s.heads * head_dim, (s.kv_heads or s.heads) * head_dim
    attention = (  # rows, the name of their axis, bias
        {"qkv": (heads + 2 * kv_heads, "heads", s.qkv_bias)}
        if s.fused
        else {
            "q": (heads, "heads", s.qkv_bias),
            "k": (kv_heads, "kv_heads", s.qkv_bias),
            "v": (kv_heads, "kv_heads", s.qkv_bias),
        }
    )
    mlp = {"gate": (s.hidden, "mlp", s.mlp_bias)} if s.gated else {}
    mlp |= {"up": (s.hidden, "mlp", s.mlp_bias)}
    if s.fused and s.gated:
        mlp = {"gate_up": (2 * s.hidden, "mlp", s.mlp_bias)}
    weights = {  # shape [out, in], names of the axes, bias
        **{name: ((rows, s.width), (axis, "embed"), bias) for name, (rows, axis, bias) in attention.items()},
        "o": ((s.width, heads), ("embed", "heads"), s.o_bias),
        **{name: ((rows, s.width), (axis, "embed"), bias) for name, (rows, axis, bias) in mlp.items()},
        "down": ((s.width, s.hidden), ("embed", "mlp"), s.mlp_bias),
    }
    norms = {"norm1": s.width, "norm2": s.width}
    norms |= {"post1": s.width, "post2": s.width} if s.sandwich else {}
    norms |= {"q_norm": head_dim, "k_norm": head_dim} if s.qk_norm else {}
    layer = {
        name: parameters.linear(names[name], shape, s.init_std, s.dtype, axes, bias, s.transposed)
        for name, (shape, axes, bias) in weights.items()
    } | {name: parameters.norm(names[name], size, s.rms, 1.0 - s.norm_offset) for name, size in norms.items()}
    return {
        name: {
            part: replace(p, shape=(n_layers, *p.shape), axes=("layer", *p.axes)) for part, p in entry.items()
        }
        for name, entry in layer.items()
    }
