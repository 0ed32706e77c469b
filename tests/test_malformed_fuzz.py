"""Random damage to adapter files: an adapter is read, or refused in one line; never a traceback."""

import json
import math
import struct
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enmp_jax.adapters import load_adapters
from enmp_jax.cli.inspect import inspect, render
from enmp_jax.errors import UserError
from enmp_jax.io.shards import read_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODULE = "base_model.model.layers.0.q_proj"
GOOD = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none",
    "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "fan_in_fan_out": False,
    "layers_to_transform": None, "layers_pattern": None, "modules_to_save": None, "exclude_modules": None,
    "init_lora_weights": True, "use_dora": False, "task_type": None, "base_model_name_or_path": "a/b",
}  # fmt: skip
TENSORS = {
    f"{MODULE}.lora_A.weight": np.ones((2, 6), np.float32),
    f"{MODULE}.lora_B.weight": np.ones((4, 2), np.float32),
}
FUZZ = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)

# small sizes: no pattern that Python's re would need minutes for
words = st.text(st.sampled_from("qv_proj.*+?()[]|\\d0\n\0é"), max_size=8)
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.sampled_from(["all-linear", "eva"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=4,
)


def read(config: bytes, weights: bytes) -> bool:
    """Read an adapter made of these bytes; whether it was accepted."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / CONFIG).write_bytes(config)
        (Path(name) / WEIGHTS).write_bytes(weights)
        report = inspect([name])
        assert render(report)
        json.dumps(report)
        try:
            stack = load_adapters({"task": name}).stack
        except UserError as error:
            assert str(error).isprintable()
            return False
        assert all(np.isfinite(pair.b).all() and np.isfinite(pair.a).all() for pair in stack.pairs.values())
        return True


@FUZZ
@given(st.dictionaries(st.sampled_from(sorted(GOOD)) | words, values, max_size=4))
def test_fuzzed_configuration(changes):
    read(json.dumps(GOOD | changes).encode(), safetensors.numpy.save(TENSORS))


@FUZZ
@given(st.binary(max_size=60), st.integers(0, 400), st.integers(0, 20))
def test_fuzzed_configuration_bytes(junk, start, removed):
    data = json.dumps(GOOD).encode()
    read(data[:start] + junk + data[start + removed :], safetensors.numpy.save(TENSORS))


numbers = st.sampled_from([-1, 0, 1, 2, 4, 6, 32, 48, 80, 2**31, 2**63, 2**64, 1.5, None, "2"])
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F64", "I8", "F8_E5M2", "C64", "x", 3, None]),
        "shape": st.lists(numbers, max_size=4) | numbers,
        "data_offsets": st.lists(numbers, min_size=1, max_size=3) | numbers,
        "more": values,
    },
)
keys = st.sampled_from(
    [*TENSORS, "__metadata__", f"{MODULE}.lora_A.default.weight", "", "\n", "lora_A.weight"]
)


@FUZZ
@given(
    st.dictionaries(keys | words, entries | values, max_size=3),
    st.none() | st.integers(0, 2**64 - 1),
    st.integers(0, 90),
)
def test_fuzzed_header(changes, size, n_bytes):
    header = {
        key: {"dtype": "F32", "shape": list(value.shape), "data_offsets": [offset, offset + value.nbytes]}
        for (key, value), offset in zip(TENSORS.items(), (0, 48))
    }
    for key, change in changes.items():
        old = header.get(key)
        header[key] = {**old, **change} if isinstance(old, dict) and isinstance(change, dict) else change
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text) if size is None else size) + text + bytes(n_bytes)
    read(json.dumps(GOOD).encode(), data)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / WEIGHTS
        path.write_bytes(data)
        try:
            for entry in read_header(path).entries:
                bits = math.prod(entry.shape)
                assert 0 <= entry.start <= entry.stop <= len(data) and (bits == 0) <= (
                    entry.start == entry.stop
                )
        except UserError as error:
            assert str(error).isprintable()


@FUZZ
@given(
    st.lists(st.tuples(st.integers(0, 350), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 400)
)
def test_fuzzed_weight_bytes(flips, length):
    data = bytearray(safetensors.numpy.save(TENSORS))
    for position, value in flips:
        data[position % len(data)] = value
    read(json.dumps(GOOD).encode(), bytes(data[: max(length, 8)]))


def test_what_is_fuzzed_is_accepted_unharmed():
    assert read(json.dumps(GOOD).encode(), safetensors.numpy.save(TENSORS))
