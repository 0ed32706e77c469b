"""Reading adapters: spellings, bases, matching with a backbone, hub ids; saving them."""

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from enmp_jax.adapters import load_adapters, read_adapter, save_adapter
from enmp_jax.adapters.matching import same_base
from enmp_jax.errors import UserError
from enmp_jax.io.reading import finite
from enmp_jax.lora import stack_adapters
from enmp_jax.masks import MaskSpec

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


def factors(paths, rank=2, out=4, inner=6, seed=0, dtype: Any = np.float32):
    random = np.random.default_rng(seed)
    return {
        path: (
            random.normal(size=(rank, inner)).astype(dtype), random.normal(size=(out, rank)).astype(dtype)
        )
        for path in paths
    }  # fmt: skip


def paths(prefix="", layers=(0, 1), names=("q_proj", "v_proj")):
    return [f"{prefix}encoder.layers.{layer}.self_attn.{name}" for layer in layers for name in names]


def test_round_trip_is_bit_for_bit(tmp_path):
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        name = np.dtype(dtype).name
        modules = factors(paths(), dtype=dtype)
        heads = {"classifier": {"weight": np.eye(3, 6, dtype=np.float32), "bias": np.zeros(3, np.float32)}}
        save_adapter(tmp_path / name, modules, 2, 2, "a/b", heads=heads, task_type="SEQ_CLS")
        loaded = load_adapters({"t": tmp_path / name})
        stack = loaded.stack
        spec = MaskSpec.of(stack)
        assert spec.n_modules == 2
        again = {}
        for template, pair in stack.pairs.items():
            for layer in range(stack.n_layers):
                a, b = np.asarray(pair.a[layer, 0]), np.asarray(pair.b[layer, 0])
                again[template.replace("{}", str(layer))] = (a.astype(dtype), b.astype(dtype))
        save_adapter(tmp_path / f"{name}-2", again, 2, 2, "a/b", heads=loaded.heads["t"], task_type="SEQ_CLS")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / f"{name}-2" / file).read_bytes()


def test_scaling_is_folded_into_b(tmp_path):
    modules = factors(paths())
    save_adapter(tmp_path / "a", modules, 2, 5, None)
    for path, (a, b) in read_adapter(tmp_path / "a").modules.items():
        np.testing.assert_array_equal(a, modules[path][0])
        np.testing.assert_array_equal(b, modules[path][1] * np.float32(2.5))


def test_layouts_other_than_c_order_are_saved_right(tmp_path):
    modules = {path: (np.asfortranarray(a), b[::-1]) for path, (a, b) in factors(paths()).items()}
    save_adapter(tmp_path / "a", modules, 2, 2, None)
    for path, (a, b) in read_adapter(tmp_path / "a").modules.items():
        np.testing.assert_array_equal(a, modules[path][0])
        np.testing.assert_array_equal(b, modules[path][1])


def rewrite(source: Path, target: Path, rename, **config):
    """The same adapter with other keys."""
    target.mkdir()
    found = safetensors.numpy.load_file(source / "adapter_model.safetensors")
    tensors = {rename(key): value for key, value in found.items()}
    safetensors.numpy.save_file(tensors, target / "adapter_model.safetensors")
    settings = json.loads((source / "adapter_config.json").read_text()) | config
    (target / "adapter_config.json").write_text(json.dumps(settings))
    return target


SPELLINGS = {
    "no base_model.model.": lambda k: k.removeprefix("base_model.model."),
    "adapter name": lambda k: k.replace(".weight", ".default.weight") if "lora" in k else k,
    "other adapter name": lambda k: k.replace("lora_A.", "lora_A.x-1.").replace("lora_B.", "lora_B.x-1."),
    "base_layer": lambda k: k.replace(".lora_", ".base_layer.lora_"),
    "modules_to_save": lambda k: k.replace("classifier.", "classifier.modules_to_save.default."),
    "modules_to_save without a name": lambda k: k.replace("classifier.", "classifier.modules_to_save."),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_keys(tmp_path, name):
    head = {"weight": np.eye(3, dtype=np.float32), "bias": np.ones(3, np.float32)}
    modules = factors(paths())
    save_adapter(
        tmp_path / "a", modules, 2, 2, None, heads={"classifier": head}, target_modules=["q_proj", "v_proj"]
    )
    found = read_adapter(rewrite(tmp_path / "a", tmp_path / "b", SPELLINGS[name]))
    assert set(found.modules) == set(modules) and set(found.heads) == {"classifier"}
    for path, (a, b) in found.modules.items():
        np.testing.assert_array_equal(b @ a, modules[path][1] @ modules[path][0])
    assert set(found.heads["classifier"]) == {"weight", "bias"}


def test_nested_heads_keep_their_names(tmp_path):
    heads = {
        "classifier.dense": {"weight": np.ones((3, 3), np.float32)},
        "classifier.out_proj": {"weight": np.zeros((2, 3), np.float32), "bias": np.zeros(2, np.float32)},
    }
    save_adapter(tmp_path / "a", factors(paths()), 2, 2, None, heads=heads)
    target = rewrite(tmp_path / "a", tmp_path / "b", lambda k: k, modules_to_save=["classifier"])
    assert set(read_adapter(target).heads) == set(heads)


def test_prefixes_of_two_transformers_versions_are_one(tmp_path):
    save_adapter(tmp_path / "new", factors(paths()), 2, 2, None)
    save_adapter(tmp_path / "old", factors(paths("vision_model.", layers=(0, 2)), seed=1), 2, 2, None)
    loaded = load_adapters({"new": tmp_path / "new", "old": tmp_path / "old"})
    names = (
        "vision_model.encoder.layers.{}.self_attn.q_proj",
        "vision_model.encoder.layers.{}.self_attn.v_proj",
    )
    assert loaded.stack.projections == names
    np.testing.assert_array_equal(loaded.stack.present()[:, 0], [[1, 1], [1, 0], [0, 1]])


def test_a_prefix_that_may_mean_two_towers_is_refused(tmp_path):
    both = factors([*paths("vision_model."), *paths("text_model.")])
    save_adapter(tmp_path / "both", both, 2, 2, None)
    save_adapter(tmp_path / "one", factors(paths()), 2, 2, None)
    with pytest.raises(UserError, match=r"may mean text_model\.\S+ and vision_model\."):
        load_adapters({"both": tmp_path / "both", "one": tmp_path / "one"})


def test_adapters_of_unrelated_models_are_refused(tmp_path):
    save_adapter(tmp_path / "a", factors(paths()), 2, 2, None)
    save_adapter(tmp_path / "b", factors(["bert.encoder.layer.0.query"]), 2, 2, None)
    with pytest.raises(UserError, match="no layers in common"):
        load_adapters({"a": tmp_path / "a", "b": tmp_path / "b"})


def test_a_packaged_base_is_the_same_under_both_its_names():
    """As a run file elsewhere that extends a packaged one has it."""
    assert same_base("package:demo/base", "demo/base/")
    assert not same_base("package:demo/base", "vision-small/base")


def test_different_bases_are_refused_unless_allowed(tmp_path):
    for name, base in (("a", "meta/llama"), ("b", "meta/other"), ("c", None), ("d", "meta/llama")):
        save_adapter(tmp_path / name, factors(paths()), 2, 2, base)
    load = {name: tmp_path / name for name in "abcd"}
    with pytest.raises(UserError, match=r"'b' was trained on meta/other.*--allow-base-mismatch"):
        load_adapters(load)
    assert load_adapters(load, allow_base_mismatch=True).base_model == "meta/llama"
    assert load_adapters({name: load[name] for name in "acd"}).base_model == "meta/llama"
    with pytest.raises(UserError, match="the base model in use is meta/third"):
        load_adapters({"a": load["a"]}, base_name="meta/third")


BACKBONE = {
    "vision_model.encoder.layers.{}.self_attn.q_proj": (4, 6),
    "vision_model.encoder.layers.{}.fc1": (8, 6),
}


def canonical(template):
    name = "vision_model." + template.removeprefix("vision_model.")
    return name if name in BACKBONE else None


def test_partial_and_zero_matches_with_a_backbone_say_how_many(tmp_path):
    save_adapter(tmp_path / "some", factors(paths()), 2, 2, None)
    save_adapter(tmp_path / "none", factors(["h.0.c_attn", "h.0.c_proj", "h.1.c_attn"]), 2, 2, None)
    save_adapter(tmp_path / "all", factors(paths(names=("q_proj",))), 2, 2, None)
    with pytest.raises(
        UserError, match=r"2 of 4 LoRA modules of adapter 't' are in the base model"
    ) as caught:
        load_adapters({"t": tmp_path / "some"}, canonical, modules=BACKBONE, n_layers=2)
    assert "encoder.layers.{}.self_attn.v_proj" in str(caught.value)
    with pytest.raises(
        UserError, match=r"0 of 3 LoRA modules.*h\.\{\}\.c_attn and h\.\{\}\.c_proj"
    ) as caught:
        load_adapters({"t": tmp_path / "none"}, canonical, modules=BACKBONE, n_layers=2)
    assert all(name in str(caught.value) for name in BACKBONE)  # two examples of the base's names
    loaded = load_adapters({"t": tmp_path / "all"}, canonical, modules=BACKBONE, n_layers=3)
    assert loaded.stack.n_layers == 3
    spelled = tuple(f"encoder.layers.{layer}.self_attn.q_proj" for layer in range(3))
    assert loaded.names == {next(iter(BACKBONE)): spelled}


def test_shapes_and_layers_against_the_backbone(tmp_path):
    save_adapter(tmp_path / "wide", factors(paths(names=("q_proj",)), inner=7), 2, 2, None)
    save_adapter(tmp_path / "deep", factors(paths(names=("q_proj",), layers=(0, 5))), 2, 2, None)
    with pytest.raises(UserError, match="is 4x7 in adapter 't' but 4x6 in the base model"):
        load_adapters({"t": tmp_path / "wide"}, canonical, modules=BACKBONE, n_layers=2)
    with pytest.raises(UserError, match="layer 5, but the base model has 2 layers"):
        load_adapters({"t": tmp_path / "deep"}, canonical, modules=BACKBONE, n_layers=2)


def test_ranks_may_differ_between_tasks(tmp_path):
    save_adapter(tmp_path / "a", factors(paths(), rank=2), 2, 2, None)
    save_adapter(tmp_path / "b", factors(paths(), rank=3, seed=1), 3, 3, None)
    stack = load_adapters({"a": tmp_path / "a", "b": tmp_path / "b"}).stack
    wanted = stack_adapters({"a": factors(paths(), rank=2), "b": factors(paths(), rank=3, seed=1)})
    for template, pair in stack.pairs.items():
        np.testing.assert_array_equal(pair.a, wanted.pairs[template].a)
        np.testing.assert_array_equal(pair.b, wanted.pairs[template].b)
        assert pair.rank == wanted.pairs[template].rank == ((2, 3), (2, 3))


def test_saving_into_a_directory_in_use_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("precious")
    with pytest.raises(UserError, match="already there"):
        save_adapter(tmp_path / "a", factors(paths()), 2, 2, None)
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "mine"]
    (tmp_path / "empty").mkdir()
    save_adapter(tmp_path / "empty", factors(paths()), 2, 2, None)
    assert read_adapter(tmp_path / "empty").settings.rank == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot make the directory"):
        save_adapter(tmp_path / "a", factors(paths()), 2, 2, None)


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(UserError, match="No space left"):
        save_adapter(tmp_path / "a", factors(paths()), 2, 2, None)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_reads_back_different_is_noticed(tmp_path, monkeypatch):
    import enmp_jax.io.writing as writing

    save = safetensors.numpy.save_file
    wrong = lambda t, path, meta: save({k: v + 1e-7 * v for k, v in t.items()}, path, meta)  # noqa: E731
    monkeypatch.setattr(writing.safetensors.numpy, "save_file", wrong)
    with pytest.raises(UserError, match="does not read back"):
        save_adapter(tmp_path / "a", factors(paths()), 2, 2, None)
    assert list(tmp_path.iterdir()) == []


def test_finite_agrees_with_numpy_at_the_edges():
    big = np.full(4, 3e38, np.float32)  # whose squares overflow
    assert finite(big) and finite(np.zeros((0, 3), np.float32)) and finite(np.ones(3, ml_dtypes.bfloat16))
    for bad in (np.nan, np.inf, -np.inf):
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
            assert not finite(np.array([1, bad, 2], dtype))


@pytest.mark.skipif(not GOLDEN.exists(), reason="golden adapters are not here")
def test_golden_adapters_stack():
    order = json.loads((GOLDEN / "order.json").read_text())
    for suite, tasks in order.items():
        loaded = load_adapters({task: GOLDEN / suite / task for task in tasks})
        assert loaded.stack.tasks == tuple(tasks)
        assert loaded.stack.present().all()
        for i, task in enumerate(tasks):
            tensors = safetensors.numpy.load_file(GOLDEN / suite / task / "adapter_model.safetensors")
            config = json.loads((GOLDEN / suite / task / "adapter_config.json").read_text())
            for template, pair in loaded.stack.pairs.items():
                for layer in range(loaded.stack.n_layers):
                    key = f"base_model.model.{template.replace('{}', str(layer))}.lora_"
                    np.testing.assert_array_equal(pair.a[layer, i], tensors[f"{key}A.weight"])
                    scaled = tensors[f"{key}B.weight"] * np.float32(config["lora_alpha"] / config["r"])
                    np.testing.assert_array_equal(pair.b[layer, i], scaled)
