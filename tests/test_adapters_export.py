"""Writing pruned adapters, merged adapters and checkpoints; their cards and recipes. No torch."""

import json
import shutil
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import yaml

from enmp_jax import cli, merges
from enmp_jax.adapters import load_adapters, read_adapter, save_adapter
from enmp_jax.adapters.factorise import factorise
from enmp_jax.adapters.hf_export import export_checkpoint
from enmp_jax.adapters.peft_export import export_adapters, export_peft
from enmp_jax.adapters.recipe import Recipe
from enmp_jax.adapters.shards import Factors, Full, read_header, rewrite
from enmp_jax.deltas import Dense, LowRank
from enmp_jax.errors import UserError
from enmp_jax.inspect_command import inspect

TASKS = ("cars", "dtd")
SHAPES = {"self_attn.q_proj": (4, 6), "mlp.up_proj": (9, 6)}
PRUNED = [(0, "cars"), (1, "dtd")]
RECIPE = Recipe(
    merge={"method": "ties", "space": "full", "scale": 0.5, "density": 0.3, "isotropize": True},
    pruned=PRUNED,
    seed=7,
    scores={"split": "test", "reference": {"cars": 0.8, "dtd": 0.5}, "merged": {"cars": 0.6, "dtd": 0.4}},
)


def make(path, seed, rank=2, dtype: Any = np.float32, alpha=None, layers=(0, 1, 2), **options):
    random = np.random.default_rng(seed)
    modules = {
        f"model.layers.{layer}.{name}": (
            random.normal(size=(rank, n)).astype(dtype), random.normal(size=(m, rank)).astype(dtype)
        )
        for layer in layers
        for name, (m, n) in SHAPES.items()
    }  # fmt: skip
    save_adapter(path, modules, rank, alpha or 2 * rank, "org/base", **options)
    return path


@pytest.fixture
def loaded(tmp_path):
    head = {"score": {"weight": np.arange(12, dtype=np.float32).reshape(2, 6)}}
    make(tmp_path / "secret-user" / "cars", 0, heads=head, task_type="SEQ_CLS")
    make(tmp_path / "secret-user" / "dtd", 1, rank=3)
    return load_adapters({task: tmp_path / "secret-user" / task for task in TASKS})


@pytest.fixture
def keep():
    mask = np.ones((3, 2), bool)
    mask[0, 0] = mask[1, 1] = False
    return mask


def merged(loaded, keep, method="sum", scale=0.5):
    merge = merges.make(method)
    return merge.merge(merge.prepare(loaded.stack), jnp.asarray(keep), scale)


def make_base(path, dtype=np.float32, shards=1, **config):
    path.mkdir()
    random = np.random.default_rng(9)
    tensors = {"model.embed_tokens.weight": random.normal(size=(11, 6))}
    for layer in range(4):
        for name, shape in SHAPES.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = random.normal(size=shape)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = np.ones(6)
    tensors: dict[str, np.ndarray] = {key: value.astype(dtype) for key, value in tensors.items()}
    tensors["model.position_ids"] = np.arange(5)
    (path / "config.json").write_text(json.dumps({"model_type": "tiny", "torch_dtype": "float32"} | config))
    (path / "tokenizer.json").write_text("{}")
    (path / "LICENSE").write_text("theirs")
    (path / "pytorch_model.bin").write_bytes(b"x")
    if shards == 1:
        safetensors.numpy.save_file(tensors, path / "model.safetensors", {"format": "pt", "made": "by"})
        return tensors
    parts = [dict(list(tensors.items())[i::shards]) for i in range(shards)]
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for name, part in zip(names, parts):
        safetensors.numpy.save_file(part, path / name, {"format": "pt"})
    weight_map = {key: name for name, part in zip(names, parts) for key in part}
    index = {"metadata": {"total_size": 1, "note": "kept"}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def load_all(path):
    files = sorted(path.glob("*.safetensors"))
    return {key: value for file in files for key, value in safetensors.numpy.load_file(file).items()}


def wanted(tensors, deltas, transposed=False):
    found = {key: value.astype(np.float32) for key, value in tensors.items()}
    for template, delta in deltas.items():
        for layer, dense in enumerate(np.asarray(delta.materialise())):
            found[f"{template.replace('{}', str(layer))}.weight"] += dense.T if transposed else dense
    return found


# --- pruned adapters


def test_pruned_adapters_hold_the_kept_modules_and_nothing_else(loaded, keep, tmp_path):
    lines = export_adapters(tmp_path / "out", loaded, keep, RECIPE)
    assert lines == ["cars: 4 of 6 modules, rank 2", "dtd: 4 of 6 modules, rank 3"]
    for i, task in enumerate(TASKS):
        source, found = loaded.adapters[task], read_adapter(tmp_path / "out" / task)
        assert set(found.modules) == {p for p in source.modules if keep[int(p.split(".")[2]), i]}
        assert sorted(found.config["target_modules"]) == sorted(found.modules)
        assert found.settings.rank == found.settings.alpha == source.settings.rank
        for path, (a, b) in found.modules.items():
            np.testing.assert_array_equal(a, source.modules[path][0])  # bit for bit
            np.testing.assert_array_equal(b, source.modules[path][1])
        assert found.heads.keys() == source.heads.keys()


def test_masks_of_single_projections(loaded, tmp_path):
    keep = np.ones((3, 2, 2), bool)
    keep[1, loaded.stack.projections.index("model.layers.{}.mlp.up_proj"), 0] = False
    export_adapters(tmp_path / "out", loaded, keep, Recipe(pruned=[(1, "mlp.up_proj", "cars")]))
    found = set(loaded.adapters["cars"].modules) - set(read_adapter(tmp_path / "out" / "cars").modules)
    assert found == {"model.layers.1.mlp.up_proj"}
    assert set(read_adapter(tmp_path / "out" / "dtd").modules) == set(loaded.adapters["dtd"].modules)


@pytest.mark.parametrize("alpha,kept", [(4, "bfloat16"), (1, "bfloat16"), (3, "float32")])
def test_types_are_kept_when_the_scaling_allows(tmp_path, alpha, kept):
    make(tmp_path / "a", 0, dtype=ml_dtypes.bfloat16, alpha=alpha)
    loaded = load_adapters({"a": tmp_path / "a"})
    export_adapters(tmp_path / "out", loaded, np.ones((3, 1), bool), Recipe())
    raw = safetensors.numpy.load_file(tmp_path / "out" / "a" / "adapter_model.safetensors")
    assert {value.dtype.name for value in raw.values()} == {kept}
    found = read_adapter(tmp_path / "out" / "a")
    for path, (_, b) in loaded.adapters["a"].modules.items():
        np.testing.assert_array_equal(found.modules[path][1], b)


def test_a_task_with_nothing_left_gets_a_zero_module(loaded, keep, tmp_path):
    keep[:, 1] = False
    export_adapters(tmp_path / "out", loaded, keep, RECIPE)
    found = read_adapter(tmp_path / "out" / "dtd")
    assert len(found.modules) == 1 and not next(iter(found.modules.values()))[1].any()


# --- merged adapters


@pytest.mark.parametrize("method", ["sum", "mean"])
def test_low_rank_merges_are_exact_at_their_rank(loaded, keep, tmp_path, method):
    deltas = merged(loaded, keep, method)
    line = export_peft(tmp_path / "out", loaded, deltas, RECIPE)
    assert "rank 4, exact" in line or "rank 5, exact" in line
    found = read_adapter(tmp_path / "out")
    assert found.settings.alpha == found.settings.rank and found.settings.rank_pattern == {}
    for template, delta in deltas.items():
        for layer, dense in enumerate(np.asarray(delta.materialise())):
            a, b = found.modules[template.replace("{}", str(layer))]
            np.testing.assert_allclose(b @ a, dense, rtol=1e-5, atol=1e-6)
    assert safetensors.numpy.load_file(tmp_path / "out" / "heads" / "cars.safetensors")["weight"].shape == (
        2,
        6,
    )
    assert not (tmp_path / "out" / "heads" / "dtd.safetensors").exists()
    assert found.settings.task_type is None and not found.heads  # PEFT would make a new head


def test_layers_with_nothing_left_are_left_out(loaded, keep, tmp_path):
    keep[2] = False
    export_peft(tmp_path / "out", loaded, merged(loaded, keep), RECIPE)
    assert {path.split(".")[2] for path in read_adapter(tmp_path / "out").modules} == {"0", "1"}


def test_nothing_left_at_all_is_an_error(loaded, keep, tmp_path):
    with pytest.raises(UserError, match="every module was pruned"):
        export_peft(tmp_path / "out", loaded, merged(loaded, np.zeros_like(keep)), RECIPE)
    assert not (tmp_path / "out").exists()


def delta_of_rank(k, m=40, n=30, layers=2, seed=0):
    random = np.random.default_rng(seed)
    left, right = random.normal(size=(layers, m, k)), random.normal(size=(layers, k, n))
    return LowRank(*(jnp.asarray(x, jnp.float32) for x in (left, np.stack([np.eye(k)] * layers), right)))


@pytest.mark.parametrize("dense", [False, True])
def test_truncation_is_the_best_of_its_rank(dense):
    delta = delta_of_rank(8)
    full = np.asarray(delta.materialise(), np.float64)
    deltas = {"h.{}": Dense(jnp.asarray(full, jnp.float32)) if dense else delta}
    found = factorise(deltas, {"h.{}": "h.{}"}, 3, 5)
    best = [np.linalg.svd(x, compute_uv=False) for x in full]
    lost = np.sqrt(sum((s[3:] ** 2).sum() for s in best) / sum((s**2).sum() for s in best))
    assert found.rank == 3 and found.error == pytest.approx(lost, rel=1e-5)
    made = [found.modules[f"h.{layer}"] for layer in range(2)]
    error = np.sqrt(
        sum(np.sum((x - b.astype(float) @ a) ** 2) for x, (a, b) in zip(full, made)) / np.sum(full**2)
    )
    assert error == pytest.approx(lost, rel=1e-5)
    exact = factorise(deltas, {"h.{}": "h.{}"}, None, 8)
    assert exact.rank == 8 and exact.error < 1e-6


def test_rank_above_the_matrix_is_cut_to_it_without_loss():
    delta = delta_of_rank(50)
    found = factorise({"h.{}": delta}, {"h.{}": "h.{}"}, None, 1)
    assert found.rank == 30 and found.error < 1e-12
    a, b = found.modules["h.1"]
    np.testing.assert_allclose(b @ a, np.asarray(delta.materialise())[1], atol=2e-4)


def test_lanczos_agrees_with_the_full_svd(monkeypatch):
    monkeypatch.setattr("enmp_jax.adapters.factorise._DIRECT", 10)
    weight = np.random.default_rng(0).normal(size=(1, 90, 70)).astype(np.float32)
    found = factorise({"h.{}": Dense(jnp.asarray(weight))}, {"h.{}": "h.{}"}, 5, 5)
    s = np.linalg.svd(weight[0].astype(float), compute_uv=False)
    assert found.error == pytest.approx(np.sqrt((s[5:] ** 2).sum() / (s**2).sum()), rel=1e-5)


def test_nan_in_a_delta_is_refused(loaded, keep, tmp_path):
    deltas = merged(loaded, keep, scale=float("nan"))
    make_base(tmp_path / "base")
    with pytest.raises(UserError, match="NaN or Inf"):
        export_peft(tmp_path / "out", loaded, deltas, RECIPE)
    with pytest.raises(UserError, match="NaN or Inf"):
        export_checkpoint(tmp_path / "out", loaded, deltas, tmp_path / "base", RECIPE)
    assert not (tmp_path / "out").exists()


# --- checkpoints


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
    "too few layers": (refused(lambda t: {k: v for k, v in t.items() if ".2." not in k}), "no layer 2"),
    "quantised tensors": (refused(lambda t: t | {Q: np.ones((4, 6), np.int8)}), "quantised"),
    "quantised": (
        lambda p, t: (p / "config.json").write_text('{"quantization_config": {"bits": 4}}'), "is quantised",
    ),
    "damaged": (lambda p, t: (p / "model.safetensors").write_bytes(b"junk"), "not a valid safetensors"),
    "no weights": (lambda p, t: (p / "model.safetensors").unlink(), "convert its .bin"),
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
    for deltas in ({}, {"a": Full(np.ones((300, 50), np.float32))}):
        with pytest.raises(UserError, match="does not read back"):
            rewrite(tmp_path / "x.safetensors", tmp_path / "y.safetensors", deltas)
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
        monkeypatch.setattr("enmp_jax.adapters.shards._CHUNK", chunk)
        monkeypatch.setattr("enmp_jax.adapters.shards._BLOCK", chunk)
        sizes = rewrite(
            tmp_path / "x.safetensors", tmp_path / "y.safetensors", {"a": Factors(left, right)}, "F32"
        )
        found = safetensors.numpy.load_file(tmp_path / "y.safetensors")
        assert sizes == {key: value.nbytes for key, value in found.items()}
        np.testing.assert_allclose(found["a"], tensors["a"].astype(np.float32) + left @ right, rtol=1e-6)
        for key in ("b", "empty", "scalar"):
            np.testing.assert_array_equal(found[key], tensors[key].astype(np.float32))
    assert read_header(tmp_path / "y.safetensors").metadata == {"format": "pt"}


# --- cards and recipes


def export_all(loaded, keep, tmp_path):
    make_base(tmp_path / "base")
    deltas = merged(loaded, keep)
    export_adapters(tmp_path / "adapters", loaded, keep, RECIPE)
    export_peft(tmp_path / "peft", loaded, deltas, RECIPE, rank=2)
    export_checkpoint(tmp_path / "checkpoint", loaded, deltas, tmp_path / "base", RECIPE, dtype="bfloat16")
    return [tmp_path / name for name in ("adapters", "adapters/cars", "peft", "checkpoint")]


def test_cards_have_hub_metadata_and_no_local_path(loaded, keep, tmp_path):
    relations = {"adapters": "adapter", "cars": "adapter", "peft": "adapter", "checkpoint": "merge"}
    for directory in export_all(loaded, keep, tmp_path):
        text = (directory / "README.md").read_text()
        _, metadata, body = text.split("---\n", 2)
        data = yaml.safe_load(metadata)
        assert data["base_model"] == "org/base"
        assert data["base_model_relation"] == relations[directory.name]
        assert {"lora", "merge", "enmp"} <= set(data["tags"])
        assert data["library_name"] == ("transformers" if directory.name == "checkpoint" else "peft")
        assert "| cars | 0.8000 | 0.6000 |" in body and "Seed of the search: 7" in body and "jax " in body
        assert "- layer 0, cars" in body and ("- layer 1, dtd" in body) == (directory.name != "cars")
        for file in (*directory.glob("*.md"), *directory.glob("*.yaml"), *directory.glob("*.json")):
            assert "secret-user" not in file.read_text() and str(tmp_path) not in file.read_text()


def test_config_repeats_the_merge(loaded, keep, tmp_path):
    for directory in export_all(loaded, keep, tmp_path):
        if (directory / "enmp_config.yaml").exists():
            text = (directory / "enmp_config.yaml").read_text()
            data = yaml.safe_load(text)
            assert data["format"] == directory.name and data["seed"] == 7
            assert data["merge"] == dict(RECIPE.merge) and data["pruned"] == [list(p) for p in PRUNED]
            assert [t["name"] for t in data["tasks"]] == list(TASKS)
            assert all(len(t["sha256"]) == 64 for t in data["tasks"])
            assert "enmp merge --adapter cars=cars --adapter dtd=dtd --method ties" in text
            assert "--isotropize " in text and "--prune 0:cars --prune 1:dtd" in text
    assert yaml.safe_load((tmp_path / "peft" / "enmp_config.yaml").read_text())["options"] == {"rank": 2}


def test_a_local_base_is_not_named_as_a_hub_model(tmp_path):
    make(tmp_path / "a", 0)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "private" / "llama")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    loaded = load_adapters({"a": tmp_path / "a"})
    export_adapters(tmp_path / "out", loaded, np.ones((3, 1), bool), Recipe())
    for card in (tmp_path / "out" / "README.md", tmp_path / "out" / "a" / "README.md"):
        assert "base_model" not in card.read_text() and "private" not in card.read_text()


def test_a_directory_in_use_is_refused_untouched(loaded, keep, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    make_base(tmp_path / "base")
    deltas = merged(loaded, keep)
    for export in (
        lambda: export_adapters(tmp_path / "out", loaded, keep, RECIPE),
        lambda: export_peft(tmp_path / "out", loaded, deltas, RECIPE),
        lambda: export_checkpoint(tmp_path / "out", loaded, deltas, tmp_path / "base", RECIPE),
    ):
        with pytest.raises(UserError, match="already there"):
            export()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("task", ["../x", "a/b", ".hidden", "", "x" * 300])
def test_task_names_that_are_no_file_names(tmp_path, task):
    make(tmp_path / "a", 0)
    loaded = load_adapters({task: tmp_path / "a"})
    with pytest.raises(UserError, match="task name"):
        export_adapters(tmp_path / "out", loaded, np.ones((3, 1), bool), Recipe())
    assert {p.name for p in tmp_path.iterdir()} == {"a"}


# --- inspect


def test_inspect_describes_and_reports_what_is_refused(loaded, tmp_path, capfd):
    cars, broken = tmp_path / "secret-user" / "cars", tmp_path / "broken"
    shutil.copytree(cars, broken)
    (broken / "adapter_model.safetensors").write_bytes(b"junk")
    report = inspect([str(cars), str(broken)])
    good, bad = report["adapters"]
    assert good["n_modules"] == 6 and good["rank"] == 2 and good["alpha"] == 4 and good["refused"] is None
    assert good["projections"]["model.layers.{}.mlp.up_proj"] == {
        "layers": [0, 1, 2], "shape": [9, 6], "ranks": [2], "scalings": [2.0], "dtype": "float32",
    }  # fmt: skip
    assert good["heads"] == {"score.weight": [2, 6]}
    modules = loaded.adapters["cars"].modules
    norm = np.sqrt(sum(np.sum((b @ a) ** 2) for path, (a, b) in modules.items() if ".1." in path))
    assert good["norms"]["1"] == pytest.approx(float(norm), rel=1e-6)
    assert "not a valid safetensors" in bad["refused"]

    assert cli.main(["inspect", "--json", str(cars)]) == 0
    assert json.loads(capfd.readouterr().out)["adapters"] == [good]
    assert cli.main(["inspect", str(cars), str(broken)]) == 2
    out, err = capfd.readouterr()
    assert (
        "layers 0-2, rank 2, scaling 2, float32" in out and "refused:" in out and len(err.splitlines()) == 1
    )


def test_inspect_says_when_adapters_do_not_belong_together(tmp_path):
    make(tmp_path / "a", 0)
    save_adapter(tmp_path / "b", read_adapter(tmp_path / "a").modules, 2, 2, "org/other")
    assert "org/other" in inspect([str(tmp_path / "a"), str(tmp_path / "b")])["together"]
    assert inspect([str(tmp_path / "a")])["together"] is None


# --- the command line


def test_the_recorded_command_repeats_the_files(loaded, tmp_path, monkeypatch, capfd):
    """Run ``enmp merge``, then the command line that it recorded, and compare every file."""
    import re
    import shlex

    make_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path / "secret-user")
    shutil.copytree(tmp_path / "base", "base")
    prune = ["--prune", "0:model.layers.{}.mlp.up_proj:cars", "--prune", "1:q_proj:dtd"]
    extra = {
        "adapters": [],
        "peft": ["--rank", "3"],
        "checkpoint": ["--base-model", "base", "--dtype", "bfloat16"],
    }
    for kind, options in extra.items():
        words = [
            "merge",
            "--adapter",
            "cars=cars",
            "--adapter",
            "dtd=dtd",
            "--method",
            "ties",
            "--density",
            "0.4",
        ]
        first = tmp_path / f"{kind}-1"
        assert cli.main([*words, *options, *prune, "--format", kind, "--out", str(first)]) == 0
        recorded = re.search(r"# +(enmp merge .*)", (first / "enmp_config.yaml").read_text())
        assert recorded
        again = [str(tmp_path / f"{kind}-2") if word == "DIR" else word for word in shlex.split(recorded[1])]
        assert cli.main(again[1:]) == 0
        files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
        assert len(files) > 3
        for file in files:
            assert (first / file).read_bytes() == (tmp_path / f"{kind}-2" / file).read_bytes(), file
    capfd.readouterr()


def test_files_can_be_read_by_others(loaded, keep, tmp_path):
    import os

    old = os.umask(0o022)
    try:
        export_adapters(tmp_path / "out", loaded, keep, RECIPE)
    finally:
        os.umask(old)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").rglob("*") if p.is_file()} == {0o644}
