"""Merged deltas of PEFT adapters against a naive float64 implementation checked against the reference.

``tests/data/golden`` has one case for each suite x space x method x isotropize, two matrices each;
all 180 cases in full are used where ``../shared/golden`` is there. The expected deltas are stored in
float32; float64 is compared with the float64 oracle, which the file vouches for.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import merge_oracles
import numpy as np
import pytest
import safetensors.numpy

from enmp_jax import merges
from enmp_jax.adapters.peft_import import load_adapters
from enmp_jax.cli.main import main
from enmp_jax.deltas import member_axes
from enmp_jax.lora import LoraStack

SMALL = Path(__file__).parent / "data" / "golden"
WHOLE = Path(__file__).parents[2] / "shared" / "golden"
GOLDEN = WHOLE if WHOLE.exists() else SMALL
CASES = json.loads((GOLDEN / "cases.json").read_text())
EXPECTED = safetensors.numpy.load_file(GOLDEN / "expected.safetensors")
ORDER = json.loads((GOLDEN / "order.json").read_text())
GROUPS = sorted({(c["suite"], c["space"], c["method"]) for c in CASES})
# CART in KnOTS' space truncates between nearly equal singular values, which magnifies rounding about 1000
# times: the largest error was 1.8e-4 on a CPU without AVX-512. In float64 every case meets one tolerance.
FLOAT32_TOLERANCE = {("knots", "cart"): 3e-4}


@functools.cache
def stack_of(suite: str):
    return load_adapters({task: GOLDEN / suite / task for task in ORDER[suite]}).stack


def expected_of(case: dict) -> dict[tuple[int, str], np.ndarray]:
    found = {k: v for k, v in EXPECTED.items() if k.startswith(case["id"] + "/")}
    return {(int(k.split("/")[-2]), k.split("/")[-1]): v for k, v in found.items()}


def hyper(case: dict) -> dict:
    return {k: case[k] for k in ("density", "rank_fraction", "coefficient") if k in case}


def keep_of(case: dict, stack: LoraStack) -> np.ndarray:
    keep = np.ones((stack.n_layers, stack.n_tasks))
    for layer, task in case["pruned"]:
        keep[layer, stack.tasks.index(task)] = 0
    return keep


def run(cases: list[dict], stack: LoraStack) -> list[dict[str, np.ndarray]]:
    """Deltas by projection, [layer, out, in], of cases that differ in mask and isotropize only.

    All in one compiled call, to compile little.
    """
    first = cases[0]
    dtype = jax.tree.leaves(stack)[0].dtype
    keeps = jnp.asarray(np.stack([keep_of(c, stack) for c in cases]), dtype)
    scales = jnp.asarray([c["scale"] for c in cases], dtype)

    @jax.jit
    def both(stack, keeps, scales):
        found = {}
        for isotropize in sorted({c["isotropize"] for c in cases}):
            merge = merges.make(first["method"], first["space"], isotropize, **hyper(first))
            deltas = merges.merge_population(merge, merge.prepare(stack), keeps, scales)
            for name, delta in deltas.items():
                materialise = jax.vmap(lambda d: d.materialise(), (member_axes(delta),))
                found[isotropize, name.split(".")[-1]] = materialise(delta)
        return found

    whole = {key: np.asarray(x) for key, x in both(stack, keeps, scales).items()}
    return [
        {name: x[i] for (isotropize, name), x in whole.items() if isotropize == case["isotropize"]}
        for i, case in enumerate(cases)
    ]


def close(ours: np.ndarray, expected: np.ndarray, tolerance: float, what: tuple) -> None:
    error = np.linalg.norm(ours - expected)
    assert error <= tolerance * np.linalg.norm(expected), (*what, error / np.linalg.norm(expected))


def cases_of(suite: str, space: str, method: str) -> list[dict]:
    return [c for c in CASES if (c["suite"], c["space"], c["method"]) == (suite, space, method)]


@pytest.mark.parametrize(("suite", "space", "method"), GROUPS)
def test_float32(suite: str, space: str, method: str) -> None:
    cases = cases_of(suite, space, method)
    for case, whole in zip(cases, run(cases, stack_of(suite))):
        expected = expected_of(case)
        assert expected
        for (layer, projection), matrix in expected.items():
            tolerance = FLOAT32_TOLERANCE.get((space, method), 1e-4)
            close(whole[projection][layer], matrix, tolerance, (case["id"], layer, projection))


def kept_factors(case: dict, layer: int, projection: str) -> list[tuple[np.ndarray, np.ndarray]]:
    stack = stack_of(case["suite"])
    (pair,) = (p for name, p in stack.pairs.items() if name.endswith(projection))
    keep = keep_of(case, stack)[layer] * pair.present[layer]
    ranks = pair.rank[layer]
    a, b = np.asarray(pair.a[layer]), np.asarray(pair.b[layer])
    return [(a[i, : ranks[i]], b[i, :, : ranks[i]]) for i in range(stack.n_tasks) if keep[i]]


def oracle(case: dict, layer: int, projection: str) -> np.ndarray:
    tasks = kept_factors(case, layer, projection)
    whole = merge_oracles.merged(tasks, case["method"], case["space"], case["isotropize"], **hyper(case))
    return whole * case["scale"]


def test_the_oracle_of_the_merge_tests() -> None:
    """The golden file is float32: 3e-8 is the rounding of a matrix. Adapters are read as float32, alpha / r
    included, which is exact here."""
    for case in CASES:
        for (layer, projection), expected in expected_of(case).items():
            if kept_factors(case, layer, projection):
                close(oracle(case, layer, projection), expected, 3e-8, (case["id"], layer, projection))
            else:
                assert not expected.any()


@pytest.mark.parametrize("method", sorted({c["method"] for c in CASES}))
def test_float64(method: str) -> None:
    """What float32 cannot show, in every space: 1e-9 against the oracle."""
    with jax.enable_x64(True):
        stack = stack_of("llama").astype(jnp.float64)
        for space in ("full", "knots", "core"):
            case = cases_of("llama", space, method)[-1]
            (whole,) = run([case], stack)
            for layer, projection in expected_of(case):
                close(whole[projection][layer], oracle(case, layer, projection), 1e-9, (case["id"], layer))


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


def test_command_line_refuses(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    adapter = f"--adapter=dtd={GOLDEN / 'clip' / 'dtd'}"
    assert main(["merge", adapter, "--method", "tise", "--out", str(tmp_path / "a")]) == 2
    assert "did you mean 'ties'" in capsys.readouterr().err
    assert main(["merge", adapter, "--prune", "0:cars", "--out", str(tmp_path / "a")]) == 2
    assert main(["merge", adapter, "--format", "checkpoint", "--out", str(tmp_path / "a")]) == 2
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")

    def read(*_, **__):
        raise AssertionError("a used --out is refused before anything is read or merged")

    monkeypatch.setattr("enmp_jax.cli.merge.load_adapters", read)
    for form in ("delta", "peft", "adapters"):
        assert main(["merge", adapter, "--format", form, "--out", str(tmp_path / "full")]) == 2
        assert "already there" in capsys.readouterr().err
    assert (tmp_path / "full" / "mine").read_text() == "x"
