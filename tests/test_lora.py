"""Stacking adapters: padding, presence, names, and what is refused."""

import jax
import numpy as np
import pytest

from enmp_jax.errors import UserError
from enmp_jax.lora import stack_adapters
from enmp_jax.module_paths import split_layer


def pair(rank, inner=4, out=5, seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rank, inner)), rng.normal(size=(out, rank))
    return a.astype(np.float32), b.astype(np.float32)


def test_padding_keeps_every_delta():
    adapters = {
        "x": {"m.0.q": pair(2), "m.1.q": pair(3, seed=1), "m.0.k": pair(2, out=3, seed=2)},
        "y": {"m.1.q": pair(1, seed=3)},
    }
    stack = stack_adapters(adapters, n_layers=3)
    assert stack.projections == ("m.{}.k", "m.{}.q") and stack.tasks == ("x", "y") and stack.n_layers == 3
    for i, (_, modules) in enumerate(adapters.items()):
        for name, p in stack.pairs.items():
            for layer in range(3):
                got = np.asarray(p.b[layer, i] @ p.a[layer, i])
                a, b = modules.get(name.format(layer), (np.zeros((1, 4)), np.zeros((p.shape[0], 1))))
                np.testing.assert_allclose(got, b @ a, atol=1e-6)
                assert p.rank[layer][i] == (a.shape[0] if name.format(layer) in modules else 0)
    assert stack.present().sum() == 4


def test_select_takes_tasks_in_the_given_order():
    stack = stack_adapters({t: {"m.0.q": pair(2, seed=i)} for i, t in enumerate("abc")})
    some = stack.select([2, 0])
    assert some.tasks == ("c", "a")
    np.testing.assert_array_equal(some.pairs["m.{}.q"].a[:, 0], stack.pairs["m.{}.q"].a[:, 2])


def test_a_stack_is_a_pytree_that_jit_takes():
    stack = stack_adapters({"a": {"m.0.q": pair(2)}})
    doubled = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s))(stack)
    np.testing.assert_allclose(doubled.pairs["m.{}.q"].a, 2 * stack.pairs["m.{}.q"].a)
    assert doubled.tasks == ("a",)


@pytest.mark.parametrize(
    "path, expected",
    [
        ("encoder.layers.3.self_attn.q_proj", ("encoder.layers.{}.self_attn.q_proj", 3)),
        ("h.11.attn2.c_attn", ("h.{}.attn2.c_attn", 11)),
        ("blocks.0", ("blocks.{}", 0)),
        ("layers.2.mlp.experts.13.up_proj", ("layers.{}.mlp.experts.13.up_proj", 2)),
        ("experts.1.layers.2.w1", ("experts.1.layers.{}.w1", 2)),
        ("moe.experts.5.w1", ("moe.experts.{}.w1", 5)),
        (
            "decoder.block.3.layer.0.SelfAttention.q",
            ("decoder.block.{}.layer.0.SelfAttention.q", 3),
        ),
        (
            "down_blocks.1.attentions.0.transformer_blocks.2.attn1.to_out.0",
            ("down_blocks.1.attentions.0.transformer_blocks.{}.attn1.to_out.0", 2),
        ),
        ("encoder.layers.2.blocks.5.query", ("encoder.layers.2.blocks.{}.query", 5)),
        ("lm_head", ("lm_head", None)),
        ("time_embedding.linear_1", ("time_embedding.linear_1", None)),
    ],
)
def test_split_layer(path, expected):
    assert split_layer(path) == expected


def test_shapes_that_differ_between_tasks():
    with pytest.raises(UserError, match="different bases"):
        stack_adapters({"a": {"m.0.q": pair(2)}, "b": {"m.0.q": pair(2, inner=6)}})


def test_a_layer_that_the_base_lacks():
    with pytest.raises(UserError, match="layer 5, but the base model has 4"):
        stack_adapters({"a": {"m.5.q": pair(2)}}, n_layers=4)


def test_an_adapter_without_modules():
    with pytest.raises(UserError, match="'b' has no LoRA modules"):
        stack_adapters({"a": {"m.0.q": pair(2)}, "b": {}})
