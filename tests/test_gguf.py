"""Base models in GGUF files: the same model as the Hugging Face directory they were made of."""

from __future__ import annotations

import json
from itertools import pairwise

import jax
import numpy as np
import pytest

pytest.importorskip("gguf")

import gguf
import gguf_files as files
from safetensors.numpy import load_file

from enmp_jax import models
from enmp_jax.adapters import read_adapter, save_adapter
from enmp_jax.cli.main import main
from enmp_jax.errors import UserError
from enmp_jax.io.gguf import GgufFile
from enmp_jax.models import checkpoint, convert, gguf_tokenizer
from enmp_jax.models import gguf as gguf_models


@pytest.fixture
def run_cli(capsys):
    """Run ``enmp``; what it printed."""

    def run(*arguments, fails=False):
        assert main([str(argument) for argument in arguments]) == (2 if fails else 0)
        return capsys.readouterr()[1 if fails else 0]

    return run


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
    plain = models.build(files.config()).config.rope.frequencies
    scaled = models.build(settings).config.rope.frequencies
    divisors = np.asarray(plain, np.float32) / np.asarray(scaled, np.float32)
    assert divisors.max() == 8
    path = tmp_path / "tiny.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            files, "gguf_name", lambda n, own=files.gguf_name: n if n.startswith("rope") else own(n)
        )
        files.write(path, settings, {**tensors, "rope_freqs.weight": divisors})
    backbone, _ = models.load(path)
    np.testing.assert_allclose(backbone.config.rope.frequencies, scaled, rtol=1e-6)


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


def adapters(tmp_path, settings):
    """Two LoRA adapters: of rank 2 on the attention, of rank 3 on q and k and one projection of the MLP."""
    targets = {"one": ("q_proj", "k_proj", "v_proj", "o_proj"), "two": ("q_proj", "k_proj", "up_proj")}
    rng = np.random.default_rng(3)
    shapes = models.build(settings).modules
    for task, rank in (("one", 2), ("two", 3)):
        factors = {
            template.replace("{}", str(layer)): (
                rng.normal(size=(rank, shape[1])).astype(np.float32),
                rng.normal(size=(shape[0], rank)).astype(np.float32),
            )
            for template, shape in shapes.items()
            if template.endswith(targets[task])
            for layer in range(2)
        }
        save_adapter(tmp_path / task, factors, rank, rank, "org/base")
    return [flag for task in ("one", "two") for flag in ("--adapter", f"{task}={tmp_path / task}")]


def deltas_in_gguf(path):
    """Name of the base's tensor -> B A times alpha over the rank, as llama.cpp adds it."""
    file = GgufFile(path)
    alpha = file.metadata["adapter.lora.alpha"]
    found = {}
    for name in file.types:
        if name.endswith(".lora_a"):
            a, b = file.read(name), file.read(name.removesuffix("a") + "b")
            found[name.removesuffix(".lora_a")] = b @ a * (alpha / len(a))
    return file, found


@pytest.mark.parametrize(
    ("kind", "method"), [("llama", "sum"), ("llama", "ties"), ("qwen2", "sum"), ("mistral", "sum")]
)
def test_merged_adapter_for_llama_cpp(kind, method, tmp_path, run_cli):
    settings = files.config("llama" if kind == "mistral" else kind) | {"model_type": kind}
    checkpoint.write(tmp_path / "base", settings, files.hf_tensors(settings))
    given = adapters(tmp_path, settings)
    merge = ["merge", *given, "--prune", "1:two", "--scale", "0.5"]
    merge += ["--method", method, "--tolerance", "1e-6"]
    run_cli(*merge, "--format", "peft", "--out", tmp_path / "peft")
    run_cli(*merge, "--format", "gguf", "--base-model", tmp_path / "base", "--out", tmp_path / "out")
    file, found = deltas_in_gguf(tmp_path / "out" / "adapter.gguf")
    said = {key: file.metadata[key] for key in ("general.architecture", "general.type", "adapter.type")}
    architecture = "qwen2" if kind == "qwen2" else "llama"
    assert list(said.values()) == [architecture, "adapter", "lora"]
    peft = read_adapter(tmp_path / "peft").modules
    ranks = {file.shape(name)[0] for name in file.types if name.endswith("lora_a")}
    assert len(ranks) > 1  # llama.cpp divides by each module's own
    heads = {"q_proj": 4, "k_proj": 2} if architecture == "llama" else {}
    wanted = {}
    for path, (a, b) in peft.items():
        h = heads.get(path.rsplit(".", 1)[-1])
        wanted[files.gguf_name(f"{path}.weight")] = b @ a if h is None else files.permute(b @ a, h)
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        np.testing.assert_allclose(found[name], delta, rtol=1e-5, atol=1e-5)
    assert (
        "llama-server --model BASE.gguf --lora adapter.gguf" in (tmp_path / "out" / "README.md").read_text()
    )
    check = ["verify", str(tmp_path / "out"), *map(str, given), "--base-model", str(tmp_path / "base")]
    assert main(check) == 0
    recipe = tmp_path / "out" / "enmp_config.yaml"
    recipe.write_text(recipe.read_text().replace("scale: 0.5", "scale: 0.6"))
    assert main(check) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_factors_in_half_precision(dtype, tmp_path, run_cli):
    settings = files.config()
    base = files.write(tmp_path / "base.gguf", settings, files.hf_tensors(settings), "Q8_0")
    merge = [
        "merge",
        *adapters(tmp_path, settings),
        "--method",
        "sum",
        "--format",
        "gguf",
        "--base-model",
        base,
    ]
    run_cli(*merge, "--out", tmp_path / "full")
    run_cli(*merge, "--dtype", dtype, "--out", tmp_path / "half")
    file, half = deltas_in_gguf(tmp_path / "half" / "adapter.gguf")
    assert set(file.types.values()) == {{"float16": "F16", "bfloat16": "BF16"}[dtype]}
    for name, delta in deltas_in_gguf(tmp_path / "full" / "adapter.gguf")[1].items():
        np.testing.assert_allclose(half[name], delta, atol=0.02 * np.abs(delta).max())


def test_checkpoint_from_a_gguf_base(tmp_path, run_cli):
    settings = files.config()
    tensors = files.hf_tensors(settings)
    base = files.write(tmp_path / "base.gguf", settings, tensors, "Q8_0")
    merge = ["merge", *adapters(tmp_path, settings), "--method", "sum"]
    run_cli(*merge, "--format", "checkpoint", "--base-model", base, "--out", tmp_path / "out")
    run_cli(*merge, "--format", "peft", "--out", tmp_path / "peft")
    backbone, params = models.load(base)
    wanted = convert.to_tensors(backbone, params)
    for path, (a, b) in read_adapter(tmp_path / "peft").modules.items():
        wanted[f"{path}.weight"] = wanted[f"{path}.weight"] + b @ a
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == wanted.keys()  # the output is tied to the embeddings, so it is not there
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5)
    carried = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    for name in carried:
        assert (tmp_path / "out" / name).read_text() == (checkpoint.find(base) / name).read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_dequantised_shards(tmp_path):
    settings = files.config(tied=False)
    tensors = files.hf_tensors(settings)
    base = files.write(tmp_path / "base.gguf", settings, tensors)
    (tmp_path / "out").mkdir()
    gguf_models.dequantise(checkpoint.find(base), tmp_path / "out", shard_bytes=100_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    _, params = models.load(tmp_path / "out")
    _, wanted = models.load(base)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), params, wanted))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "bert"}, "the base model is a bert; known are mistral, llama, qwen2, qwen3"),
        ({"num_hidden_layers": 1}, "the base model has no model.layers.1."),
        ({"hidden_size": 32}, "in the base model: it is another base"),
    ],
)
def test_gguf_of_another_base_is_one_line(change, says, tmp_path, run_cli):
    settings = files.config()
    flags = adapters(tmp_path, settings)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(settings | change))
    merge = ["merge", *flags, "--method", "sum", "--format", "gguf", "--base-model", tmp_path / "base"]
    assert says in run_cli(*merge, "--out", tmp_path / "out", fails=True)
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_overflows_half_precision(tmp_path, run_cli):
    settings = files.config()
    flags = adapters(tmp_path, settings)
    checkpoint.write(tmp_path / "base", settings, files.hf_tensors(settings))
    merge = ["merge", *flags, "--method", "sum", "--scale", "1e9", "--format", "gguf", "--dtype", "float16"]
    message = run_cli(*merge, "--base-model", tmp_path / "base", "--out", tmp_path / "out", fails=True)
    assert "overflows float16: use --dtype float32 or bfloat16" in message
