"""Weights kept in 8 and 4 bits: how near they are, that all goes through them, and what memory they take."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enmp_jax import models
from enmp_jax.deltas import LowRank
from enmp_jax.devices.mesh import make_mesh
from enmp_jax.errors import UserError
from enmp_jax.models import checkpoint, convert, quantised
from enmp_jax.models.parameters import flatten
from enmp_jax.models.sharding import param_sharding, shard_params

TINY = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 128, "initializer_range": 0.2,
    "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_3_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "rope_theta": 500000.0,
}  # fmt: skip


def weights(shape=(6, 64), seed=0):
    return jax.random.normal(jax.random.key(seed), shape) * 0.05


def inputs(rows=2, tokens=12):
    ids = jax.random.randint(jax.random.key(1), (rows, tokens), 0, 128)
    return {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}


def saved(tmp_path, settings=TINY):
    backbone = models.build(settings)
    models.save(tmp_path / "base", backbone, backbone.init(jax.random.key(0)))
    return tmp_path / "base"


def random_deltas(backbone, rank=3, scale=0.05):
    found = {}
    for i, (name, (out, width)) in enumerate(backbone.modules.items()):
        keys = jax.random.split(jax.random.key(i), 3)
        found[name] = LowRank(
            scale * jax.random.normal(keys[0], (2, out, rank)),
            jax.random.normal(keys[1], (2, rank, rank)),
            scale * jax.random.normal(keys[2], (2, rank, width)),
        )
    return found


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_every_weight_is_the_nearest_multiple_of_its_scale(kind):
    weight = weights()
    found = quantised.quantise(weight, kind, jnp.float32)
    group = 64 if kind == "int8" else quantised.GROUP
    largest = 127 if kind == "int8" else 7
    grouped = np.asarray(weight).reshape(6, -1, group)
    step = np.abs(grouped).max(-1, keepdims=True) / largest
    error = np.abs(np.asarray(found.dequantise()).reshape(grouped.shape) - grouped)
    # half a step; with a scale in bfloat16 (8 bits of mantissa), a little more at the edge
    assert (error <= step * (0.5 + (0.02 if kind == "int4" else 1e-5))).all()
    assert error.max() > 0.4 * step.min()


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_what_is_a_multiple_already_is_kept_exactly(kind):
    """Both ends, zero and a row of zeros; both halves of every byte."""
    largest = 127 if kind == "int8" else 7
    values = np.stack([np.resize([largest, -largest, 0, 3, -2], 64), np.zeros(64)])
    found = quantised.quantise(jnp.asarray(values * 0.25, jnp.float32), kind, jnp.float32)
    np.testing.assert_array_equal(found.dequantise(), values * 0.25)
    assert found.values.nbytes == (128 if kind == "int8" else 64)


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.04), ("int4", 0.5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_near_those_of_the_whole_weights(kind, bound, dtype, tmp_path):
    path = saved(tmp_path)
    hidden = 8 * jax.random.normal(jax.random.key(5), (3, 64)).astype(dtype)
    full, params = models.load(path, dtype)
    small, kept = models.load(path, dtype, quantization=kind)
    wanted, found = full.logits(params, hidden), small.logits(kept, hidden)
    relative = jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)
    assert 0 < relative < 0.02  # the vocabulary is in 8 bits in both
    states = full.hidden_states(params, inputs())[-1].astype(jnp.float32)
    near = small.hidden_states(kept, inputs())[-1].astype(jnp.float32)
    relative = jnp.linalg.norm(near - states) / jnp.linalg.norm(states)
    assert 0 < relative < bound + (0.01 if dtype == "bfloat16" else 0)


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_the_model_is_that_of_the_dequantised_weights(kind, tmp_path):
    """Features, log-likelihoods, deltas and gradients: one model with the same weights in full."""
    backbone, kept = models.load(saved(tmp_path), quantization=kind)
    models.save(tmp_path / "full", backbone, kept)
    full, params = models.load(tmp_path / "full")
    deltas = random_deltas(full)

    def loss(model, deltas, weights):
        return jnp.mean(model.log_likelihood(weights, inputs(), deltas))

    for model, weights_ in ((full, params), (backbone, kept)):
        assert np.isfinite(float(loss(model, deltas, weights_)))
    np.testing.assert_allclose(loss(backbone, deltas, kept), loss(full, deltas, params), rtol=1e-5)
    gradient, wanted = jax.grad(loss, 1)(backbone, deltas, kept), jax.grad(loss, 1)(full, deltas, params)
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        assert jnp.abs(y).max() > 0
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6)


def test_members_share_the_quantised_weights(tmp_path):
    """A population under vmap: the weights have no member axis, the results are those of one by one."""
    backbone, kept = models.load(saved(tmp_path), quantization="int4")
    deltas = random_deltas(backbone)
    scales = jnp.asarray([0.0, 0.5, 1.0])

    def score(scale):
        scaled = {name: delta.replace(core=delta.core * scale) for name, delta in deltas.items()}
        return backbone.log_likelihood(kept, inputs(), scaled)

    np.testing.assert_allclose(jax.vmap(score)(scales), jnp.stack([score(s) for s in scales]), atol=1e-5)


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_init_declares_what_it_makes(kind):
    backbone = models.build(TINY, "bfloat16", quantization=kind)
    params = flatten(backbone.init(jax.random.key(0)))
    small = {path for path, leaf in params.items() if isinstance(leaf, quantised.Quantised)}
    matrices = {f"layers/{name}/weight" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert small == matrices | {"embeddings/tokens"}
    assert params["layers/q/weight"].values.dtype == (jnp.int8 if kind == "int8" else jnp.uint8)
    assert params["layers/q/weight"].dequantise().dtype == jnp.bfloat16
    assert params["embeddings/tokens"].values.dtype == jnp.int8


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_memory_of_llama_3_8b(kind):
    """Arguments of the compiled features, as the compiler counts them; nothing is allocated."""

    def arguments(quantization):
        backbone = models.build(LLAMA_3_8B, "bfloat16", quantization=quantization)
        params = jax.eval_shape(backbone.init, jax.random.key(0))
        batch = {name: jax.ShapeDtypeStruct((1, 16), jnp.int32) for name in ("input_ids", "attention_mask")}
        found = jax.jit(backbone.features).lower(params, batch).compile().memory_analysis()
        return found.argument_size_in_bytes, found.temp_size_in_bytes

    (full, _), (small, temporary) = arguments("none"), arguments(kind)
    vocabulary = 2 * 128256 * 4096  # a table and the output, in 8 bits in both; features need no output
    layers = full - vocabulary
    expected = {"int8": 0.5 * full, "int4": 0.5 * vocabulary + (4.5 / 16) * layers}[kind]
    assert small == pytest.approx(expected, rel=2e-3)
    one_layer = layers / 32
    assert temporary < 4 * one_layer  # in float32 on CPUs: one layer at a time is dequantised, not all


def test_sharded_over_two_devices(tmp_path):
    """Scales follow their weights where they divide, else they are on every device."""
    code = f"""
import jax, json
jax.config.update("jax_num_cpu_devices", 2)
import sys; sys.path.insert(0, {str(__file__).rsplit("/", 1)[0]!r})
import test_quantised as t
print(json.dumps(t.sharded({str(saved(tmp_path))!r})))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    for kind in quantised.KINDS:
        backbone, params = models.load(tmp_path / "base", quantization=kind)
        np.testing.assert_allclose(found[kind], backbone.features(params, inputs())[0, :8], atol=1e-5)


def sharded(path):
    mesh = make_mesh(1, 1, 2)
    found = {}
    for kind in quantised.KINDS:
        backbone, params = models.load(path, place=param_sharding(mesh), quantization=kind)
        q, o = params["layers"]["q"]["weight"], params["layers"]["o"]["weight"]
        assert q.scale.sharding.shard_shape(q.scale.shape)[1] == q.scale.shape[1] // 2
        assert o.values.sharding.shard_shape(o.values.shape)[2] == o.values.shape[2] // 2
        for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(shard_params(backbone, mesh)), strict=True):
            assert x.sharding.is_equivalent_to(y, x.ndim)
        found[kind] = [float(x) for x in jax.jit(backbone.features)(params, inputs())[0, :8]]
    return found


def test_encoders_and_vision_models_can_be_quantised_too():
    vit = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vit |= {"intermediate_size": 64, "image_size": 8, "patch_size": 4, "num_channels": 1}
    image = {"image": jax.random.randint(jax.random.key(0), (2, 8, 8, 1), 0, 256).astype(jnp.uint8)}
    full = models.build(vit)
    params = full.init(jax.random.key(0))
    small = models.build(vit, quantization="int8")
    kept = small.init(jax.random.key(0))
    wanted, found = full.features(params, image), small.features(kept, image)
    assert 0 < jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted) < 0.02


def test_sizes_that_int4_cannot_hold_and_unknown_kinds():
    with pytest.raises(UserError, match=r"int4: layers.\{\}.mlp.down_proj.weight has 100 inputs, not a mul"):
        models.build(TINY | {"intermediate_size": 100}, quantization="int4")
    with pytest.raises(UserError, match="'int2' is not known; known are none, int8, int4"):
        models.build(TINY, quantization="int2")


def test_a_run_with_a_quantised_base(demo_run):
    from enmp_jax.evaluation import experts
    from enmp_jax.evaluation.loaded_run import load

    small = dataclasses.replace(demo_run, base=dataclasses.replace(demo_run.base, quantization="int8"))
    loaded = load(small, ("test",))
    assert any(isinstance(x, quantised.Quantised) for x in flatten(loaded.params).values())
    # the experts' cached answers are those of the base that they ran on
    assert experts.key(loaded, "test") != experts.key(load(demo_run, ("test",)), "test")


def test_saved_weights_are_the_dequantised_ones(tmp_path):
    backbone, kept = models.load(saved(tmp_path), quantization="int8")
    with checkpoint.open_tensors(tmp_path / "base") as tensors:
        originals = {name: tensors.read(name) for name in tensors}
    written = convert.to_tensors(backbone, kept)
    assert written.keys() == originals.keys()
    largest = max(np.abs(written[name] - value).max() for name, value in originals.items())
    assert 0 < largest <= max(np.abs(v).max() for v in originals.values()) / 127 / 2 * 1.01
