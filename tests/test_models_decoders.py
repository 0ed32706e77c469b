"""Gemma, Phi-3 and GPT-2: what their configurations ask for, and adapters on fused and transposed weights."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from adapter_files import RECIPE, merged
from test_models_golden import GOLDEN, as_arrays, close, golden, load

from enmp_jax import models
from enmp_jax.adapters import load_adapters, save_adapter
from enmp_jax.adapters.hf_export import export_checkpoint
from enmp_jax.errors import UserError
from enmp_jax.models.rope import rope

GEMMA3 = {"model_type": "gemma3_text", "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 7}
QWEN2 = {"model_type": "qwen2", "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 8}


def adapter_from_golden(case, folder, **changes):
    """The golden LoRA of a case as PEFT would have written it."""
    pairs = {}
    for key, value in golden(case)["factor"].items():
        path, _, side = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        pairs.setdefault(path, {})[side] = value
    save_adapter(folder, {path: (pair["A"], pair["B"]) for path, pair in pairs.items()}, 2, 3.0, None)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("case", "told"), [("gemma2", False), ("phi3", False), ("gpt2", True), ("gpt2", False)]
)
def test_an_adapter_goes_in_and_a_checkpoint_comes_out(case, told, tmp_path):
    """Through the import and the merge to the forward pass, and through the files of a merged model."""
    backbone, params = load(case)
    adapter = adapter_from_golden(case, tmp_path / "adapter", fan_in_fan_out=told)
    loaded = load_adapters(
        {"a": adapter}, backbone.canonical, n_layers=backbone.n_layers, modules=backbone.modules
    )
    assert loaded.stack.projections == tuple(sorted(backbone.modules))
    deltas = merged(loaded, np.ones((3, 1), bool), scale=1.0)
    inputs, expected = as_arrays(golden(case)["input"]), golden(case)["lora"]["features"]
    close(jax.jit(backbone.features)(params, inputs, deltas), expected)
    export_checkpoint(tmp_path / "out", loaded, deltas, GOLDEN / case, RECIPE)
    again, merged_params = models.load(tmp_path / "out")
    np.testing.assert_allclose(jax.jit(again.features)(merged_params, inputs), expected, atol=3e-5)


def test_adapters_of_experts_are_merged_and_exported(tmp_path):
    """Mixtral as transformers 4 and PEFT spell it: one LoRA for each expert, merged without a backbone."""
    random = np.random.default_rng(0)
    paths = [
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w{i}"
        for layer in range(2)
        for expert in range(11)
        for i in (1, 2)
    ]
    sides = {}
    for task in ("a", "b"):
        sides[task] = {p: (random.normal(size=(2, 6)), random.normal(size=(4, 2))) for p in paths}
        modules = {p: (x.astype(np.float32), y.astype(np.float32)) for p, (x, y) in sides[task].items()}
        save_adapter(tmp_path / task, modules, 2, 2, "org/mixtral")
    base = {f"{p}.weight": random.normal(size=(4, 6)).astype(np.float32) for p in paths}
    base["model.layers.0.block_sparse_moe.gate.weight"] = np.ones((11, 6), np.float32)
    (tmp_path / "base").mkdir()
    safetensors.numpy.save_file(base, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "mixtral"}')
    loaded = load_adapters({task: tmp_path / task for task in sides})
    keep = np.ones((2, 22, 2), bool)
    keep[1, loaded.stack.projections.index("model.layers.{}.block_sparse_moe.experts.10.w2"), 0] = False
    export_checkpoint(tmp_path / "out", loaded, merged(loaded, keep, scale=1.0), tmp_path / "base", RECIPE)
    found = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    for path in paths:
        tasks = ("b",) if path.endswith("1.block_sparse_moe.experts.10.w2") else ("a", "b")
        expected = base[f"{path}.weight"] + sum(sides[t][path][1] @ sides[t][path][0] for t in tasks)
        np.testing.assert_allclose(found[f"{path}.weight"], expected, atol=1e-5)
    assert (found["model.layers.0.block_sparse_moe.gate.weight"] == 1).all()


def test_windows_by_layer():
    def windowed(**changes):
        return models.build(GEMMA3 | changes).config.windowed

    assert windowed() == (True,) * 5 + (False, True)
    assert windowed(sliding_window_pattern=2) == (True, False) * 3 + (True,)
    kinds = ["full_attention"] * 6 + ["sliding_attention"]
    assert windowed(layer_types=kinds) == (False,) * 6 + (True,)
    assert models.build(QWEN2 | {"max_window_layers": 3}).config.windowed == (False, False, False, True)
    assert models.build(QWEN2).config.windowed == (False,) * 4  # from layer 28 on
    assert models.build(QWEN2 | {"use_sliding_window": False}).config.window is None


def test_both_generations_of_gemmas_rope_settings_are_read():
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = models.build(
        GEMMA3 | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": scaling}
    ).config
    both = {
        "full_attention": scaling | {"rope_theta": 1e6},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    new = models.build(GEMMA3 | {"rope_parameters": both}).config
    assert (old.rope, old.window_rope) == (new.rope, new.window_rope)
    assert old.window_rope == rope({"rope_theta": 1e4}, 256)
    assert (
        old.rope == rope({"rope_theta": 1e6, "rope_scaling": scaling}, 256) != rope({"rope_theta": 1e6}, 256)
    )


def test_gemmas_first_releases_say_gelu_and_mean_tanh():
    assert models.build({"model_type": "gemma", "hidden_act": "gelu"}).config.block.activation == (
        "gelu_pytorch_tanh"
    )


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA3 | {"layer_types": ["full_attention"]}, "1 entries for 7 layers"),
        (GEMMA3 | {"layer_types": ["chunked_attention"] * 7}, "chunked_attention"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention"),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            "short_factor has 1 numbers, but 48 pairs",
        ),
        ({"model_type": "phi3", "rope_scaling": {"type": "dynamic"}}, "dynamic"),
        ({"model_type": "mixtral"}, "mixture of experts.*enmp merge"),
        ({"model_type": "qwen3_moe"}, "mixture of experts.*enmp merge"),
        ({"model_type": "gemma3"}, "text and images"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_refused(config, part):
    with pytest.raises(UserError, match=part):
        models.build(config)


@pytest.mark.parametrize("case", ["gpt2", "phi4"])
def test_texts_longer_than_the_positions_are_refused(case):
    backbone, params = load(case)
    ids = jnp.full((1, 33), 7)
    with pytest.raises(UserError, match=r"33 tokens.*at most 32"):
        backbone.features(params, {"input_ids": ids, "attention_mask": ids})
    # several texts in one row: each is short
    several = {"input_ids": ids, "attention_mask": ids, "position": jnp.arange(33)[None] % 11}
    assert np.isfinite(backbone.features(params, several)).all()
