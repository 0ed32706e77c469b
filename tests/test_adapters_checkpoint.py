"""Writing merged checkpoints, shard by shard. No torch."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from adapter_files import RECIPE, load_all, make, make_base, merged, wanted

from enmp_jax.adapters import load_adapters, read_adapter
from enmp_jax.adapters.hf_export import export_checkpoint
from enmp_jax.adapters.peft_export import export_peft
from enmp_jax.errors import UserError
from enmp_jax.io.shards import FullUpdate, LowRankUpdate, read_header, rewrite


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_checkpoint_is_base_plus_delta(loaded, keep, tmp_path, shards, dtype):
    tensors = make_base(tmp_path / "base", dtype, shards)
    deltas = merged(loaded, keep)
    line = export_checkpoint(tmp_path / "out", loaded, deltas, tmp_path / "base", RECIPE)
    assert line.startswith("6 weights changed")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [f.name for f in files] == sorted(f.name for f in (tmp_path / "base").glob("*.safetensors"))
    found = load_all(tmp_path / "out")
    assert found.keys() == tensors.keys()
    for key, value in wanted(tensors, deltas).items():
        assert found[key].dtype == tensors[key].dtype
        changed = not np.array_equal(value, tensors[key].astype(np.float32))
        exact = value.astype(dtype).astype(np.float32)
        # float32 sums may differ in the last bit; then they round to the type of the file
        eps = {2: 2**-8, 4: 1e-6}[np.dtype(dtype).itemsize] if changed else 0
        np.testing.assert_allclose(
            found[key].astype(np.float32), exact if changed else value, rtol=eps, atol=eps
        )
    copied = {"config.json", "tokenizer.json", "LICENSE", "README.md", "enmp_config.yaml", "heads"}
    assert copied == {p.name for p in (tmp_path / "out").iterdir() if "model" not in p.name}
    if shards > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": sum(v.nbytes for v in found.values()), "note": "kept"}
        base = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == base["weight_map"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_of_all_floats_and_of_the_configuration(loaded, keep, tmp_path, dtype):
    tensors = make_base(tmp_path / "base", np.float32, 2, text_config={"dtype": "float32"})
    deltas = merged(loaded, keep)
    export_checkpoint(tmp_path / "out", loaded, deltas, tmp_path / "base", RECIPE, dtype=dtype)
    found = {
        k: v
        for f in (tmp_path / "out").glob("*.safetensors")
        for k, v in safetensors.numpy.load_file(f).items()
    }
    assert found["model.position_ids"].dtype == np.int64
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    for key, value in wanted(tensors, deltas).items():
        if key != "model.position_ids":
            assert found[key].dtype == kind
            np.testing.assert_allclose(
                found[key].astype(np.float32), value.astype(kind).astype(np.float32), rtol=1e-2
            )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == config["text_config"]["dtype"] == dtype


def test_fan_in_fan_out_adds_the_transposed_delta(tmp_path):
    make(tmp_path / "a", 0)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text()) | {"fan_in_fan_out": True}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    loaded = load_adapters({"a": tmp_path / "a"})
    deltas = merged(loaded, np.ones((3, 1), bool))
    tensors = make_base(tmp_path / "base")
    tensors = {k: np.ascontiguousarray(v.T) if "proj" in k else v for k, v in tensors.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "base" / "model.safetensors")
    export_checkpoint(tmp_path / "out", loaded, deltas, tmp_path / "base", RECIPE)
    found = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    for key, value in wanted(tensors, deltas, transposed=True).items():
        np.testing.assert_allclose(found[key], value, rtol=1e-6, atol=1e-6)
    export_peft(tmp_path / "peft", loaded, deltas, RECIPE)
    assert read_adapter(tmp_path / "peft").settings.fan_in_fan_out


def test_tied_weights_are_left_out(loaded, keep, tmp_path):
    tensors = make_base(tmp_path / "base", tie_word_embeddings=True)
    tied = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    safetensors.numpy.save_file(tied, tmp_path / "base" / "model.safetensors")
    export_checkpoint(tmp_path / "out", loaded, merged(loaded, keep), tmp_path / "base", RECIPE)
    assert safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()
    (tmp_path / "base" / "config.json").write_text('{"tie_word_embeddings": false}')
    export_checkpoint(tmp_path / "untied", loaded, merged(loaded, keep), tmp_path / "base", RECIPE)
    assert "lm_head.weight" in safetensors.numpy.load_file(tmp_path / "untied" / "model.safetensors")


def refused(change):
    """A base that cannot take the deltas, and why."""

    def apply(path, tensors):
        result = change(tensors)
        if isinstance(result, dict):
            safetensors.numpy.save_file(result, path / "model.safetensors")

    return apply


Q = "model.layers.1.self_attn.q_proj.weight"
BASES = {
    "shape": (refused(lambda t: t | {Q: np.ones((4, 7), np.float32)}), "4x7 in the base model"),
    "no such projection": (
        refused(lambda t: {k: v for k, v in t.items() if "up_proj" not in k}), "1 of the 2 adapted",
    ),
    "other names": (refused(lambda t: {f"x{i}": v for i, v in enumerate(t.values())}), "0 of the 2 adapted"),
    "too few layers": (
        refused(lambda t: {k: v for k, v in t.items() if ".2." not in k}), "has no model.layers.2",
    ),
    "quantised tensors": (refused(lambda t: t | {Q: np.ones((4, 6), np.int8)}), "quantised"),
    "quantised": (
        lambda p, t: (p / "config.json").write_text('{"quantization_config": {"bits": 4}}'), "is quantised",
    ),
    "damaged": (lambda p, t: (p / "model.safetensors").write_bytes(b"junk"), "not a valid safetensors"),
    "no weights": (lambda p, t: (p / "model.safetensors").unlink(), "convert them"),
    "no config": (lambda p, t: (p / "config.json").unlink(), "no config.json"),
    "overflow": (refused(lambda t: t | {Q: np.full((4, 6), 65504, np.float16)}), "overflows F16"),
}  # fmt: skip


@pytest.mark.parametrize("name", BASES)
def test_bases_that_do_not_fit_leave_nothing_behind(loaded, keep, tmp_path, name):
    change, message = BASES[name]
    tensors = make_base(tmp_path / "base")
    change(tmp_path / "base", tensors)
    with pytest.raises(UserError, match=message) as caught:
        export_checkpoint(
            tmp_path / "out", loaded, merged(loaded, keep, scale=1e3), tmp_path / "base", RECIPE
        )
    assert str(caught.value).isprintable()
    assert {p.name for p in tmp_path.iterdir()} == {"base", "secret-user"}


def test_rewrite_notices_bytes_that_do_not_read_back(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    tensors = {
        "a": random.normal(size=(300, 50)).astype(np.float32),
        "b": random.normal(size=7).astype(np.float32),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    import os

    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, bytes(len(data)), at))
    monkeypatch.setattr(os, "copy_file_range", lambda *a: (_ for _ in ()).throw(OSError()))
    for deltas, omit in (({}, ()), ({"a": FullUpdate(np.ones((300, 50), np.float32))}, ("b",))):
        with pytest.raises(UserError, match="does not read back"):
            rewrite(tmp_path / "x.safetensors", tmp_path / "y.safetensors", deltas, omit=omit)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_rewrite_works_in_pieces_of_any_size(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    tensors = {
        "a": random.normal(size=(37, 5)).astype(ml_dtypes.bfloat16),
        "b": random.normal(size=(3, 2, 2)).astype(np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(2.5, np.float32),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    left, right = (
        random.normal(size=(37, 2)).astype(np.float32),
        random.normal(size=(2, 5)).astype(np.float32),
    )
    for chunk in (1, 7, 64, 2**20):
        monkeypatch.setattr("enmp_jax.io.shards._CHUNK", chunk)
        monkeypatch.setattr("enmp_jax.io.shards._BLOCK", chunk)
        sizes = rewrite(
            tmp_path / "x.safetensors", tmp_path / "y.safetensors", {"a": LowRankUpdate(left, right)}, "F32"
        )
        found = safetensors.numpy.load_file(tmp_path / "y.safetensors")
        assert sizes == {key: value.nbytes for key, value in found.items()}
        np.testing.assert_allclose(
            found["a"], tensors["a"].astype(np.float32) + left @ right, rtol=1e-6, atol=3e-7
        )  # where terms of about one cancel, a few of their roundings
        for key in ("b", "empty", "scalar"):
            np.testing.assert_array_equal(found[key], tensors[key].astype(np.float32))
    assert read_header(tmp_path / "y.safetensors").metadata == {"format": "pt"}
