"""Reading and writing checkpoints: round trips, shards, shardings, and files that are wrong."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from enmp_jax import models
from enmp_jax.errors import UserError
from enmp_jax.io.shard_index import INDEX, SINGLE

GOLDEN = Path(__file__).parent / "data" / "models"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))


@pytest.fixture
def copy(tmp_path):
    """A copy of a golden model, to be spoilt."""

    def make(case="vit"):
        shutil.copytree(GOLDEN / case, tmp_path / case)
        return tmp_path / case

    return make


def edit(folder, change):
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / SINGLE)


def error_of(call):
    with pytest.raises(UserError) as info:
        call()
    message = str(info.value)
    assert "\n" not in message
    return message


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b))


@pytest.mark.parametrize("case", [case for case in CASES if case != "clip_text"])
def test_save_and_load_give_the_same_params(case, tmp_path):
    backbone, params = models.load(GOLDEN / case)
    models.save(tmp_path / "saved", backbone, params)
    again, params_again = models.load(tmp_path / "saved")
    assert same(params, params_again)
    assert again.modules == backbone.modules
    original = load_file(GOLDEN / case / SINGLE)
    for name, value in load_file(tmp_path / "saved" / SINGLE).items():
        known = original[name] if name in original else original[name.split(".", 1)[1]]
        np.testing.assert_array_equal(value, known)


def test_save_writes_heads_and_the_class_count(tmp_path):
    backbone, params = models.load(GOLDEN / "vit")
    weight, bias = np.ones((7, 16), np.float32), np.arange(7, dtype=np.float32)
    models.save(tmp_path, backbone, params, {"classifier": (weight, bias)})
    head = models.load_head(tmp_path)
    assert head is not None and head[1] is not None
    np.testing.assert_array_equal(head[0], weight)
    np.testing.assert_array_equal(head[1], bias)
    assert len(json.loads((tmp_path / "config.json").read_text())["id2label"]) == 7
    assert "wide" in error_of(
        lambda: models.save(tmp_path, backbone, params, {"classifier": (weight.T, None)})
    )
    assert "score" in error_of(lambda: models.save(tmp_path, backbone, params, {"score": (weight, None)}))


def test_models_without_a_head_have_none():
    assert models.load_head(GOLDEN / "minilm") is None
    head = models.load_head(GOLDEN / "llama")
    assert head is not None and head[0].shape == (3, 16) and head[1] is None


def test_image_normalisation_survives_saving(tmp_path):
    backbone, params = models.load(GOLDEN / "clip")
    assert backbone.config.patch.mean == (0.48, 0.46, 0.41)
    models.save(tmp_path, backbone, params)
    assert models.load(tmp_path)[0].config.patch == backbone.config.patch


def test_sharded_bfloat16_and_float16_files(copy):
    folder = copy("llama")
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names, index = sorted(tensors), {}
    types = (ml_dtypes.bfloat16, np.float16, np.float32)
    for i, dtype in enumerate(types):
        shard = f"model-{i + 1:05}-of-{len(types):05}.safetensors"
        part = {name: tensors[name].astype(dtype) for name in names[i :: len(types)]}
        save_file(part, folder / shard)
        index |= dict.fromkeys(part, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    _, params = models.load(folder)
    _, exact = models.load(GOLDEN / "llama")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8, atol=1e-6), params, exact)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in error_of(lambda: models.load(folder))


def test_all_faulty_keys_are_listed_at_once(copy):
    folder = copy()

    def spoil(tensors):
        del tensors["vit.layernorm.bias"]
        del tensors["vit.encoder.layer.2.output.dense.weight"]
        tensors["vit.encoder.layer.3.output.dense.weight"] = np.zeros((16, 24), np.float32)
        tensors["vit.surprise"] = np.zeros(3, np.float32)
        name = "vit.encoder.layer.1.attention.attention.query.weight"
        tensors[name] = tensors[name][:8]

    edit(folder, spoil)
    message = error_of(lambda: models.load(folder))
    for part in (
        "2 missing: vit.encoder.layer.2.output.dense.weight, vit.layernorm.bias",
        "2 extra: vit.encoder.layer.3.output.dense.weight, vit.surprise",
        "1 misshapen: vit.encoder.layer.1.attention.attention.query.weight (8x16, not 16x16)",
    ):
        assert part in message


def test_file_spellings_of_vit_and_bert(copy):
    folder = copy()
    _, params = models.load(folder)

    def rename(tensors):  # transformers 5 in memory, without the prefix, as a bare ViTModel would be
        for name in list(tensors):
            new = name.removeprefix("vit.").replace("encoder.layer.", "layers.")
            new = new.replace("attention.attention.query", "attention.q_proj")
            new = new.replace("attention.output.dense", "attention.o_proj")
            tensors[new] = tensors.pop(name)

    edit(folder, rename)
    assert same(models.load(folder)[1], params)

    bert = copy("bert")
    _, params = models.load(bert)

    def old(tensors):  # files from before 2019
        for name in list(tensors):
            new = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            )
            tensors[new] = tensors.pop(name)

    edit(bert, old)
    assert same(models.load(bert)[1], params)


def test_truncated_and_foreign_files(copy):
    folder = copy()
    path = folder / SINGLE
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "model.safetensors" in error_of(lambda: models.load(folder))
    path.write_bytes(b"not a checkpoint")
    assert "model.safetensors" in error_of(lambda: models.load(folder))
    path.unlink()
    assert "safetensors" in error_of(lambda: models.load(folder))
    (folder / INDEX).write_text("{}")
    assert "weight_map" in error_of(lambda: models.load(folder))


@pytest.mark.parametrize(
    "shard", ["../elsewhere.safetensors", "/elsewhere.safetensors", "below/x.safetensors"]
)
def test_an_index_that_names_files_elsewhere_is_refused(shard, copy):
    folder = copy()
    shard = str(folder.parent / shard[1:]) if shard.startswith("/") else shard
    (folder / "below").mkdir()
    target = folder / shard  # the weights are there, and sound: only the name is wrong
    (folder / SINGLE).rename(target)
    names = dict.fromkeys(load_file(target), shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    assert "no file next to it" in error_of(lambda: models.load(folder))


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("model_type", "mamba", "vit, clip"),
        ("hidden_act", "swish2", "quick_gelu"),
        ("num_attention_heads", 3, "multiple"),
        ("num_hidden_layers", 2, "extra"),
        ("num_hidden_layers", 4, "missing"),
    ],
)
def test_wrong_configs(copy, key, value, part):
    folder = copy()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    assert part in error_of(lambda: models.load(folder))


def test_wrong_directories_and_dtypes(tmp_path, copy):
    assert "no such directory" in error_of(lambda: models.load(tmp_path / "nowhere"))
    assert "config.json" in error_of(lambda: models.load(tmp_path))
    (tmp_path / "config.json").write_text("[1]")
    assert "JSON object" in error_of(lambda: models.load(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "is not valid JSON" in error_of(lambda: models.load(tmp_path))
    assert "float16" in error_of(lambda: models.load(GOLDEN / "vit", "float16"))
    folder = copy("llama")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_type"] = "yarn"
    (folder / "config.json").write_text(json.dumps(config))
    assert "yarn" in error_of(lambda: models.load(folder))


def test_hub_ids_go_to_the_hub(monkeypatch):
    asked = {}

    def snapshot_download(name, revision=None, allow_patterns=()):
        asked.update(name=name, revision=revision)
        for file in ("config.json", "model-1.safetensors", "merges.txt", "tokenizer.model", "spiece.model"):
            assert any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns), file
        return str(GOLDEN / "vit")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert models.load("someone/vit@v2")[0].family == "vit"
    assert asked == {"name": "someone/vit", "revision": "v2"}

    def offline(*_, **__):
        raise OSError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert "no network" in error_of(lambda: models.load("someone/vit"))


def test_logical_axes_name_the_sharded_axes():
    for case in ("vit", "clip", "bert", "llama_lm"):
        backbone, params = models.load(GOLDEN / case)
        axes = models.logical_axes(backbone)
        jax.tree.map(lambda leaf, names: 1 / (leaf.ndim == len(names)), params, axes)
        assert axes["layers"]["q"]["weight"] == ("layer", "heads", "embed")
        assert axes["layers"]["o"]["weight"] == ("layer", "embed", "heads")
        assert axes["layers"]["down"]["weight"] == ("layer", "embed", "mlp")
    assert axes["embeddings"]["tokens"] == ("vocab", "embed") == axes["lm_head"]["weight"]


SHARDED = """
import sys, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from enmp_jax import models
mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
split = {"heads", "mlp", "vocab"}
place = lambda path, shape, axes: NamedSharding(mesh, P(*("model" if a in split else None for a in axes)))
backbone, params = models.load(sys.argv[1], place=place)
_, plain = models.load(sys.argv[1])
fused = "qkv" in params["layers"]
assert params["layers"]["qkv" if fused else "q"]["weight"].sharding.spec == P(None, "model", None)
assert params["layers"]["down"]["weight"].sharding.spec == P(None, None, "model")
assert params["layers"]["up"]["weight"].addressable_shards[1].data.shape == (3, 6, 16)
jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), params, plain)
_, again = models.load(sys.argv[1], place=jax.tree.map(lambda a: a.sharding, params))
assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, params, again))
ids = np.arange(12).reshape(2, 6) + 5
inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
one, many = (jax.jit(backbone.features)(p, inputs) for p in (plain, params))
np.testing.assert_allclose(one, many, atol=1e-5)
print("sharded")
"""


@pytest.mark.parametrize("case", ["llama_lm", "gpt2"])
def test_params_are_placed_with_their_shardings(case):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", SHARDED, str(GOLDEN / case)],
        check=False,
        capture_output=True,
        text=True,
        env=env,
    )
    assert run.stdout == "sharded\n", run.stderr
