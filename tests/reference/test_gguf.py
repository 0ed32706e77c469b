"""GGUF bases and the adapters we write, as llama.cpp itself computes them (the wheel xllamacpp brings it)."""

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

import gguf_files as files
import xllamacpp as llama_cpp

from enmp_jax import merges, models
from enmp_jax.adapters import load_adapters, save_adapter
from enmp_jax.adapters.gguf_export import export_gguf
from enmp_jax.adapters.recipe import Recipe

pytestmark = pytest.mark.reference
PROMPT = [9, 14, 57, 12, 20, 3, 77]
ASCII = 94  # so many tokens are printable ASCII; of half a character or an end of text nothing is told


def by_llama_cpp(model, lora=None):
    """Log probabilities of the likeliest next tokens: token -> nats."""
    params = llama_cpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_gpu_layers, params.warmup, params.n_parallel = 256, 0, False, 1
    if lora is not None:
        adapter = llama_cpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = str(lora), 1.0
        params.lora_adapters = [adapter]
    request = {"prompt": PROMPT, "n_predict": 1, "temperature": 0.0, "n_probs": 20}
    answer = llama_cpp.Server(params).handle_completions(request)
    content = answer["choices"][0]["logprobs"]["content"]
    return {entry["id"]: entry["logprob"] for entry in content[0]["top_logprobs"]}


def by_us(model, deltas=None):
    backbone, params = model
    ids = jnp.asarray([PROMPT], jnp.int32)
    inputs = {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}
    hidden = backbone.run(params, backbone.embed(params, inputs)._replace(token=None), deltas)
    logits = np.asarray(backbone.logits(params, hidden))[0, -1].astype(np.float64)
    return logits - np.log(np.exp(logits).sum())


def agree(ours, theirs, atol):
    assert len(theirs) == 20
    np.testing.assert_allclose([ours[token] for token in theirs], list(theirs.values()), atol=atol)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_base_and_adapter(kind, tmp_path):
    settings = files.config(kind)
    tensors = files.hf_tensors(settings)
    tensors["model.embed_tokens.weight"][ASCII:] = 0  # no likeliest next tokens
    path = files.write(tmp_path / "base.gguf", settings, tensors)
    model = models.load(path)
    plain = by_us(model)
    # llama.cpp's cache of keys and values is in float16
    agree(plain, by_llama_cpp(path), atol=2e-2)

    rng = np.random.default_rng(0)
    factors = {
        name.replace("{}", str(layer)): (
            rng.normal(size=(3, width)).astype(np.float32) * 0.2,
            rng.normal(size=(out, 3)).astype(np.float32) * 0.2,
        )
        for name, (out, width) in model[0].modules.items()
        for layer in range(2)
    }
    save_adapter(tmp_path / "lora", factors, 3, 3, "org/base")
    loaded = load_adapters({"one": tmp_path / "lora"}, model[0].canonical, modules=model[0].modules)
    merge = merges.make("sum")
    deltas = merge.merge(merge.prepare(loaded.stack), jnp.ones((2, 1), bool), 1.0)
    export_gguf(tmp_path / "out", loaded, deltas, path, Recipe())
    ours = by_us(model, deltas)
    assert np.abs(ours - plain).max() > 0.2
    agree(ours, by_llama_cpp(path, tmp_path / "out" / "adapter.gguf"), atol=2e-2)
