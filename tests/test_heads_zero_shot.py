"""Zero-shot heads of a run: which prompts, what scale, and what is refused."""

import dataclasses

import numpy as np
import pytest
import simulated_hub
from transformers import AutoTokenizer

from enmp_jax import models
from enmp_jax.config.run_file import RunConfig
from enmp_jax.config.sections import BaseConfig, DataConfig, HeadConfig, TaskConfig
from enmp_jax.data import prompts
from enmp_jax.errors import UserError
from enmp_jax.evaluation.heads import load_heads
from enmp_jax.models.clip import zero_shot_head


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "clip"
    simulated_hub.clip(path, 8)
    return str(path), models.load(path)[0]


def task(name, data=(), **head):
    return TaskConfig(
        name, "x/a", DataConfig("npz:a.npz", class_names=tuple(data)), HeadConfig("zero-shot", **head)
    )


def run(path, *tasks):
    return RunConfig(BaseConfig(path), tasks)


def test_packaged_and_own_prompts(base):
    path, backbone = base
    own = task("own", templates=("a photo of the {}.", "my {}"))
    heads = load_heads(
        run(path, task("digits", prompts="mnist"), own), {}, path, backbone,
        class_names={"digits": ("ignored",), "own": ("zero", "dirty one", "boat")},
    )  # fmt: skip
    assert heads.normalise and heads.weight.shape == (2, 10, 24)
    np.testing.assert_array_equal(heads.logit_scale, [100, 100])
    np.testing.assert_array_equal(heads.allowed[1], np.arange(10) < 3)
    text, params = models.load(path, family="clip_text_model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    for i, p in enumerate((prompts("mnist"), (("zero", "dirty one", "boat"), own.head.templates))):
        wanted = zero_shot_head(text, params, p[0], p[1], tokenizer, logit_scale=1.0)
        np.testing.assert_allclose(heads.weight[i, : len(wanted)], wanted, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(heads.weight[i, : len(wanted)], axis=1), 1, atol=1e-6)


def test_names_in_the_run_file_win_over_packaged_ones(base):
    path, backbone = base
    named = task("digits", ("nought", "one"), prompts="mnist")
    assert load_heads(run(path, named), {}, path, backbone).allowed.sum() == 2


@pytest.mark.parametrize(
    ("head", "names", "message"),
    [
        ({"prompts": "nmist"}, (), "no prompts are packaged for 'nmist'"),
        ({"prompts": "mnist", "templates": ("a {}",)}, (), "give either prompts or templates"),
        ({}, ("a",), "needs prompts: NAME"),
        ({"templates": ("a {}",)}, (), "no class names, and a zero-shot head"),
        ({"templates": ("a {}",)}, ("a", " "), "no name for class 1"),
        ({"templates": ("a photo",)}, ("a",), "has no {} for the class name"),
    ],
)
def test_refused(base, head, names, message):
    path, backbone = base
    with pytest.raises(UserError, match=message):
        load_heads(run(path, task("t", **head)), {}, path, backbone, class_names={"t": names})


def test_other_heads_beside_and_other_bases(base, demo_loaded):
    path, backbone = base
    other = dataclasses.replace(task("u"), head=HeadConfig("adapter"))
    with pytest.raises(UserError, match=r"tasks\.u\.head: zero-shot heads cannot be mixed"):
        load_heads(run(path, task("t", prompts="mnist"), other), {}, path, backbone)
    with pytest.raises(UserError, match="need the text tower of a whole CLIP"):
        load_heads(
            run("x", task("t", prompts="mnist")),
            {},
            demo_loaded.base,
            demo_loaded.backbone,
        )


def test_a_saved_text_tower_keeps_its_scalar_logit_scale(base, tmp_path):
    text, params = models.load(base[0], family="clip_text_model")
    models.save(tmp_path / "text", text, params)
    _, again = models.load(tmp_path / "text", family="clip_text_model")
    assert again["logit_scale"].shape == () and again["logit_scale"] == params["logit_scale"]


def test_made_once_and_again_when_the_prompts_or_the_base_change(base, tmp_path, monkeypatch):
    path, backbone = base
    monkeypatch.setenv("ENMP_CACHE", str(tmp_path))
    loads, load = [], models.load
    monkeypatch.setattr(models, "load", lambda *a, **k: loads.append(1) or load(*a, **k))

    def weight(**head):
        names = {"t": ("zero", "one")}
        return load_heads(run(path, task("t", **head)), {}, path, backbone, class_names=names).weight

    first = weight(templates=("a photo of {}",))
    np.testing.assert_array_equal(weight(templates=("a photo of {}",)), first)
    assert len(loads) == 1
    assert not np.array_equal(weight(templates=("my {}",)), first) and len(loads) == 2
    for cached in (tmp_path / "heads").iterdir():
        cached.write_bytes(b"damaged")
    np.testing.assert_array_equal(weight(templates=("a photo of {}",)), first)
    assert len(loads) == 3
