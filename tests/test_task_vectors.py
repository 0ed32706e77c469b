"""Whole models merged as task vectors: every method against numpy float64, however the rows are divided."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from adapter_files import load_all

from enmp_jax.adapters import task_vectors
from enmp_jax.cli import main as cli

SHAPES = {
    "model.embed_tokens.weight": (13, 6),
    "model.layers.0.up.weight": (9, 6),
    "model.layers.0.down.weight": (6, 9),
    "model.layers.0.conv.weight": (4, 2, 3),
    "model.norm.weight": (6,),
}
TASKS = ("a", "b", "c")


def save(path: Path, tensors) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "tokenizer.json").write_text("{}")
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return path


@pytest.fixture
def models(tmp_path):
    random = np.random.default_rng(0)
    base = {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    base["model.position_ids"] = np.arange(5)
    save(tmp_path / "base", base)
    vectors = []
    for task in TASKS:
        own = {name: 0.1 * random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
        tuned = {name: base[name] + own.get(name, 0) for name in base} | {
            "classifier.weight": np.ones((2, 6))
        }
        save(tmp_path / task, tuned)
        vectors.append({name: tuned[name].astype(np.float64) - base[name] for name in SHAPES})
    return base, vectors


def words(root: Path, *options: str):
    named = [word for task in TASKS for word in ("--adapter", f"{task}={root / task}")]
    return ["merge", *named, "--base-model", str(root / "base"), "--format", "checkpoint", *options]


def merged(root: Path, *options: str):
    assert cli.main([*words(root, *options), "--out", str(root / "out")]) == 0
    base, found = load_all(root / "base"), load_all(root / "out")
    assert found.keys() == base.keys()
    np.testing.assert_array_equal(found["model.position_ids"], np.arange(5))
    assert (root / "out" / "tokenizer.json").exists()
    return {name: found[name].astype(np.float64) - base[name] for name in SHAPES}


def ties(stacked, density):
    kept = np.zeros_like(stacked)
    for one, own in zip(kept, stacked, strict=True):
        threshold = np.sort(np.abs(own), axis=None)[::-1][int(own.size * density)]
        one[...] = np.where(np.abs(own) >= threshold, own, 0)
    sign = np.sign(kept.sum(axis=0))
    agreeing = (np.sign(kept) == sign) & (kept != 0)
    return (kept * agreeing).sum(axis=0) / np.maximum(agreeing.sum(axis=0), 1)


def polar(x):
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def tsv(stacked):
    rank = min(stacked.shape[1:]) // len(stacked)
    u, s, vt = np.linalg.svd(stacked, full_matrices=False)
    left = np.concatenate(list(u[:, :, :rank]), axis=1)
    return polar(left) @ np.diag(s[:, :rank].reshape(-1)) @ polar(vt[:, :rank].reshape(-1, stacked.shape[2]))


def iso(stacked):
    u, s, vt = np.linalg.svd(stacked.sum(axis=0), full_matrices=False)
    return s.mean() * u @ vt


def is_matrix(name):
    return name.endswith(("up.weight", "down.weight"))


ORACLES = {
    "sum": lambda name, x: x.sum(axis=0),
    "mean": lambda name, x: x.mean(axis=0),
    "ties": lambda name, x: ties(x, 0.3),
    "tsv": lambda name, x: tsv(x) if is_matrix(name) else x.mean(axis=0),
    "iso": lambda name, x: iso(x) if is_matrix(name) else x.mean(axis=0),
}
OPTIONS = {"ties": ("--density", "0.3")}


@pytest.mark.parametrize("method", ORACLES)
def test_methods_against_numpy(method, models, tmp_path, monkeypatch):
    monkeypatch.setattr(task_vectors, "_CHUNK", 20)  # of some rows
    found = merged(tmp_path, "--method", method, "--scale", "0.5", *OPTIONS.get(method, ()))
    for name in SHAPES:
        wanted = 0.5 * ORACLES[method](name, np.stack([vector[name] for vector in models[1]]))
        np.testing.assert_allclose(found[name], wanted, atol=2e-6, err_msg=name)


def test_random_drops_do_not_depend_on_how_rows_are_read(models, tmp_path, monkeypatch):
    monkeypatch.setattr(task_vectors, "_BLOCK", 8)
    plan = lambda: merged(tmp_path, "--method", "dare", "--drop-rate", "0.5", "--task-weights", "1", "0", "0")  # noqa: E731
    found = plan()
    shares = []
    for name in SHAPES:
        own = models[1][0][name]
        kept = np.abs(found[name]) > 1e-7
        np.testing.assert_allclose(found[name][kept], 2 * own[kept], atol=1e-6)
        shares += list(kept.reshape(-1))
    assert 0.35 < np.mean(shares) < 0.65
    change = task_vectors.MergedTensor
    read = change.rows
    monkeypatch.setattr(
        change, "rows", lambda self, a, b: np.concatenate([read(self, i, i + 1) for i in range(a, b)])
    )
    (tmp_path / "out").rename(tmp_path / "first")
    again = plan()
    for name in SHAPES:
        np.testing.assert_array_equal(again[name], found[name])


def test_verify_proves_it_and_sees_what_was_changed(models, tmp_path, capsys):
    merged(tmp_path, "--method", "dare_ties", "--density", "0.5", "--drop-rate", "0.2")
    check = ["verify", str(tmp_path / "out"), *words(tmp_path)[1:-2]]
    assert cli.main(check) == 0
    file = tmp_path / "out" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["model.norm.weight"][0] += 1e-3
    safetensors.numpy.save_file(tensors, file)
    capsys.readouterr()
    assert cli.main(check) == 1
    assert "model.norm.weight" in capsys.readouterr().out


def test_types_of_the_base_are_kept(models, tmp_path):
    for name in ("base", *TASKS):
        file = tmp_path / name / "model.safetensors"
        tensors = safetensors.numpy.load_file(file)
        half = {k: v.astype(ml_dtypes.bfloat16) if v.dtype == np.float32 else v for k, v in tensors.items()}
        safetensors.numpy.save_file(half, file)
    merged(tmp_path, "--method", "sum")
    assert load_all(tmp_path / "out")["model.norm.weight"].dtype == ml_dtypes.bfloat16


def broken(change):
    def make(root):
        file = root / "b" / "model.safetensors"
        tensors = safetensors.numpy.load_file(file)
        change(tensors)
        safetensors.numpy.save_file(tensors, file)

    return make


REFUSED = {
    "format": (lambda root: None, ["--format", "delta"], "merged into their base, with --format checkpoint"),
    "method": (lambda root: None, ["--method", "lego"], "lego is for adapters"),
    "space": (lambda root: None, ["--space", "knots"], "knots is for adapters"),
    "mask": (lambda root: None, ["--prune", "0:a"], "whole models are merged whole"),
    "lacking": (broken(lambda t: t.pop("model.norm.weight")), [], "has no model.norm.weight: it is"),
    "shapes": (
        broken(lambda t: t.update({"model.norm.weight": np.ones(7, np.float32)})), [],
        "6 F32 in the base model and",
    ),
    "NaN": (
        broken(lambda t: t.update({"model.norm.weight": np.full(6, np.nan, np.float32)})), [], "NaN or Inf",
    ),
    "an adapter": (
        lambda root: (root / "b" / "config.json").rename(root / "b" / "adapter_config.json"), [],
        "give one kind",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_one_line(name, models, tmp_path, capsys):
    change, options, message = REFUSED[name]
    change(tmp_path)
    assert cli.main([*words(tmp_path), "--method", "sum", *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_recipe_names_the_models_and_the_merge(models, tmp_path):
    merged(tmp_path, "--method", "ties")
    text = (tmp_path / "out" / "enmp_config.yaml").read_text()
    assert "method: ties" in text and str(tmp_path) not in text
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {}
