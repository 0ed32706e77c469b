"""Merged deltas of PEFT adapters against a naive float64 implementation checked against the reference.

``tests/data/golden`` has one case for each suite x space x method x isotropize, two matrices each;
all 180 cases in full are used where ``../shared/golden`` is there. The expected deltas are stored in
float32, so float64 results are rounded to float32 before comparing: what is left is below 1e-9
unless a rounding falls on the other side.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from enmp_jax import merges
from enmp_jax.adapters.peft_import import load_adapters
from enmp_jax.cli import main

SMALL = Path(__file__).parent / "data" / "golden"
WHOLE = Path(__file__).parents[2] / "shared" / "golden"
GOLDEN = WHOLE if WHOLE.exists() else SMALL
CASES = json.loads((GOLDEN / "cases.json").read_text())
EXPECTED = safetensors.numpy.load_file(GOLDEN / "expected.safetensors")
ORDER = json.loads((GOLDEN / "order.json").read_text())
GROUPS = sorted({(c["suite"], c["space"], c["method"]) for c in CASES})


@functools.cache
def stack_of(suite: str):
    return load_adapters({task: GOLDEN / suite / task for task in ORDER[suite]}).stack


def expected_of(case: dict) -> dict[tuple[int, str], np.ndarray]:
    found = {k: v for k, v in EXPECTED.items() if k.startswith(case["id"] + "/")}
    return {(int(k.split("/")[-2]), k.split("/")[-1]): v for k, v in found.items()}


def hyper(case: dict) -> dict:
    return {k: case[k] for k in ("density", "rank_fraction", "coefficient") if k in case}


def compare(case: dict, stack, ingredients, merge, tolerance: float) -> None:
    keep = np.ones((stack.n_layers, stack.n_tasks), np.float32)
    for layer, task in case["pruned"]:
        keep[layer, stack.tasks.index(task)] = 0
    deltas = merge(ingredients, jnp.asarray(keep), case["scale"])
    whole = {name.split(".")[-1]: np.asarray(d.materialise(), np.float32) for name, d in deltas.items()}
    for (layer, projection), expected in expected_of(case).items():
        ours = whole[projection][layer]
        error = np.linalg.norm(ours - expected)
        assert error <= tolerance * np.linalg.norm(expected), (case["id"], layer, projection, error)


@pytest.mark.parametrize(("suite", "space", "method"), GROUPS)
def test_float32(suite: str, space: str, method: str) -> None:
    cases = [c for c in CASES if (c["suite"], c["space"], c["method"]) == (suite, space, method)]
    stack = stack_of(suite)
    for isotropize in (False, True):
        merge = merges.make(method, space, isotropize, **hyper(cases[0]))
        ingredients, jitted = merge.prepare(stack), jax.jit(merge.merge)
        for case in cases:
            if case["isotropize"] == isotropize:
                compare(case, stack, ingredients, jitted, 1e-4)


@pytest.mark.parametrize("method", sorted({c["method"] for c in CASES}))
def test_float64(method: str) -> None:
    """2e-8: a quarter of a float32 rounding, so nearly every entry has all bits right."""
    with jax.enable_x64(True):
        stack = stack_of("llama").astype(jnp.float64)
        for space in ("full", "knots", "core"):
            case = next(c for c in CASES if (c["suite"], c["space"], c["method"]) == ("llama", space, method))
            merge = merges.make(method, space, case["isotropize"], **hyper(case))
            compare(case, stack, merge.prepare(stack), jax.jit(merge.merge), 2e-8)


@pytest.mark.parametrize(("suite", "space", "method"), [("clip", "knots", "ties"), ("llama", "core", "cart")])
def test_command_line(tmp_path: Path, suite: str, space: str, method: str) -> None:
    case = next(c for c in CASES if (c["suite"], c["space"], c["method"]) == (suite, space, method))
    words = ["merge", "--method", method, "--space", space, "--scale", str(case["scale"])]
    for task in ORDER[suite]:
        words += ["--adapter", f"{task}={GOLDEN / suite / task}"]
    for layer, task in case["pruned"]:
        words += ["--prune", f"{layer}:{task}"]
    for name, value in hyper(case).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    words += ["--isotropize"] if case["isotropize"] else []
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    written = safetensors.numpy.load_file(tmp_path / "out" / "delta.safetensors")
    for (layer, projection), expected in expected_of(case).items():
        (key,) = [k for k in written if k.endswith(f".{layer}.self_attn.{projection}.weight")]
        assert written[key].dtype == np.float32
        assert np.linalg.norm(written[key] - expected) <= 1e-4 * np.linalg.norm(expected)


def test_command_line_refuses(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    adapter = f"--adapter=dtd={GOLDEN / 'clip' / 'dtd'}"
    assert main(["merge", adapter, "--method", "tise", "--out", str(tmp_path / "a")]) == 2
    assert "did you mean 'ties'" in capsys.readouterr().err
    assert main(["merge", adapter, "--prune", "0:cars", "--out", str(tmp_path / "a")]) == 2
    assert main(["merge", adapter, "--format", "checkpoint", "--out", str(tmp_path / "a")]) == 2
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    assert main(["merge", adapter, "--out", str(tmp_path / "full")]) == 2
    assert (tmp_path / "full" / "mine").read_text() == "x"
