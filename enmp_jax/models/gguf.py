"""A base model in a GGUF file: its configuration, tokenizer and tensors as a Hugging Face directory has them.

llama.cpp stores the rows of llama's q and k permuted, for rotary embeddings of neighbouring dimensions
(``LlamaModel.permute`` of its convert_hf_to_gguf.py); here they are put back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from enmp_jax.errors import UserError, one_line, reason
from enmp_jax.io import cache
from enmp_jax.io.files import read_json
from enmp_jax.io.gguf import GgufFile
from enmp_jax.io.shard_index import INDEX, SINGLE
from enmp_jax.io.writing import new_directory, write_tensors, write_text
from enmp_jax.models import gguf_tokenizer
from enmp_jax.models.names import split_index

LINK = "model.gguf"
"""In the directory of an unpacked file: a link to it, where other models have ``model.safetensors``."""
VERSION = 1
"""Raised when the same file gives other contents of the directory."""

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""``general.architecture``, which here is the ``model_type`` too -> the class in transformers."""

_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_OF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES = _WHOLE | {f"blk.{{}}.{a}": f"model.layers.{{}}.{b}" for a, b in _OF_LAYER.items()}
"""Module in GGUF -> module in Hugging Face files, ``{}`` for the layer's index."""
_FREQUENCIES = "rope_freqs.weight"  # Llama 3's scaling, which config.json gives in four numbers
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def permute_heads(rows: Shaped[np.ndarray, "out *rest"], heads: int) -> Shaped[np.ndarray, "out *rest"]:
    """Rows of q or k, halves of a head's dimensions one after the other, in llama.cpp's order."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def restore_heads(rows: Shaped[np.ndarray, "out *rest"], heads: int) -> Shaped[np.ndarray, "out *rest"]:
    """The inverse of ``permute_heads``."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def permuted_heads(config: Mapping[str, Any], module: str) -> int | None:
    """Number of heads of a module whose rows llama.cpp permutes (Hugging Face spelling); None of others."""
    if config.get("model_type") not in ("llama", "mistral"):
        return None
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    return {"q_proj": heads, "k_proj": kv_heads}.get(module.rsplit(".", 1)[-1])


def unpack(path: Path) -> Path:
    """A directory in Hugging Face layout made of a GGUF file, but for the weights, to which it has a link.

    It is in the cache (``io.cache``) and made once for each file.

    Raises:
        UserError: the file is damaged, of an unknown architecture or without a tokenizer, or the cache
            cannot be written.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    key = cache.key("gguf", VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    directory = cache.directory() / "gguf" / key / path.stem
    if directory.is_dir():
        return directory
    file = GgufFile(path)
    texts = {"config.json": config_of(file), "generation_config.json": _generation(file.metadata)}
    contents = {name: json.dumps(value, indent=2) + "\n" for name, value in texts.items()}
    contents |= gguf_tokenizer.files(file.metadata, path)
    try:
        with new_directory(directory) as temporary:
            for name, text in contents.items():
                write_text(temporary / name, text)
            (temporary / LINK).symlink_to(path.resolve())
    except (OSError, UserError) as error:
        if not directory.is_dir():  # else another process has just made it
            raise UserError(
                f"cannot unpack {path.name} ({reason(error)}): set ENMP_CACHE to another directory"
            ) from None
    return directory


def config_of(file: GgufFile) -> dict[str, Any]:
    """``config.json`` of the model in a GGUF file.

    Raises:
        UserError: an adapter, a part of a model, an unknown architecture, experts, a size that is missing.
    """
    data, path = file.metadata, file.path
    if data.get("general.type", "model") != "model":
        raise UserError(f"{path} holds {one_line(data['general.type'])}, not a model")
    if data.get("split.count", 1) > 1:
        raise UserError(f"{path} is one of {data['split.count']} parts: join them (llama-gguf-split --merge)")
    kind = data.get("general.architecture")
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{path}: the architecture {kind!r} is not known; known are {known}")

    def get(key: str, *default: Any) -> Any:
        if f"{kind}.{key}" not in data and not default:
            raise UserError(f"{path} has no {kind}.{key}: it is no whole model")
        return data.get(f"{kind}.{key}", *default)

    if get("expert_count", 0):
        raise UserError(f"{path} is a mixture of experts, which is not evaluated")
    unknown = [n for n in file.types if module_of(n) is None and n != _FREQUENCIES]
    if unknown or "token_embd.weight" not in file.types:
        has = f"has {one_line(unknown[0])}" if unknown else "lacks token_embd.weight"
        raise UserError(f"{path} {has}: it is no plain {kind} model")
    width, heads = get("embedding_length"), get("attention.head_count")
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": width,
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", width // heads),
        "intermediate_size": get("feed_forward_length"),
        "hidden_act": "silu",
        # float32 of the decimal number that was meant
        "rms_norm_eps": float(str(np.float32(get("attention.layer_norm_rms_epsilon")))),
        "max_position_embeddings": get("context_length"),
        "vocab_size": file.shape("token_embd.weight")[0],
        "tie_word_embeddings": "output.weight" not in file.types,
        "rope_parameters": _rope(file, kind, get),
        "dtype": "float32",
        **_special_tokens(data),
    }
    if kind == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.types
        config["mlp_bias"] = "blk.0.ffn_up.bias" in file.types
    return config


def _rope(file: GgufFile, kind: str, get: Any) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(get("rope.freq_base", 10000.0))}
    scaling = get("rope.scaling.type", "none")
    if _FREQUENCIES in file.types:
        divisors = file.read(_FREQUENCIES).reshape(-1)
        rope |= {"rope_type": "llama3", "factor": float(divisors.max()), **_LLAMA3}
        if not np.allclose(_llama3_divisors(rope, len(divisors)), divisors, rtol=1e-4):
            raise UserError(f"{file.path}: its {_FREQUENCIES} are not those of Llama 3.1 or 3.2")
    elif scaling == "linear":
        rope |= {"rope_type": "linear", "factor": float(get("rope.scaling.factor"))}
    elif scaling != "none":
        raise UserError(f"{file.path}: {kind}.rope.scaling.type {scaling!r} is not known")
    return rope


def _llama3_divisors(rope: Mapping[str, Any], half: int) -> np.ndarray:
    """What Llama 3's scaling divides the frequency of every pair of dimensions by."""
    wavelength = 2 * np.pi * rope["rope_theta"] ** (np.arange(half) / half)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = (rope["original_max_position_embeddings"] / wavelength - low) / (high - low)
    smooth = np.clip(smooth, 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _special_tokens(metadata: Mapping[str, Any]) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{short}_token_id") for name, short in names.items()}
    return {name: i for name, i in ids.items() if i is not None}


def _generation(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {"_from_model_config": True, **_special_tokens(metadata)}


def module_of(name: str) -> str | None:
    """The parameter in Hugging Face spelling that a tensor of a GGUF file is; None of others."""
    template, index = split_index(name)
    module, _, part = template.rpartition(".")
    if module not in NAMES or part not in ("weight", "bias"):
        return None
    return f"{NAMES[module].replace('{}', str(index))}.{part}"


def dequantise(directory: Path, target: Path, shard_bytes: int = 2**31) -> None:
    """Write the model of an unpacked file with its tensors in float32, as shards of safetensors.

    Args:
        directory: what ``unpack`` made.
        target: an empty directory.
        shard_bytes: of a shard at most, but for larger tensors; so much is in memory at a time.

    Raises:
        UserError: a quantisation that cannot be read, or the disk is full.
    """
    for path in directory.iterdir():
        if path.name != LINK:
            write_text(target / path.name, path.read_text(encoding="utf-8"))
    readers = dict(slices(directory, read_json(directory / "config.json")))
    shards: list[list[str]] = [[]]
    size = 0
    for name, reader in readers.items():
        size += 4 * math.prod(reader.get_shape())
        if shards[-1] and size > shard_bytes:
            shards.append([])
            size = 4 * math.prod(reader.get_shape())
        shards[-1].append(name)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        write_tensors(target / file, {name: readers[name][...] for name in names}, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_text(target / INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n")


class GgufSlice:
    """A tensor of a GGUF file with the interface of a safetensors slice, dequantised to float32."""

    def __init__(self, file: GgufFile, name: str, heads: int | None) -> None:
        self._file, self.name, self._heads = file, name, heads

    def get_shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self._file.shape(self.name)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Part of the tensor; all of it is dequantised for that."""
        values = self._file.read(self.name)
        return (values if self._heads is None else restore_heads(values, self._heads))[index]


def slices(directory: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, GgufSlice]]:
    """Names in Hugging Face spelling and readers of the tensors of an unpacked file (see ``unpack``)."""
    file = GgufFile(directory / LINK)
    for name in file.types:
        module = module_of(name)
        if module is not None:
            yield module, GgufSlice(file, name, permuted_heads(config, module.rpartition(".")[0]))
