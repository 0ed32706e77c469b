"""Adapters from strangers that would stall, exhaust or overflow: refused in one line, quickly."""

import json
import time

import numpy as np
import pytest
import safetensors.numpy

from enmp_jax.adapters import load_adapters
from enmp_jax.adapters.lora_config import LoraSettings
from enmp_jax.cli import main as cli
from enmp_jax.errors import UserError
from enmp_jax.io.writing import write_tensors

MODULE = "base_model.model.layers.{}.q_proj"


def adapter(path, modules=None, config=(), a=1.0):
    path.mkdir()
    modules = modules or [MODULE.format(0)]
    given = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], **dict(config)}
    (path / "adapter_config.json").write_text(json.dumps(given))
    tensors = {}
    for module in modules:
        tensors[f"{module}.lora_A.weight"] = np.full((2, 6), a, np.float32)
        tensors[f"{module}.lora_B.weight"] = np.ones((4, 2), np.float32)
    safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors")
    return path


SLOW = r"(?:[a-z0-9_.]|[a-z0-9_.]{2})+[^a]"
LONG = MODULE.format(0) + "." + "a" * 300


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": SLOW},
        {"rank_pattern": {SLOW: 2}},
        {"alpha_pattern": {SLOW: 2}, "target_modules": "all-linear"},
        {"exclude_modules": SLOW},
        {"layers_pattern": [SLOW], "layers_to_transform": [0], "target_modules": ["a" * 300]},
        {"rank_pattern": {f"{SLOW}{i}?": 2 for i in range(50)}},
    ],
)
def test_patterns_that_backtrack_for_ever_are_given_up(tmp_path, config):
    start = time.thread_time()
    with pytest.raises(UserError, match="take too long"):
        load_adapters({"t": adapter(tmp_path / "x", [LONG], config)})
    assert time.thread_time() - start < 30  # seconds here; alone, minutes to centuries


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"target_modules": "a" * 1001}, "1001 characters"),
        ({"rank_pattern": {f"x{i}": 2 for i in range(10_001)}}, "10001 entries"),
        ({"r": 10**30}, "must be a rank"),
        ({"rank_pattern": {"(": 2}}, "invalid regular expression"),
    ],
)
def test_configurations_too_large_to_be_meant(tmp_path, config, line):
    with pytest.raises(UserError, match=line):
        load_adapters({"t": adapter(tmp_path / "x", config=config)})


def parse(**config):
    return LoraSettings.parse({"peft_type": "LORA", "r": 8, "lora_alpha": 8, **config}, "x")


def test_patterns_mean_what_peft_means():
    path = "model.layers.12.self_attn.q_proj"
    names = ("q_proj", "self_attn.q_proj", "self_attn.q.proj", path)
    for pattern in (
        *names,
        r"layers\.12\..*",
        r".*\.1\d\..*q_proj",
        r"(model\.)?layers\.(1|12)\.self_attn\.[qk]_proj",
    ):
        assert parse(rank_pattern={pattern: 3}).module_rank(path) == 3, pattern
    for pattern in ("_proj", "proj", "v_proj", r"layers\.12", "x" * 900):
        assert parse(rank_pattern={pattern: 3}).module_rank(path) == 8, pattern
    assert parse(rank_pattern={"q_proj": 3, ".*": 4}).module_rank(path) == 3  # the first one
    assert parse(target_modules=r"^(?!.*vision).*(?:q_proj|v_proj)$").targets(path)
    assert not parse(target_modules=r"^(?!.*layers).*(?:q_proj|v_proj)$").targets(path)
    assert not parse(target_modules=["q_proj"], exclude_modules=["self_attn.q_proj"]).targets(path)
    assert parse(target_modules=["q_proj"], layers_to_transform=[12]).targets(path)
    assert not parse(target_modules=["q_proj"], layers_to_transform=[1]).targets(path)
    assert parse(target_modules=["q_proj"], layers_to_transform=[12], layers_pattern=["layers"]).targets(path)


@pytest.mark.parametrize("layer", ["1000000000", "4096", "9" * 5000])
def test_layers_that_no_model_has(tmp_path, layer):
    start = time.thread_time()
    with pytest.raises(UserError, match="layer"):
        load_adapters({"t": adapter(tmp_path / "x", [MODULE.format(0), MODULE.format(layer)])})
    assert time.thread_time() - start < 5


def test_ranks_that_lie_far_apart_do_not_fill_the_memory(tmp_path):
    path = adapter(
        tmp_path / "x", [MODULE.format(i) for i in range(4000)], {"rank_pattern": {"layers.0.q_proj": 60000}}
    )
    tensors = safetensors.numpy.load_file(path / "adapter_model.safetensors")
    tensors[MODULE.format(0) + ".lora_A.weight"] = np.zeros((60000, 6), np.float32)
    tensors[MODULE.format(0) + ".lora_B.weight"] = np.zeros((4, 60000), np.float32)
    safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="too far apart"):
        load_adapters({"t": path})


def test_many_projections_are_not_compared_in_pairs(tmp_path):
    paths = [f"base_model.model.layers.0.p{i}" for i in range(5000)]
    path = adapter(tmp_path / "x", paths, {"target_modules": "all-linear"})
    start = time.thread_time()
    with pytest.raises(UserError, match="5000 different projections"):
        load_adapters({"t": path})
    assert time.thread_time() - start < 10


@pytest.mark.parametrize("form", ["delta", "peft", "adapters"])
def test_products_that_overflow_are_named_by_module_and_task(tmp_path, form, capsys):
    """Factors of 3e38 are finite; what they stand for is not."""
    a, b = adapter(tmp_path / "a", a=3e38), adapter(tmp_path / "b")
    arguments = ["--adapter", f"cars={a}", "--adapter", f"dtd={b}", "--method", "sum", "--format", form]
    assert cli.main(["merge", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "layers.0.q_proj" in error and "'cars'" in error and "overflows float32" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["delta", "peft"])
def test_sums_that_overflow_are_not_written(tmp_path, form, capsys):
    a, b = adapter(tmp_path / "a", a=1e38), adapter(tmp_path / "b", a=1e38)
    arguments = ["--adapter", f"cars={a}", "--adapter", f"dtd={b}", "--method", "sum", "--format", form]
    assert cli.main(["merge", *arguments, "--scale", "3", "--out", str(tmp_path / "out")]) == 2
    assert "NaN or Inf" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_no_tensor_is_written_that_is_not_finite(tmp_path):
    with pytest.raises(UserError, match="x has NaN or Inf"):
        write_tensors(tmp_path / "t.safetensors", {"x": np.full(2, np.nan, np.float32)}, {})
    assert not list(tmp_path.iterdir())
