"""Adapters made by PEFT itself, imported by us, against PEFT's ``merge_and_unload``."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import safetensors.torch
import tiny_models as tiny
import torch

from enmp_jax import models
from enmp_jax.adapters import load_adapters, read_adapter

pytestmark = pytest.mark.reference

OPTIONS = {
    "plain": {},
    "alpha over r is no power of two": {"r": 3, "lora_alpha": 7},
    "rslora": {"use_rslora": True, "r": 5},
    "rank pattern": {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 7}},
    "alpha pattern": {"alpha_pattern": {"v_proj": 3, r"^model.layers.0.self_attn.q_proj": 11}},
    "pattern with regex": {
        "rank_pattern": {r".*\.[02]\..*": 2},
        "alpha_pattern": {r"layers\.\d\.mlp\..*": 5},
    },
    "rslora and patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 5, "v_proj": 1},
    },
    "first matching pattern wins": {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 3}},
    "targets by regex": {"target_modules": r".*layers\.[01]\.(self_attn|mlp)\.(k|up|gate)_proj"},
    "targets by full name": {"target_modules": ["model.layers.2.mlp.down_proj", "layers.0.self_attn.o_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "layers to transform": {"layers_to_transform": [0, 2]},
    "one layer, pattern": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["layers.1.self_attn.q_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "eva dropout": {"lora_dropout": 0.5},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make_base("llama", tmp_path_factory.mktemp("llama"))


def expected(base, adapter) -> dict[str, np.ndarray]:
    """What PEFT adds to each weight: merged into a base whose weights are zero, so nothing is rounded off."""
    model = tiny.load_base("llama", base)
    for parameter in model.parameters():
        parameter.data.zero_()
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    deltas = {k: v.numpy() for k, v in merged.state_dict().items() if "layers." in k}
    return {key.removesuffix(".weight"): delta for key, delta in deltas.items() if delta.any()}


def check(base, adapter):
    found = read_adapter(adapter)
    wanted = expected(base, adapter)
    assert set(found.modules) == set(wanted)
    for path, (a, b) in found.modules.items():
        np.testing.assert_allclose(b @ a.astype(np.float32), wanted[path], rtol=2e-6, atol=1e-7)
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_import_gives_the_delta_that_peft_merges(base, tmp_path, name):
    options = {"target_modules": ["q_proj", "v_proj"]} | OPTIONS[name]
    found = check(base, tiny.make_adapter("llama", base, tmp_path / "adapter", 0, **options))
    backbone = models.build(json.loads((base / "config.json").read_text()))
    loaded = load_adapters(
        {"task": tmp_path / "adapter"},
        canonical=backbone.canonical,
        n_layers=backbone.n_layers,
        modules=backbone.modules,
    )
    assert loaded.stack.present().sum() == len(found.modules)
    assert set(found.heads) == {"score"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_four_types_of_file(base, tmp_path, dtype):
    path = tiny.make_adapter("llama", base, tmp_path / "adapter", 0, r=3, lora_alpha=7)
    file = path / "adapter_model.safetensors"
    tensors = {key: value.to(dtype) for key, value in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    found = check(base, path)
    kept = {torch.bfloat16: "bfloat16", torch.float16: "float16"}.get(dtype, "float32")
    assert {str(a.dtype) for a, _ in found.modules.values()} == {kept}


def test_fan_in_fan_out_is_the_transposed_delta(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from enmp_jax import merges
    from enmp_jax.adapters.hf_export import export_checkpoint
    from enmp_jax.adapters.recipe import Recipe

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=30, n_positions=16))
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        wanted = adapted.eval()(tokens).logits.numpy()

    loaded = load_adapters({"task": tmp_path / "adapter"})
    merge = merges.make("sum")
    deltas = merge.merge(merge.prepare(loaded.stack), jnp.ones((2, 1), bool), 1.0)
    export_checkpoint(tmp_path / "merged", loaded, deltas, tmp_path / "base", Recipe())
    with torch.no_grad():
        merged = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()(tokens).logits.numpy()
    np.testing.assert_allclose(merged, wanted, atol=1e-5, rtol=0)


def test_vit_adapters_of_transformers_5_and_4(tmp_path):
    """The same module is ``vit.layers.0.attention.q_proj`` in transformers 5 and
    ``vit.encoder.layer.0.attention.attention.query`` in transformers 4 and in files."""
    from transformers import ViTConfig, ViTForImageClassification

    from enmp_jax.adapters import save_adapter

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 20,
    }
    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **sizes))
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj", "fc1"], r=2, init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "new")
    new = read_adapter(tmp_path / "new")
    spelled = {
        path.replace("layers.", "encoder.layer.")
        .replace("attention.q_proj", "attention.attention.query")
        .replace("mlp.fc1", "intermediate.dense"): pair
        for path, pair in new.modules.items()
    }
    assert not set(spelled) & set(new.modules)
    save_adapter(tmp_path / "old", spelled, 2, 2, None)
    backbone, _ = models.load(tmp_path / "base")
    loaded = load_adapters(
        {"new": tmp_path / "new", "old": tmp_path / "old"},
        canonical=backbone.canonical,
        n_layers=backbone.n_layers,
        modules=backbone.modules,
    )
    assert set(loaded.stack.pairs) <= set(backbone.modules)
    for pair in loaded.stack.pairs.values():
        assert pair.present.all()
        np.testing.assert_array_equal(pair.b[:, 0] @ pair.a[:, 0], pair.b[:, 1] @ pair.a[:, 1])


@pytest.mark.parametrize("key,options", [
    ("DoRA", {"use_dora": True}),
    ("bias", {"bias": "lora_only"}),
    ("PiSSA", {"init_lora_weights": "pissa"}),
    ("OLoRA", {"init_lora_weights": "olora"}),
    ("lora_bias", {"lora_bias": True}),
    ("embeddings saved", {"modules_to_save": ["embed_tokens"]}),
    ("modules_to_save", {"modules_to_save": ["norm"]}),
    ("trainable_token_indices", {"trainable_token_indices": [1, 2]}),
])  # fmt: skip
def test_what_peft_can_do_and_we_cannot_is_refused_by_name(base, tmp_path, key, options):
    from enmp_jax.errors import UserError

    options = {"target_modules": ["q_proj"]} | options
    model = peft.get_peft_model(tiny.load_base("llama", base), peft.LoraConfig(r=2, **options))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=key):
        read_adapter(tmp_path / "adapter")


def test_a_lora_on_embeddings_is_read_though_peft_saves_their_weights_with_it(base, tmp_path):
    model = peft.get_peft_model(
        tiny.load_base("llama", base), peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
    )
    model.save_pretrained(tmp_path / "adapter")
    found = read_adapter(tmp_path / "adapter")
    assert [kept.kind for kept in found.stored.values()] == ["embedding"]
    assert "model.embed_tokens" in found.modules and not found.heads
