"""Adapter directories that anybody could meet: every one is one line and exit code 2, never a traceback."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from enmp_jax.adapters import load_adapters
from enmp_jax.cli import main as cli
from enmp_jax.errors import UserError
from enmp_jax.io.shard_index import find_shards

INVALID = "not a valid safetensors"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
GOOD = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}


def tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        f"{MODULE}.lora_A.weight": random.normal(size=(2, 6)).astype(np.float32),
        f"{MODULE}.lora_B.weight": random.normal(size=(4, 2)).astype(np.float32),
    }


def good(path: Path) -> Path:
    path.mkdir()
    (path / CONFIG).write_text(json.dumps(GOOD))
    safetensors.numpy.save_file(tensors(), path / WEIGHTS)
    return path


def config(**changes):
    return lambda d: (d / CONFIG).write_text(json.dumps(GOOD | changes))


def config_text(text: str | bytes):
    data = text if isinstance(text, bytes) else text.encode()
    return lambda d: (d / CONFIG).write_bytes(data)


def weights(**changes):
    """Replace (or, with None, remove) tensors; ``A`` and ``B`` mean those of the module."""

    def make(d):
        names = {"A": f"{MODULE}.lora_A.weight", "B": f"{MODULE}.lora_B.weight"}
        found = tensors() | {names.get(key, key): value for key, value in changes.items()}
        safetensors.numpy.save_file({k: v for k, v in found.items() if v is not None}, d / WEIGHTS)

    return make


def raw(data: bytes):
    return lambda d: (d / WEIGHTS).write_bytes(data)


def header(head: object, body: bytes = b"", size: int | None = None):
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return raw(struct.pack("<Q", len(text) if size is None else size) + text + body)


def entry(dtype="F32", shape=(2, 6), offsets=(0, 48)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def replace(name: str, make):
    def change(d):
        (d / name).unlink()
        make(d / name)

    return change


def cut(n: int):
    return lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:n])


def module(name: str, a=(2, 6), b=(4, 2), kinds=("lora_A.weight", "lora_B.weight")):
    shapes = (a, b)
    return weights(**{f"{name}.{kind}": np.ones(shape, np.float32) for kind, shape in zip(kinds, shapes)})


def loop(path: Path):
    path.symlink_to(path.with_name("other"))
    path.with_name("other").symlink_to(path)


def pickle_only(d):
    (d / WEIGHTS).unlink()
    (d / "adapter_model.bin").write_bytes(b"\x80\x04N.")


def both(*changes):
    return lambda d: [change(d) for change in changes]


def only_checkpoints(d):
    for step in (20, 100):
        good(d / f"checkpoint-{step}")
    for name in (CONFIG, WEIGHTS):
        (d / name).unlink()


def whole_model(d):
    (d / CONFIG).rename(d / "config.json")
    (d / WEIGHTS).rename(d / "model.safetensors")


F = np.float32
A_NAME, B_NAME = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"
# name -> (what is done to a good adapter, what the message says)
CORPUS = {
    "no config": (lambda d: (d / CONFIG).unlink(), "no adapter_config.json"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "no adapter_model.safetensors"),
    "a pickle that is no torch file": (pickle_only, "torch file"),  # with torch and without it
    "empty config": (config_text(""), "not valid JSON"),
    "config cut off": (config_text('{"peft_type": "LORA", "r": '), "not valid JSON"),
    "config is a list": (config_text("[1, 2]"), "must hold a JSON object"),
    "config is a number": (config_text("3"), "must hold a JSON object"),
    "config is null": (config_text("null"), "must hold a JSON object"),
    "config is not UTF-8": (config_text(b'{"r": "\xff\xfe"}'), "not valid JSON"),
    "config nested deep": (config_text('{"r":' * 100_000), "not valid JSON"),
    "config with an endless number": (config_text('{"r": ' + "9" * 5000 + "}"), "not valid JSON"),
    "config is huge": (lambda d: os.truncate(d / CONFIG, 2**30), "too large"),
    "config is a directory": (replace(CONFIG, Path.mkdir), "not a regular file"),
    "config is a loop of links": (replace(CONFIG, loop), "cannot read"),
    "no peft_type": (config(peft_type=None), "peft_type is missing"),
    "IA3": (config(peft_type="IA3"), "only LORA"),
    "peft_type is a list": (config(peft_type=["LORA"]), "only LORA"),
    "DoRA": (config(use_dora=True), "DoRA rescales the base model's weights"),
    "QALoRA": (config(use_qalora=True), "QALoRA"),
    "bias": (config(bias="all"), "biases"),
    "bias in B": (config(lora_bias=True), "lora_bias"),
    "layer replication": (config(layer_replication=[[0, 1]]), "layer_replication"),
    "PiSSA": (config(init_lora_weights="pissa_niter_4"), "changes the base weights"),
    "unknown initialisation": (config(init_lora_weights={"a": 1}), "not known"),
    "rank 0": (config(r=0), "r must be a rank"),
    "rank below 0": (config(r=-3), "r must be a rank"),
    "rank is a string": (config(r="2"), "r must be a rank"),
    "rank is a float": (config(r=2.0), "r must be a rank"),
    "rank is true": (config(r=True), "r must be a rank"),
    "absurd rank": (config(r=10**30), "r must be a rank"),
    "another rank than the file": (config(r=4096), "says rank 4096"),
    "alpha is NaN": (config(lora_alpha=float("nan")), "finite number"),
    "alpha is infinite": (
        config_text(json.dumps(GOOD).replace('"lora_alpha": 4', '"lora_alpha": 1e999')),
        "finite",
    ),
    "alpha is a string": (config(lora_alpha="x\ny"), "finite number"),
    "alpha overflows": (config(lora_alpha=10**400), "finite number"),
    "scaling overflows": (config(lora_alpha=3e38, r=2), "overflows"),
    "rank_pattern is a list": (config(rank_pattern=["q_proj"]), "rank_pattern must be an object"),
    "rank_pattern with a bad regex": (config(rank_pattern={"(": 2}), "invalid regular expression"),
    "rank_pattern against the file": (config(rank_pattern={"q_proj": 3}), "says rank 3"),
    "alpha_pattern with a string": (config(alpha_pattern={"q_proj": "2"}), "alpha_pattern.q_proj"),
    "target_modules is a number": (config(target_modules=3), "target_modules must be"),
    "target_modules with a bad regex": (config(target_modules="*q_proj"), "invalid regular expression"),
    "target_modules without the module": (config(target_modules=["v_proj"]), "does not name it"),
    "layers_to_transform without the layer": (config(layers_to_transform=[3]), "does not name it"),
    "layers_to_transform is a string": (config(layers_to_transform="0"), "layers_to_transform"),
    "modules_to_save is an object": (config(modules_to_save={"a": 1}), "modules_to_save must be"),
    "base is a number": (config(base_model_name_or_path=3), "base_model_name_or_path"),
    "fan_in_fan_out is a string": (config(fan_in_fan_out="yes"), "fan_in_fan_out"),
    "empty weights": (raw(b""), INVALID),
    "eight bytes": (raw(b"\0" * 8), INVALID),
    "text for weights": (raw(b"version https://git-lfs.github.com/spec/v1\n"), INVALID),
    "header longer than the file": (header({}, size=2**40), INVALID),
    "header cut off": (cut(40), INVALID),
    "data cut off": (cut(-5), INVALID),
    "header is no JSON": (header(b"{]"), INVALID),
    "header is a list": (header([1]), INVALID),
    "offsets beyond the end": (
        header({A_NAME: entry(offsets=(0, 4800))}, b"\0" * 48),
        INVALID,
    ),
    "offsets run backwards": (
        header({A_NAME: entry(offsets=(48, 0))}, b"\0" * 48),
        INVALID,
    ),
    "overlapping tensors": (
        header({A_NAME: entry(), B_NAME: entry(shape=(4, 2), offsets=(16, 48))}, b"\0" * 48),
        INVALID,
    ),
    "shape against the offsets": (
        header({A_NAME: entry(shape=(2, 7))}, b"\0" * 48),
        INVALID,
    ),
    "shape overflows": (header({A_NAME: entry(shape=(2**62, 4))}, b"\0" * 48), INVALID),
    "unknown type": (header({A_NAME: entry(dtype="F31")}, b"\0" * 48), INVALID),
    "bytes after the data": (header({A_NAME: entry()}, b"\0" * 60), INVALID),
    "8-bit float": (
        header(
            {A_NAME: entry("F8_E4M3", offsets=(0, 12)), B_NAME: entry("F8_E4M3", (4, 2), (12, 20))}, bytes(20)
        ),
        "quantised",
    ),
    "8-bit integers": (weights(A=np.zeros((2, 6), np.int8)), "quantised"),
    "booleans": (weights(B=np.zeros((4, 2), bool)), "quantised"),
    "NaN": (weights(A=np.full((2, 6), np.nan, F)), "NaN or Inf"),
    "one Inf": (weights(B=np.array([[1, np.inf]] * 4, F)), "NaN or Inf"),
    "Inf in half precision": (weights(B=np.full((4, 2), np.inf, np.float16)), "NaN or Inf"),
    "float64 beyond float32": (weights(A=np.full((2, 6), 1e300)), "NaN or Inf"),
    "A without B": (weights(B=None), "no lora_B"),
    "B without A": (weights(A=None), "no lora_A"),
    "A and B of different rank": (weights(B=np.ones((4, 3), F)), "says rank 2"),
    "A transposed": (weights(A=np.ones((6, 2), F)), "says rank 2"),
    "convolution and linear": (weights(A=np.ones((2, 6, 3, 3), F)), "says rank 2"),
    "convolution with groups": (
        weights(A=np.ones((2, 6, 3, 3), F), B=np.ones((4, 1, 1, 1), F)), "has groups",
    ),
    "one dimension": (weights(A=np.ones(12, F)), "the shapes of no LoRA"),
    "scalar": (weights(B=np.array(1.0, F)), "the shapes of no LoRA"),
    "nothing in it": (weights(A=np.ones((2, 0), F)), "the shapes of no LoRA"),
    "no tensors": (weights(A=None, B=None), "no LoRA tensors"),
    "unknown tensor": (weights(extra=np.ones(3, F)), "unknown tensor"),
    "no name": (weights(**{"": np.ones(3, F)}), "unknown tensor"),
    "embedding LoRA without B": (
        module("model.embed_tokens", kinds=("lora_embedding_A",)),
        "no lora_embedding_B",
    ),
    "a norm saved": (
        both(
            config(modules_to_save=["norm"]),
            weights(**{"base_model.model.model.norm.weight": np.ones(6, F)}),
        ),
        "only heads can be saved with an adapter that is to be merged; train again without it",
    ),
    "only training checkpoints": (only_checkpoints, "the newest is "),
    "a whole model": (whole_model, "it is a whole model, not a LoRA adapter"),
    "DoRA tensor": (weights(**{f"{MODULE}.lora_magnitude_vector": np.ones(4, F)}), "use_dora is not set"),
    "PiSSA without its base": (config(init_lora_weights="pissa"), "give the base model too"),
    "experts of unknown order": (
        config(target_parameters=["q_proj.b", "q_proj.a"], target_modules=[]), "whose cannot be told",
    ),
    "an expert parameter missing": (
        config(target_parameters=["q_proj.gate_up_proj", "q_proj.down_proj"], target_modules=[]),
        "has LoRA on 1 parameters",
    ),
    "bias of B": (weights(**{f"{MODULE}.lora_B.bias": np.ones(4, F)}), "bias in LoRA B"),
    "base weight": (
        weights(**{f"{MODULE}.base_layer.weight": np.ones((4, 6), F)}),
        "weight of the base model",
    ),
    "saved embeddings": (
        weights(**{"base_model.model.embed_tokens.weight": np.ones((4, 6), F)}), "embeddings saved",
    ),
    "two adapters in one file": (
        module(MODULE.replace(".0.", ".1."), kinds=("lora_A.x.weight", "lora_B.y.weight")),
        "several adapters",
    ),
    "two spellings of one module": (module(MODULE.removeprefix("base_model.model.")), "there twice"),
    "base_layer and not": (module(f"{MODULE}.base_layer"), "there twice"),
    "weights are a directory": (replace(WEIGHTS, Path.mkdir), "not a regular file"),
    "weights are a pipe": (replace(WEIGHTS, os.mkfifo), "not a regular file"),
    "weights are a loop of links": (replace(WEIGHTS, loop), "cannot read"),
    "weights are a dangling link": (replace(WEIGHTS, lambda p: p.symlink_to("gone")), "link to nothing"),
}  # fmt: skip


def snapshot(path: Path) -> list[str]:
    return sorted(str(p) for p in path.rglob("*"))


@pytest.mark.parametrize("name", CORPUS)
def test_malformed_adapter_is_one_line(name, tmp_path, monkeypatch, capfd):
    change, message = CORPUS[name]
    monkeypatch.chdir(tmp_path)
    adapter = good(tmp_path / "adapter")
    change(adapter)
    before = snapshot(tmp_path)

    with pytest.raises(UserError) as caught:
        load_adapters({"task": adapter})
    assert message in str(caught.value)
    assert str(caught.value).isprintable()  # one line
    assert cli.main(["inspect", str(adapter)]) == 2
    out, err = capfd.readouterr()
    assert "refused: " in out and message in out
    assert len(err.splitlines()) == 1 and "Traceback" not in out + err
    assert cli.main(["merge", "--adapter", f"task={adapter}", "--method", "sum", "--out", "out"]) == 2
    out, err = capfd.readouterr()
    assert len(err.splitlines()) == 1 and message in err
    assert snapshot(tmp_path) == before  # nothing written


def test_the_adapter_that_the_corpus_damages_is_good(tmp_path, capfd):
    adapter = good(tmp_path / "adapter")
    loaded = load_adapters({"task": adapter})
    found = tensors()
    (pair,) = loaded.stack.pairs.values()
    np.testing.assert_array_equal(pair.a[0, 0], found[A_NAME])
    np.testing.assert_array_equal(pair.b[0, 0], 2 * found[B_NAME])
    assert cli.main(["inspect", str(adapter)]) == 0
    assert "refused" not in capfd.readouterr().out
    assert len(CORPUS) >= 40


SOURCES = {
    "a file": lambda d: str(d / "adapter" / CONFIG),
    "nothing": lambda d: str(d / "nothing"),
    "empty": lambda d: "",
    "a NUL": lambda d: "adapter\0x",
    "very long": lambda d: "x" * 5000,
    "dots": lambda d: "../../etc",
    "a loop": lambda d: str(d / "loop"),
    "no hub id": lambda d: "a/b/c",
    "an address": lambda d: "https://somewhere/a/b",
}


@pytest.mark.parametrize("name", SOURCES)
def test_malformed_sources(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    good(tmp_path / "adapter")
    loop(tmp_path / "loop")
    with pytest.raises(UserError) as caught:
        load_adapters({"task": SOURCES[name](tmp_path)})
    assert str(caught.value).isprintable()


INDICES = {
    "parent": {"weight_map": {"w": "../model.safetensors"}},
    "absolute": {"weight_map": {"w": "/etc/passwd.safetensors"}},
    "below": {"weight_map": {"w": "sub/model.safetensors"}},
    "backslash": {"weight_map": {"w": "..\\model.safetensors"}},
    "no safetensors": {"weight_map": {"w": "pytorch_model.bin"}},
    "dots": {"weight_map": {"w": ".."}},
    "a number": {"weight_map": {"w": 3}},
    "a list": {"weight_map": {"w": ["a.safetensors"]}},
    "missing shard": {"weight_map": {"w": "gone.safetensors"}},
    "a loop": {"weight_map": {"w": "loop.safetensors"}},
    "a directory": {"weight_map": {"w": "dir.safetensors"}},
    "map is a list": {"weight_map": ["a.safetensors"]},
    "empty map": {"weight_map": {}},
    "no map": {},
    "metadata is a list": {"metadata": [1], "weight_map": {"w": "model.safetensors"}},
}


@pytest.mark.parametrize("name", INDICES)
def test_index_files_with_tricks(name, tmp_path):
    base = tmp_path / "base"
    (base / "sub").mkdir(parents=True)
    for place in (tmp_path, base / "sub"):  # what the tricks point to is there
        (place / "model.safetensors").write_bytes(b"")
    loop(base / "loop.safetensors")
    (base / "dir.safetensors").mkdir()
    (base / "model.safetensors.index.json").write_text(json.dumps(INDICES[name]))
    with pytest.raises(UserError) as caught:
        find_shards(base)
    assert str(caught.value).isprintable()
