"""LARV: scores of layers against float64, and the factors that ``enmp inspect --larv`` gives."""

import json

import numpy as np
import pytest
from adapter_files import SHAPES, make, make_base

from enmp_jax.adapters import read_adapter
from enmp_jax.cli.main import main
from enmp_jax.merges import larv


def effective_rank(matrix):
    energy = np.linalg.svd(matrix, compute_uv=False) ** 2
    share = energy[energy > 1e-12 * energy[0]] / energy.sum()
    return np.exp(-np.sum(share * np.log(share)))


def oracle(weight, delta):
    """Contrast and conflict with everything formed, float64."""
    size = np.linalg.norm(weight) * np.linalg.norm(delta)
    left, right = weight @ delta.T, weight.T @ delta
    conflict = (np.linalg.norm(left - left.T) + np.linalg.norm(right - right.T)) / 2 / size
    return effective_rank(weight) / effective_rank(delta), conflict


@pytest.mark.parametrize(("out", "inner", "rank"), [(7, 5, 2), (5, 9, 3), (6, 6, 1)])
def test_alignment_is_what_whole_matrices_give(out, inner, rank):
    random = np.random.default_rng(out)
    weight, a, b = (random.normal(size=s) for s in ((out, inner), (rank, inner), (out, rank)))
    tasks = (np.stack([a, -3 * a[::-1]]), np.stack([b, b]))  # of two tasks
    found = larv.alignment(*(x.astype(np.float32) for x in (weight, *tasks)))
    expected = [oracle(weight, d) for d in np.matmul(tasks[1], tasks[0])]
    np.testing.assert_allclose(np.transpose(found), expected, rtol=2e-5)


def test_a_delta_that_commutes_has_no_conflict():
    """Symmetric matrices with the same eigenvectors."""
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0].astype(np.float32)
    weight = q @ np.diag(np.arange(1, 7, dtype=np.float32)) @ q.T
    contrast, conflict = larv.alignment(weight, q[None, :, :2].mT, q[None, :, :2])
    assert conflict < 1e-3  # the root of rounding
    np.testing.assert_allclose(contrast, effective_rank(weight) / 2, rtol=1e-5)


def test_scores_grow_with_contrast_and_depth_and_shrink_with_conflict():
    same = np.full(4, 2.0)
    found = larv.scores(same, np.full(4, 0.3))
    np.testing.assert_allclose(found, 2 * np.sqrt(np.arange(1, 5) / 4) / (np.log(2) + 1), rtol=1e-6)
    more = larv.scores(same, np.array([0.1, 0.1, 0.1, 0.5]))
    z = (0.5 - 0.2) / np.std([0.1, 0.1, 0.1, 0.5])
    np.testing.assert_allclose(more[3], 2 / (np.log1p(np.exp(z)) + 1), rtol=1e-6)
    assert more[3] < found[3] and more[2] > found[2]


def test_tiers_divide_the_layers_evenly():
    assert larv.tiered(np.array([3.0, 1, 2, 6, 5, 4]), (0.5, 1, 2)) == [1, 0.5, 0.5, 2, 2, 1]
    assert larv.tiered(np.array([3.0, 1]), (0.5, 1)) == [1, 0.5]


@pytest.fixture
def files(tmp_path):
    base = make_base(tmp_path / "base")
    return base, [str(make(tmp_path / name, seed)) for seed, name in enumerate(("cars", "dtd"))]


def test_inspect_gives_the_factors_of_every_layer(files, tmp_path, capsys):
    base, adapters = files
    options = ["--larv", "--base-model", str(tmp_path / "base"), "--tiers", "0.5", "1", "2"]
    assert main(["inspect", *adapters, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["larv"]
    expected = []
    for layer in range(3):
        own = []
        for adapter in map(read_adapter, adapters):
            for name in SHAPES:
                path = f"model.layers.{layer}.{name}"
                a, b = (np.asarray(x, np.float64) for x in adapter.modules[path])
                own.append(oracle(base[f"{path}.weight"].astype(np.float64), b @ a))
        expected.append(np.mean(own, axis=0))
    np.testing.assert_allclose([found["contrast"], found["conflict"]], np.transpose(expected), rtol=1e-4)
    assert sorted(found["layer_scaling"]) == [0.5, 1, 2]
    order = np.argsort(found["score"])
    assert [found["layer_scaling"][i] for i in order] == [0.5, 1, 2]

    assert main(["inspect", *adapters, *options]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    # and a merge takes them
    numbers = line.removeprefix("layer_scaling: [").removesuffix("]").split(", ")
    sources = [x for task, path in zip("xy", adapters) for x in ("--adapter", f"{task}={path}")]
    merge = ["merge", *sources, "--method", "sum", "--out", str(tmp_path / "out")]
    assert main([*merge, "--layer-scaling", *numbers]) == 0
    assert main([*merge[:-1], str(tmp_path / "two"), "--layer-scaling", *numbers, "1"]) == 2
    assert "one for each of the 3 layers, not 4" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


def test_bad_requests_are_one_line(files, tmp_path, capsys):
    _, adapters = files
    for options, said in (
        (["--larv"], "give --base-model"),
        (["--larv", "--base-model", str(tmp_path / "base"), "--tiers", "1"], "two finite numbers or more"),
    ):
        assert main(["inspect", *adapters, *options]) == 2
        assert said in capsys.readouterr().err
    # a task that leaves a layer alone is no fault; a layer that nobody changes is
    lonely = str(make(tmp_path / "lonely", 3, layers=(0, 2)))
    base = ["--base-model", str(tmp_path / "base"), "--larv"]
    assert main(["inspect", lonely, *base]) == 2
    assert "no adapter changes layer 1" in capsys.readouterr().err
