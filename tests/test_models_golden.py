"""Forward passes against torch's outputs, committed by tests/data/models/make.py: no torch needed here."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enmp_jax import models
from enmp_jax.deltas import Dense, LowRank
from enmp_jax.lora import stack_adapters
from enmp_jax.models.causal import language_model_loss

GOLDEN = Path(__file__).parent / "data" / "models"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))
TOLERANCE = 1e-5  # absolute, float32; outputs are of order 1
ALPHA_OVER_R = 1.5


def load(case, dtype="float32"):
    return models.load(GOLDEN / case, dtype, family="clip_text_model" if case == "clip_text" else None)


def golden(case):
    """{group: {name: array}} of a case; groups are input, base, factor, lora."""
    groups = {}
    with np.load(GOLDEN / case / "golden.npz") as arrays:
        for key, value in arrays.items():
            group, _, name = key.partition(":")
            groups.setdefault(group, {})[name] = value
    return groups


def lora_deltas(backbone, factors):
    """PEFT's factors as low-rank deltas of the backbone."""
    pairs = {}
    for key, value in factors.items():
        path, _, which = key.removesuffix(".weight").rpartition(".lora_")
        pairs.setdefault(path, {})[which] = value
    adapter = {path: (pair["A"], ALPHA_OVER_R * pair["B"]) for path, pair in pairs.items()}
    stack = stack_adapters({"task": adapter}, backbone.n_layers)
    names = {name: backbone.canonical(name) for name in stack.pairs}
    assert None not in names.values(), names
    deltas = {}
    for name, pair in stack.rename(names).pairs.items():
        core = jnp.broadcast_to(jnp.eye(pair.a.shape[2]), (backbone.n_layers, *(pair.a.shape[2],) * 2))
        deltas[name] = LowRank(pair.b[:, 0], core, pair.a[:, 0])
    return deltas


def without(deltas):
    """The same pytree with deltas of zero, so that the base needs no second compilation."""
    return {name: delta.replace(core=0 * delta.core) for name, delta in deltas.items()}


def as_arrays(inputs):
    return {name: jnp.asarray(value) for name, value in inputs.items()}


def close(got, expected, rtol=0.0):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=TOLERANCE, rtol=rtol)


def check_head(case, features, expected):
    head = models.load_head(GOLDEN / case)
    assert head is not None
    weight, bias = head
    close(np.asarray(features) @ weight.T + (0 if bias is None else bias), expected["logits"])


def test_every_family_has_a_golden_case():
    families = {load(case)[0].family for case in ("clip", "clip_text", "gemma3")} | set(CASES)
    assert families >= {
        "vit",
        "clip",
        "clip_text_model",
        "bert",
        "roberta",
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi3",
        "gpt2",
    }


@pytest.mark.parametrize("case", CASES)
def test_features_equal_torch_and_peft(case):
    backbone, params = load(case)
    data = golden(case)
    inputs, features = as_arrays(data["input"]), jax.jit(backbone.features)
    deltas = lora_deltas(backbone, data["factor"])
    assert np.abs(data["lora"]["features"] - data["base"]["features"]).max() > 0.01
    for expected, delta in ((data["base"], without(deltas)), (data["lora"], deltas)):
        got = features(params, inputs, delta)
        assert got.dtype == jnp.float32
        close(got, expected["features"])
        if "logits" in expected:
            check_head(case, got, expected)
    if "attention_mask" in inputs:  # whatever stands in the padding does not matter
        junk = jnp.where(inputs["attention_mask"] > 0, inputs["input_ids"], 7)
        if case != "roberta":  # it counts positions by padding id, as torch's does
            close(features(params, {**inputs, "input_ids": junk}, deltas), data["lora"]["features"])


@pytest.mark.parametrize("case", [c for c in CASES if "log_likelihood" in golden(c)["base"]])
def test_log_likelihoods_equal_torch_and_peft(case):
    backbone, params = load(case)
    data = golden(case)
    assert backbone.log_likelihood is not None
    inputs, scores = as_arrays(data["input"]), jax.jit(backbone.log_likelihood)
    deltas = lora_deltas(backbone, data["factor"])
    for expected, delta in ((data["base"], without(deltas)), (data["lora"], deltas)):
        got = scores(params, inputs, delta)
        close(got, expected["log_likelihood"], rtol=TOLERANCE)
        close(language_model_loss(got, inputs["attention_mask"]), expected["loss"])


@pytest.mark.parametrize("case", ["vit", "bert", "llama", "gemma3"])
def test_every_layer_equals_torch(case):
    backbone, params = load(case)
    data = golden(case)
    inputs, states = as_arrays(data["input"]), jax.jit(backbone.hidden_states)
    deltas = lora_deltas(backbone, data["factor"])
    for expected, delta in ((data["base"], without(deltas)), (data["lora"], deltas)):
        got = states(params, inputs, delta)[1:]
        real = inputs.get("attention_mask", jnp.ones(got.shape[1:3]))[..., None] > 0
        close(jnp.where(real, got, 0), np.where(real, expected["hidden"], 0), rtol=TOLERANCE)


def test_no_deltas_dense_deltas_and_some_deltas():
    backbone, params = load("vit")
    data = golden("vit")
    inputs, features = as_arrays(data["input"]), jax.jit(backbone.features)
    deltas = lora_deltas(backbone, data["factor"])
    close(features(params, inputs), data["base"]["features"])
    dense = {name: Dense(delta.materialise()) for name, delta in deltas.items()}
    close(features(params, inputs, dense), data["lora"]["features"])
    name = "vit.layers.{}.mlp.fc1"
    rest = {other: delta for other, delta in without(deltas).items() if other != name}
    some = {name: deltas[name]}
    close(features(params, inputs, some), features(params, inputs, some | rest))


@pytest.mark.parametrize("case", ["vit", "bert", "llama", "gemma2", "gpt2"])
def test_bfloat16_is_close_to_float32(case):
    backbone, params = load(case, "bfloat16")
    assert params["layers"]["o"]["weight"].dtype == jnp.bfloat16
    assert params["layers"]["norm1"]["weight"].dtype == jnp.float32
    data = golden(case)
    features = jax.jit(backbone.features)(
        params, as_arrays(data["input"]), lora_deltas(backbone, data["factor"])
    )
    assert features.dtype == jnp.float32
    # bf16 has 8 bits: single entries err by some 1e-2 after three layers, the whole by less
    error = np.linalg.norm(features - data["lora"]["features"]) / np.linalg.norm(data["lora"]["features"])
    assert error < 0.06, error
