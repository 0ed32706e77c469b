"""Backbones against live torch models: tiny ones of every family, and CLIP's full shapes once."""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import transformers as hf  # noqa: E402

from enmp_jax import merges, models  # noqa: E402
from enmp_jax.adapters import load_adapters  # noqa: E402
from enmp_jax.deltas import LowRank  # noqa: E402
from enmp_jax.lora import stack_adapters  # noqa: E402

pytestmark = pytest.mark.reference

MAKE = Path(__file__).parents[1] / "data" / "models" / "make.py"
spec = importlib.util.spec_from_file_location("models_make", MAKE)
assert spec is not None and spec.loader is not None
make = importlib.util.module_from_spec(spec)
sys.modules["models_make"] = make
spec.loader.exec_module(make)

TOLERANCE = 1e-5
LENGTHS = {"all of one odd length": (5, 5, 5), "padded": (9, 1, 4), "one token": (1, 1, 1)}


def on_disk(case, folder):
    case.model.save_pretrained(folder)
    for path, content in case.extra_files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content))
    return models.load(folder, family=case.family)


def deltas_of(backbone, factors):
    pairs = {}
    for key, value in factors.items():
        path, _, which = key.removesuffix(".weight").rpartition(".lora_")
        pairs.setdefault(path, {})[which] = value
    scale = make.ALPHA / make.RANK
    stack = stack_adapters({"t": {p: (f["A"], scale * f["B"]) for p, f in pairs.items()}}, backbone.n_layers)
    eye = jnp.broadcast_to(jnp.eye(make.RANK), (backbone.n_layers, make.RANK, make.RANK))
    names = {name: backbone.canonical(name) for name in stack.pairs}
    return {n: LowRank(p.b[:, 0], eye, p.a[:, 0]) for n, p in stack.rename(names).pairs.items()}


def variants(case):
    """Inputs of other shapes than the committed ones."""
    if "attention_mask" not in case.inputs:
        return {"as committed": case.inputs}
    types = "token_type_ids" in case.inputs
    return {name: make.texts(40, lengths, types=types) for name, lengths in LENGTHS.items()}


@pytest.mark.parametrize("name", sorted(make.CASES))
def test_features_layers_and_scores_equal_torch(name, tmp_path):
    case = make.CASES[name]()
    backbone, params = on_disk(case, tmp_path)
    features, states = jax.jit(backbone.features), jax.jit(backbone.hidden_states)

    def compare(inputs, expected, deltas):
        x = {k: jnp.asarray(v) for k, v in inputs.items()}
        got = features(params, x, deltas)
        np.testing.assert_allclose(got, expected["features"], atol=TOLERANCE, rtol=0)
        hidden = states(params, x, deltas)[1:]
        real = inputs.get("attention_mask", np.ones(hidden.shape[1:3]))[..., None] > 0
        np.testing.assert_allclose(
            jnp.where(real, hidden, 0), np.where(real, expected["hidden"], 0), atol=TOLERANCE, rtol=TOLERANCE
        )
        if "log_likelihood" in expected:
            assert backbone.log_likelihood is not None
            scores = backbone.log_likelihood(params, x, deltas)
            np.testing.assert_allclose(scores, expected["log_likelihood"], atol=TOLERANCE, rtol=TOLERANCE)

    for inputs in variants(case).values():
        case = case._replace(inputs=inputs)
        compare(inputs, make.outputs(case, case.model, case.model), None)
    factors, expected = make.with_lora(case)
    deltas = deltas_of(backbone, factors)
    assert len(deltas) == (2 if name == "clip_text" else 5 if name == "roberta" else len(backbone.modules))
    compare(case.inputs, expected, deltas)


def test_rgb_images_and_odd_patches(tmp_path):
    case = make.vit(channels=3, size=21, patch=3)
    backbone, params = on_disk(case, tmp_path)
    expected = make.outputs(case, case.model, case.model)
    got = jax.jit(backbone.features)(params, {k: jnp.asarray(v) for k, v in case.inputs.items()})
    np.testing.assert_allclose(got, expected["features"], atol=TOLERANCE, rtol=0)


DECODERS = ("qwen2_window", "gemma", "gemma2", "gemma3", "phi3", "gpt2")


@pytest.mark.parametrize("name", DECODERS)
def test_logits_equal_transformers_with_pefts_adapter_as_it_is_on_disk(name, tmp_path):
    """Base and adapter written by transformers and PEFT, read by us; longer texts than the windows."""
    case = make.CASES[name]()
    backbone, params = on_disk(case, tmp_path / "base")
    config = peft.LoraConfig(
        r=3, lora_alpha=4, use_rslora=True, target_modules=list(case.targets), init_lora_weights=False,
        fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(1)
    model = peft.get_peft_model(case.model, config).eval()
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = load_adapters(
        {"a": tmp_path / "adapter"}, backbone.canonical, n_layers=3, modules=backbone.modules
    )
    assert loaded.stack.projections == tuple(sorted(backbone.modules))
    merge = merges.make("sum")
    deltas = merge.merge(merge.prepare(loaded.stack), jnp.ones((3, 1), bool), 1.0)
    inputs = make.texts(40, (17, 12, 3))

    @jax.jit
    def logits(params, inputs, deltas):
        stream = backbone.embed(params, inputs)._replace(token=None)
        return backbone.logits(params, backbone.run(params, stream, deltas))

    x = {k: jnp.asarray(v) for k, v in inputs.items()}
    real = inputs["attention_mask"][..., None] > 0
    with torch.no_grad():
        with_adapter = model(**make.tensors(inputs)).logits.numpy()
        with model.disable_adapter():
            without = model(**make.tensors(inputs)).logits.numpy()
    assert np.abs(with_adapter - without).max() > 0.1
    for expected, delta in ((with_adapter, deltas), (without, None)):
        got = logits(params, x, delta)
        np.testing.assert_allclose(got * real, expected * real, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name", ["vit", "bert", "roberta", "llama", "llama_lm", "qwen3", "gemma2", "phi4", "gpt2", "clip"]
)
def test_transformers_reads_what_save_writes(name, tmp_path):
    case = make.CASES[name]()
    backbone, params = on_disk(case, tmp_path / "theirs")
    head = models.load_head(tmp_path / "theirs")
    heads = None if head is None else {backbone.spelling.heads[0]: head}
    models.save(tmp_path / "ours", backbone, params, heads)
    kind = hf.CLIPVisionModelWithProjection if name == "clip" else type(case.model)
    loaded: Any = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    if name == "clip":
        with torch.no_grad():
            out = model.eval()(make.pixels(case.inputs["image"], make.CLIP_MEAN, make.CLIP_STD)).image_embeds
            expected = make.outputs(case, case.model, case.model)["features"]
        np.testing.assert_allclose(out / out.norm(dim=-1, keepdim=True), expected, atol=TOLERANCE)
        return
    case = case._replace(model=model.eval())
    live = make.outputs(case, model, model)
    reference = make.CASES[name]()
    for key, value in make.outputs(reference, reference.model, reference.model).items():
        np.testing.assert_array_equal(live[key], value)


def test_zero_shot_logits_equal_clips():
    case = make.clip()
    folder = make.HERE / "clip"
    vision, weights = models.load(folder)
    text, params = models.load(folder, family="clip_text_model")
    ids = make.clip_text().inputs["input_ids"]

    def tokenizer(prompts, padding, return_tensors):
        return {"input_ids": ids[[int(prompt) for prompt in prompts]]}

    head = models.clip.zero_shot_head(text, params, ["0", "1", "2"], ["{}"], tokenizer)
    features = vision.features(weights, {"image": jnp.asarray(case.inputs["image"])})
    pixels = make.pixels(case.inputs["image"], make.CLIP_MEAN, make.CLIP_STD)
    with torch.no_grad():
        out = case.model(input_ids=torch.tensor(ids).long(), pixel_values=pixels)
    np.testing.assert_allclose(features @ head.T, out.logits_per_image, atol=1e-4)  # logits reach 14


@pytest.mark.parametrize(("name", "patch", "width", "layers"), [("B", 32, 768, 12), ("L", 14, 1024, 24)])
def test_full_size_clip(name, patch, width, layers, tmp_path):
    """ViT-B/32 and ViT-L/14 in full, random weights, one image."""
    torch.manual_seed(0)
    config = hf.CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, patch_size=patch, projection_dim=width * 2 // 3,
    )  # fmt: skip
    model = hf.CLIPVisionModelWithProjection(config).eval()
    model.save_pretrained(tmp_path, max_shard_size="500MB")
    image = np.random.RandomState(0).randint(0, 256, (1, 224, 224, 3)).astype(np.uint8)
    with torch.no_grad():
        expected = model(make.pixels(image, models.clip.MEAN, models.clip.STD)).image_embeds
        expected = (expected / expected.norm(dim=-1, keepdim=True)).numpy()
    del model
    gc.collect()
    backbone, params = models.load(tmp_path)
    got = jax.jit(backbone.features)(params, {"image": jnp.asarray(image)})
    np.testing.assert_allclose(got, expected, atol=1e-5)
