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
from enmp_jax.models.llama import language_model_loss

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
    return {
        name: LowRank(pair.b[:, 0], jnp.broadcast_to(jnp.eye(pair.a.shape[2]), (pair.a.shape[0],) + (pair.a.shape[2],) * 2), pair.a[:, 0])
        for name, pair in stack.rename(names).pairs.items()
    }  # fmt: skip


def check(backbone, params, inputs, deltas, expected, case):
    inputs = {name: jnp.asarray(value) for name, value in inputs.items()}
    features = jax.jit(backbone.features)(params, inputs, deltas)
    assert features.dtype == jnp.float32
    np.testing.assert_allclose(features, expected["features"], atol=TOLERANCE, rtol=0)
    hidden = backbone.hidden_states(params, inputs, deltas)
    real = inputs.get("attention_mask", jnp.ones(hidden.shape[1:3]))[..., None] > 0
    np.testing.assert_allclose(
        jnp.where(real, hidden[1:], 0), np.where(real, expected["hidden"], 0), atol=TOLERANCE, rtol=TOLERANCE
    )
    if "logits" in expected:
        weight, bias = models.load_head(GOLDEN / case)
        logits = np.asarray(features) @ weight.T + (0 if bias is None else bias)
        np.testing.assert_allclose(logits, expected["logits"], atol=TOLERANCE, rtol=0)
    if "log_likelihood" in expected:
        scores = jax.jit(backbone.log_likelihood)(params, inputs, deltas)
        np.testing.assert_allclose(scores, expected["log_likelihood"], atol=TOLERANCE, rtol=TOLERANCE)
        loss = language_model_loss(scores, inputs["attention_mask"])
        np.testing.assert_allclose(loss, expected["loss"], atol=TOLERANCE, rtol=0)


def test_every_family_has_a_golden_case():
    families = {load(case)[0].family for case in CASES}
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
    }


@pytest.mark.parametrize("case", CASES)
def test_base_forward_equals_torch(case):
    backbone, params = load(case)
    data = golden(case)
    check(backbone, params, data["input"], None, data["base"], case)


@pytest.mark.parametrize("case", CASES)
def test_forward_with_lora_equals_peft(case):
    backbone, params = load(case)
    data = golden(case)
    deltas = lora_deltas(backbone, data["factor"])
    check(backbone, params, data["input"], deltas, data["lora"], case)
    assert np.abs(data["lora"]["features"] - data["base"]["features"]).max() > 0.01
    dense = {name: Dense(delta.materialise()) for name, delta in deltas.items()}
    check(backbone, params, data["input"], dense, data["lora"], case)


@pytest.mark.parametrize("case", [c for c in CASES if "attention_mask" in golden(c)["input"]])
def test_padding_does_not_matter(case):
    backbone, params = load(case)
    inputs = golden(case)["input"]
    padded = backbone.features(params, {k: jnp.asarray(v) for k, v in inputs.items()})
    for i, length in enumerate(inputs["attention_mask"].sum(axis=1)):
        alone = {k: jnp.asarray(v[i : i + 1, :length]) for k, v in inputs.items()}
        np.testing.assert_allclose(backbone.features(params, alone)[0], padded[i], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_close_to_float32(case):
    backbone, params = load(case, "bfloat16")
    assert params["layers"]["q"]["weight"].dtype == jnp.bfloat16
    assert params["layers"]["norm1"]["weight"].dtype == jnp.float32
    data = golden(case)
    inputs = {k: jnp.asarray(v) for k, v in data["input"].items()}
    features = backbone.features(params, inputs, lora_deltas(backbone, data["factor"]))
    assert features.dtype == jnp.float32
    # bf16 has 8 bits: single entries err by some 1e-2 after three layers, the whole by less
    error = np.linalg.norm(features - data["lora"]["features"]) / np.linalg.norm(data["lora"]["features"])
    assert error < 0.06, error
