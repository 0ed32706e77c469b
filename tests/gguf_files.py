"""Tiny GGUF files as llama.cpp's converter writes them, with the Hugging Face tensors they were made of."""

from __future__ import annotations

import gguf
import jax
import numpy as np

from enmp_jax import models
from enmp_jax.models import convert

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 288, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "head_dim": 16,
}  # fmt: skip
CHAT = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
NAMES = {  # llama.cpp's, from its gguf-py/gguf/tensor_mapping.py
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def config(kind="llama", tied=True, **more):
    architecture = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind] + "ForCausalLM"
    return {
        "model_type": kind,
        "architectures": [architecture],
        "tie_word_embeddings": tied,
        "rope_theta": 50000.0,
        **SIZES,
        **more,
    }


def hf_tensors(settings, seed=0):
    """Random tensors, norms and biases included, under Hugging Face names."""
    backbone = models.build(settings)
    rng = np.random.default_rng(seed)
    shapes = convert.to_tensors(backbone, backbone.init(jax.random.key(0)))
    return {
        name: (rng.normal(size=value.shape) * 0.2 + ("norm" in name)).astype(np.float32)
        for name, value in shapes.items()
    }


def gguf_name(name):
    module, part = name.rsplit(".", 1)
    if module in NAMES:
        return f"{NAMES[module]}.{part}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{part}"


def permute(weights, heads):
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py, called with the heads of q, or of k."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def byte_level_tokens():
    """256 bytes as GPT-2 spells them, two merges, special tokens; padded with unused ones to 288."""
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "<s>", "</s>", "<|end|>"]
    kinds = [1] * 258 + [3, 3, 4]
    fill = 288 - len(tokens)
    return tokens + [f"<unused{i}>" for i in range(fill)], kinds + [5] * fill, ["t h", "th e"]


def write(path, settings, tensors, quantisation="F32", metadata=None, tokenizer=True, only=None):
    """A GGUF file of Hugging Face tensors; matrices get the quantisation, others stay float32.

    Args:
        path: file to make.
        settings: config.json.
        tensors: name -> float32 array.
        quantisation: of gguf.GGMLQuantizationType.
        metadata: keys to add or to change, None to leave one out.
        tokenizer: write one.
        only: whether a tensor of this name is quantised.
    """
    kind = settings["model_type"]
    writer = gguf.GGUFWriter(path, kind)
    values = {
        f"{kind}.block_count": settings["num_hidden_layers"],
        f"{kind}.context_length": settings["max_position_embeddings"],
        f"{kind}.embedding_length": settings["hidden_size"],
        f"{kind}.feed_forward_length": settings["intermediate_size"],
        f"{kind}.attention.head_count": settings["num_attention_heads"],
        f"{kind}.attention.head_count_kv": settings["num_key_value_heads"],
        f"{kind}.attention.key_length": settings["head_dim"],
        f"{kind}.attention.layer_norm_rms_epsilon": settings["rms_norm_eps"],
        f"{kind}.rope.freq_base": settings["rope_theta"],
        "general.type": "model",
        **(metadata or {}),
    }
    for key, value in values.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    if tokenizer:
        tokens, kinds, merges = byte_level_tokens()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges(merges)
        writer.add_bos_token_id(258)
        writer.add_eos_token_id(259)
        writer.add_chat_template(CHAT)
    heads = {"q_proj": settings["num_attention_heads"], "k_proj": settings["num_key_value_heads"]}
    wanted = gguf.GGMLQuantizationType[quantisation]
    for name, value in tensors.items():
        projection = name.split(".")[-2]
        if kind == "llama" and projection in heads:
            value = permute(value, heads[projection])
        quantised = value.ndim > 1 and (only is None or only(name))
        qtype = wanted if quantised else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(np.ascontiguousarray(value), qtype)
        writer.add_tensor(gguf_name(name), data, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
