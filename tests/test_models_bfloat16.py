"""bfloat16 on CPUs: right to its rounding, and on the paths that are fast there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enmp_jax.deltas import Dense, LowRank
from enmp_jax.models import parameters
from enmp_jax.models.attention import attend
from enmp_jax.models.block import BlockSpec, declare_layers
from enmp_jax.models.layers import Stream, linear, run_layers

SPEC = BlockSpec(width=48, heads=4, hidden=160, kv_heads=2, head_dim=12, dtype=jnp.bfloat16)
LAYERS = 3
DECLARED = declare_layers(
    SPEC, LAYERS, dict.fromkeys(("q", "k", "v", "o", "up", "down", "norm1", "norm2"), "any")
)


@pytest.mark.parametrize("delta", ["none", "factors", "full"])
def test_a_bfloat16_layer_rounds_once(delta):
    """The product is summed in float32: its error is that of rounding the result, and its type bfloat16."""
    rng = np.random.default_rng(0)
    x, left, core, right = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        for shape in ((2, 5, 512), (64, 4), (4, 4), (4, 512))
    )
    low = LowRank(left, core, right)
    given = {"none": None, "factors": low, "full": Dense(low.materialise())}[delta]
    declared = parameters.linear("any", (64, 512), 0.02, jnp.bfloat16)
    params = parameters.initialise(declared, jax.random.key(0))
    ours = linear(x, params, given)
    assert ours.dtype == jnp.bfloat16
    weight = np.asarray(params["weight"], np.float64)
    product = np.asarray(x, np.float64) @ weight.T
    if delta == "none":
        np.testing.assert_allclose(np.asarray(ours, np.float64), product, rtol=2**-8, atol=1e-6)
    else:
        exact = product + np.asarray(x, np.float64) @ np.asarray(low.materialise(), np.float64).T
        error = np.linalg.norm(np.asarray(ours, np.float64) - exact) / np.linalg.norm(exact)
        assert error < 0.02


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", ["no", "padding", "causal"])
def test_attention_is_that_of_float32(kv_heads, masked):
    rng = np.random.default_rng(1)
    q, k, v = (
        jnp.asarray(rng.normal(size=(3, 7, heads, 16)), jnp.bfloat16) for heads in (4, kv_heads, kv_heads)
    )
    real = jnp.arange(7)[None, None] < jnp.asarray([7, 4, 1])[:, None, None]
    mask = {"no": None, "padding": real, "causal": real & jnp.tril(jnp.ones((7, 7), bool))}[masked]
    ours = attend(q, k, v, mask)
    assert ours.dtype == jnp.bfloat16
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    theirs = jax.nn.dot_product_attention(*wide, mask=None if mask is None else mask[:, None])
    # two roundings, of the softmax and of the result, 2^-9 each; values are of order one
    np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=2**-6)


def layers_and_input():
    params = parameters.initialise({"layers": DECLARED}, jax.random.key(0))["layers"]
    return params, jax.random.normal(jax.random.key(1), (2, 6, SPEC.width), jnp.bfloat16)


def test_gradients_reach_every_layer():
    """Weights are read by their bits, which alone would have no derivative."""
    params, x = layers_and_input()

    def loss(params, x):
        return jnp.square(run_layers(SPEC, params, Stream(x), {}).astype(jnp.float32)).sum()

    ours = jax.grad(loss)(params, x)
    wide = BlockSpec(**{**SPEC.__dict__, "dtype": jnp.float32})
    params, x = jax.tree.map(lambda a: a.astype(jnp.float32), (params, x))
    theirs = jax.grad(lambda p, x: jnp.square(run_layers(wide, p, Stream(x), {})).sum())(params, x)
    for name in ("q", "v", "o", "up", "down"):
        for layer in range(LAYERS):
            a, b = (np.asarray(g[name]["weight"][layer], np.float32) for g in (ours, theirs))
            assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b), (name, layer)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA's CPU backend")
def test_no_weight_becomes_float32():
    """XLA would convert the stack of all layers, or each layer's weight, and multiply in float32."""
    params, x = layers_and_input()
    compiled = jax.jit(lambda p, x: run_layers(SPEC, p, Stream(x), {})).lower(params, x).compile().as_text()
    shapes = {p["weight"].shape[1:] for p in DECLARED.values() if len(p["weight"].shape) == 3}
    for out, width in shapes:
        assert f"bf16[{out},{width}]" in compiled
        for shape in (f"{out},{width}", f"{LAYERS},{out},{width}", f"{width},{out}"):
            assert f"f32[{shape}]" not in compiled, shape
