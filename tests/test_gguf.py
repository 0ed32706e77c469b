"""Base models in GGUF files: the same model as the Hugging Face directory they were made of."""

from __future__ import annotations

import json
from itertools import pairwise

import jax
import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

import gguf_files as files  # noqa: E402 (needs gguf)

from enmp_jax import models  # noqa: E402
from enmp_jax.errors import UserError  # noqa: E402
from enmp_jax.io.gguf import GgufFile  # noqa: E402
from enmp_jax.models import checkpoint, gguf_tokenizer  # noqa: E402


def loaded(tmp_path, settings, quantisation="F32", **options):
    tensors = files.hf_tensors(settings)
    return tensors, models.load(
        files.write(tmp_path / "tiny.gguf", settings, tensors, quantisation, **options)
    )


def from_hf(tmp_path, settings, tensors):
    checkpoint.write(tmp_path / "hf", settings, tensors)
    return models.load(tmp_path / "hf")


def log_likelihood(model):
    ids = jax.random.randint(jax.random.key(0), (2, 12), 0, 280)
    return np.asarray(model[0].log_likelihood(model[1], {"input_ids": ids, "attention_mask": ids * 0 + 1}))


CASES = {
    "llama, tied": files.config(),
    "llama, own head": files.config(tied=False),
    "llama with biases": files.config(attention_bias=True),
    "qwen2": files.config("qwen2"),
    "qwen3": files.config("qwen3"),
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_the_same_model_as_its_hugging_face_files(settings, tmp_path):
    tensors, model = loaded(tmp_path, settings)
    wanted = from_hf(tmp_path, settings, tensors)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), model[1], wanted[1]))
    np.testing.assert_array_equal(log_likelihood(model), log_likelihood(wanted))


@pytest.mark.parametrize("quantisation", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_quantised_weights_are_those_that_gguf_dequantises(quantisation, tmp_path):
    settings = files.config()
    tensors, model = loaded(tmp_path, settings, quantisation)
    qtype = gguf.GGMLQuantizationType[quantisation]
    heads = {"q_proj": 4, "k_proj": 2}
    wanted = {}
    for name, value in tensors.items():
        if value.ndim == 1:
            wanted[name] = value
            continue
        h = heads.get(name.split(".")[-2])
        stored = value if h is None else files.permute(value, h)
        # a row keeps its values wherever it is put, so that permuting may come before or after
        rows = gguf.dequantize(gguf.quantize(stored, qtype), qtype)
        order = np.arange(len(rows)) if h is None else np.argsort(files.permute(np.arange(len(rows)), h))
        wanted[name] = rows[order]
    same = from_hf(tmp_path, settings, wanted)
    np.testing.assert_array_equal(log_likelihood(model), log_likelihood(same))


def test_scaled_rotary_frequencies_of_llama_3(tmp_path):
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    settings = files.config(rope_scaling=scaling)
    tensors = files.hf_tensors(settings)
    # convert_hf_to_gguf.py writes what each frequency is divided by
    plain = models.build(files.config()).config.frequencies
    scaled = models.build(settings).config.frequencies
    divisors = np.asarray(plain, np.float32) / np.asarray(scaled, np.float32)
    assert divisors.max() == 8
    path = tmp_path / "tiny.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            files, "gguf_name", lambda n, own=files.gguf_name: n if n.startswith("rope") else own(n)
        )
        files.write(path, settings, {**tensors, "rope_freqs.weight": divisors})
    backbone, _ = models.load(path)
    np.testing.assert_allclose(backbone.config.frequencies, scaled, rtol=1e-6)


def test_the_tokenizer_and_the_chat_template_come_along(tmp_path):
    from transformers import AutoTokenizer

    settings = files.config()
    directory = checkpoint.find(files.write(tmp_path / "tiny.gguf", settings, files.hf_tensors(settings)))
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    tokens = files.byte_level_tokens()[0]
    ids = tokenizer("the 42<|end|></s>")["input_ids"]
    assert [tokens[i] for i in ids] == ["the", "Ġ", "4", "2", "<|end|>", "</s>"]
    assert tokenizer.decode(ids) == "the 42<|end|></s>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the 42<|end|>"  # one that a user defined
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|user|>hi<|end|>"
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == 259


def test_a_first_token_is_added_where_the_file_says_so(tmp_path):
    from tokenizers import Tokenizer

    tokens, kinds, merges = files.byte_level_tokens()
    metadata = {
        "model": "gpt2", "pre": "llama-bpe", "tokens": tokens, "token_type": kinds, "merges": merges,
        "bos_token_id": 258,
    }  # fmt: skip

    def ids(**more):
        named = {f"tokenizer.ggml.{key}": value for key, value in (metadata | more).items()}
        texts = gguf_tokenizer.files(named, "x.gguf")
        return Tokenizer.from_str(texts["tokenizer.json"]).encode("the").ids

    assert ids() == [258, 257]  # Llama 3's way, whether or not it is said
    assert ids(add_bos_token=False) == [257]
    assert ids(pre="gpt-2") == [257]


def test_sentencepiece_joins_the_best_neighbours_first():
    """Against the definition: as long as two neighbours make a token, join those with the best score."""
    rng = np.random.default_rng(1)
    letters = ["▁", "a", "b", "c"]
    longer = sorted({"".join(rng.choice(letters, rng.integers(2, 5))) for _ in range(60)})
    tokens = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *longer]
    scores = [0.0] * 257 + [-float(x) for x in rng.permutation(len(letters) + len(longer))]
    kinds = [2] + [6] * 256 + [1] * (len(tokens) - 257)
    metadata = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": kinds}
    texts = gguf_tokenizer.files({f"tokenizer.ggml.{k}": v for k, v in metadata.items()}, "x.gguf")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(texts["tokenizer.json"])
    index = {token: i for i, token in enumerate(tokens)}
    for _ in range(50):
        text = "".join(rng.choice(["a", "b", "c", " "], 12))
        parts = list("▁" + text.replace(" ", "▁"))
        while True:
            unions = [a + b for a, b in pairwise(parts)]
            joins = [(scores[index[union]], -i) for i, union in enumerate(unions) if union in index]
            if not joins:
                break
            at = -max(joins)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        assert tokenizer.encode(text).tokens == parts
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("é").tokens == ["▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("é").ids) == "é"


def faulty(tmp_path, settings=None, **options):
    settings = settings or files.config()
    path = files.write(tmp_path / "tiny.gguf", settings, files.hf_tensors(settings), **options)
    with pytest.raises(UserError) as info:
        models.load(path)
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"general.architecture": "rwkv9"}, "architecture 'rwkv9' is not known; known are llama, qwen2"),
        ({"general.type": "adapter"}, "holds adapter, not a model"),
        ({"split.count": 3}, "llama-gguf-split --merge)"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.embedding_length": None}, "has no llama.embedding_length"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn' is not known"),
        ({"tokenizer.ggml.pre": "kimi"}, "cuts text in the way 'kimi'; known are"),
        ({"tokenizer.ggml.model": "rwkv"}, "of the kind 'rwkv'"),
        ({"llama.block_count": 3}, "missing: model.layers.2"),
    ],
)
def test_a_file_that_is_not_known_is_one_line(metadata, says, tmp_path, monkeypatch):
    own = gguf.GGUFWriter.add_key_value

    def add(self, key, value, *rest, **more):  # the writer refuses to write a key twice
        own(self, key, metadata[key] if key in metadata and value != metadata[key] else value, *rest, **more)

    monkeypatch.setattr(gguf.GGUFWriter, "add_key_value", add)
    written = {k: v for k, v in metadata.items() if not k.startswith(("tokenizer", "general.arch"))}
    assert says in faulty(tmp_path, metadata=written)


def test_a_tensor_that_is_not_known_is_one_line(tmp_path, monkeypatch):
    own = files.gguf_name
    monkeypatch.setattr(files, "gguf_name", lambda name: own(name).replace("ffn_up", "ffn_sideways"))
    assert "has blk.0.ffn_sideways.weight: it is no plain llama model" in faulty(tmp_path)


def test_without_a_tokenizer(tmp_path):
    assert "has no tokenizer in it" in faulty(tmp_path, tokenizer=False)


def test_a_quantisation_that_the_library_cannot_read(tmp_path, monkeypatch):
    def refuse(*_):
        raise NotImplementedError

    monkeypatch.setattr(gguf, "dequantize", refuse)
    assert "has the type Q8_0, which the gguf package cannot dequantise" in faulty(
        tmp_path, quantisation="Q8_0"
    )


def test_damaged_and_missing_files(tmp_path, monkeypatch):
    settings = files.config()
    path = files.write(tmp_path / "tiny.gguf", settings, files.hf_tensors(settings))
    whole = path.read_bytes()
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 50_000):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="is not a whole GGUF file"):
            models.load(path)
    with pytest.raises(UserError, match=r"No such file"):
        models.load(tmp_path / "none.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'enmp-jax\[gguf\]'"):
        GgufFile(path)
