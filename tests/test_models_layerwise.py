"""Features and scores from the hidden states that enter a layer: the same as from the inputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models_golden import as_arrays, golden, load, lora_deltas, without

# one token, all tokens, last token, the marked one; layers that differ
CASES = ("vit", "minilm", "llama_lm", "clip_text", "gemma3")


def differing_from(deltas, first):
    """The same deltas, but none in the layers before ``first``."""
    keep = jnp.arange(3)[:, None, None] >= first
    return {name: delta.replace(core=jnp.where(keep, delta.core, 0)) for name, delta in deltas.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_shared_prefix_is_computed_once(case):
    backbone, params = load(case)
    data = golden(case)
    inputs, deltas = as_arrays(data["input"]), lora_deltas(backbone, data["factor"])
    parent = jax.jit(backbone.hidden_states)(params, inputs, without(deltas))
    full, rest = jax.jit(backbone.features), jax.jit(backbone.features_from)
    for first in range(backbone.n_layers + 1):
        child = differing_from(deltas, first)
        got = rest(params, inputs, parent[first], first, child)
        np.testing.assert_allclose(got, full(params, inputs, child), atol=1e-6, rtol=0)
    assert rest._cache_size() == 1  # one program for every first layer
    moved = rest(params, inputs, parent[0], 1, differing_from(deltas, 1))
    assert np.abs(moved - full(params, inputs, differing_from(deltas, 1))).max() > 1e-3


def test_scores_from_hidden_states():
    backbone, params = load("llama_lm")
    data = golden("llama_lm")
    inputs, deltas = as_arrays(data["input"]), lora_deltas(backbone, data["factor"])
    assert backbone.log_likelihood is not None and backbone.log_likelihood_from is not None
    parent = jax.jit(backbone.hidden_states)(params, inputs, without(deltas))
    full, rest = jax.jit(backbone.log_likelihood), jax.jit(backbone.log_likelihood_from)
    for first in (0, 2, 3):
        child = differing_from(deltas, first)
        got = rest(params, inputs, parent[first], first, child)
        np.testing.assert_allclose(got, full(params, inputs, child), atol=1e-5, rtol=1e-6)


def test_a_static_first_layer_has_a_gradient_and_members_share_a_traced_one():
    backbone, params = load("vit")
    data = golden("vit")
    inputs, deltas = as_arrays(data["input"]), lora_deltas(backbone, data["factor"])
    hidden = jax.jit(backbone.hidden_states)(params, inputs, without(deltas))[1]

    def total(scale, first):
        scaled = {name: delta.replace(core=scale * delta.core) for name, delta in deltas.items()}
        return backbone.features_from(params, inputs, hidden, first, scaled).sum()

    slope = jax.jit(jax.grad(lambda scale: total(scale, 1)))(1.0)
    many = jax.jit(jax.vmap(total, in_axes=(0, None)))(jnp.asarray([0.99, 1.0, 1.01]), 1)
    np.testing.assert_allclose(slope, (many[2] - many[0]) / 0.02, rtol=1e-2)
    np.testing.assert_allclose(many[1], jax.jit(lambda: total(1.0, 1))(), atol=1e-4)
