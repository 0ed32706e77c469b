"""``enmp train``: experts and a base from a run file, in small."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from enmp_jax import models
from enmp_jax.adapters.peft_import import load_adapters
from enmp_jax.config import run_file
from enmp_jax.data import load_examples
from enmp_jax.errors import UserError
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.loaded_run import load
from enmp_jax.io.checkpoints import Checkpoints
from enmp_jax.runs.train import train_run
from enmp_jax.training.experts import target_templates, train_experts
from enmp_jax.training.loop import EarlyStopping, Schedule, train
from enmp_jax.training.probe import fit_heads


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("train")
    shutil.copytree(run_file.SUITES / "demo", path / "demo")
    data = yaml.safe_load((run_file.SUITES / "demo.yaml").read_text())
    data["tasks"] = [data["tasks"][0], data["tasks"][4]]
    data["train"] |= {"steps": 60, "batch_size": 32, "learning_rate": 3e-3, "rank": 2}
    data["pretrain"] |= {"steps": 50, "batch_size": 32, "tasks": data["pretrain"]["tasks"][:2]}
    data["pretrain"]["architecture"] |= {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32}
    (path / "run.yaml").write_text(yaml.safe_dump(data))
    return run_file.load(path / "run.yaml")


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    out, lines = tmp_path_factory.mktemp("trained") / "out", []
    train_run(run, out, lines.append)
    return out, lines


def test_base_and_adapters_load_as_any_others(trained, run):
    out, lines = trained
    backbone, _ = models.load(out / "base")
    assert backbone.n_layers == 2 and backbone.width == 32
    loaded = load_adapters({t.name: out / "adapters" / t.name for t in run.tasks}, backbone.canonical,
                           n_layers=2, modules=backbone.modules)  # fmt: skip
    assert loaded.stack.present().all()
    weights = {task: head["classifier"]["weight"].shape for task, head in loaded.heads.items()}
    assert weights == {"digit": (10, 32), "even": (2, 32)}
    assert any("step 60 of 60" in line for line in lines)
    assert set(json.loads((out / "training.json").read_text())) == {"base", "digit", "even"}
    assert sorted(p.name for p in out.iterdir()) == ["adapters", "base", "training.json"]


def test_what_is_there_already_is_kept(trained, run):
    out, _ = trained
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    lines = []
    train_run(run, out, lines.append)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")} == before
    assert "already" in lines[-1]


def test_a_foreign_directory_is_refused(run, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="thesis.tex"):
        train_run(run, tmp_path, lambda line: None)


def test_training_makes_the_experts_better_than_the_base(demo_run):
    """The packaged experts, as ``enmp train`` made them, on data that they were not trained on."""
    evaluator = Evaluator(load(demo_run, ("search",)))
    sizes = evaluator.loaded.sizes("search")
    experts = evaluator.expert_scores("search")
    base = np.asarray(evaluator.score_base("search").correct) / sizes
    assert experts.mean() > base.mean() + 0.15


def test_tasks_train_independently_of_each_other(run):
    """Adding a task changes nothing for the first: own data, own draws, own clipping."""
    backbone, params = models.load(run.path("demo/base"))
    examples = [load_examples(t.data, "train", run.root).take(np.arange(100)) for t in run.tasks]
    heads = _heads(backbone, examples)
    steps = run.train.__class__(steps=5, batch_size=8, rank=2, target_modules=("q_proj",))
    both = train_experts(backbone, params, examples, heads, steps)
    again = train_experts(backbone, params, [examples[0], examples[0]], heads, steps)
    for name, (a, b) in both.factors.items():
        np.testing.assert_allclose(a[0], again.factors[name][0][0], atol=1e-5)
        np.testing.assert_allclose(b[0], again.factors[name][1][0], atol=1e-5)
        assert np.abs(b[1] - again.factors[name][1][1]).max() > 1e-6


def _heads(backbone, examples):
    from enmp_jax.evaluation.scoring import stack_heads

    return stack_heads(
        [(np.zeros((10, backbone.width), np.float32), np.zeros(10, np.float32))] * len(examples)
    )


def test_probed_heads_beat_chance_and_stay_fixed(run):
    backbone, params = models.load(run.path("demo/base"))
    examples = [load_examples(run.tasks[0].data, "train", run.root).take(np.arange(200))]
    heads = fit_heads(backbone, params, examples, _heads(backbone, examples), steps=30)
    from enmp_jax.training.probe import base_features

    features, labels = base_features(backbone, params, examples[0])
    logits = features @ np.asarray(heads.weight[0]).T + np.asarray(heads.bias[0])
    assert (logits.argmax(1) == labels).mean() > 0.5
    config_ = run.train.__class__(steps=2, batch_size=8, rank=2, head="probe", target_modules=("q_proj",))
    experts = train_experts(backbone, params, examples, heads, config_)
    np.testing.assert_array_equal(experts.heads.weight, heads.weight)


def test_target_modules(run):
    backbone, _ = models.load(run.path("demo/base"))
    assert all(name.endswith("q_proj") for name in target_templates(backbone, ["q_proj"]))
    assert len(target_templates(backbone, [])) == 4
    with pytest.raises(UserError, match="names no module"):
        target_templates(backbone, ["wq"])


def quadratic(w, data, key):
    return ((w["x"] - data) ** 2).sum() * (1 + jax.random.uniform(key))


START, TARGET, KEY = {"x": jnp.zeros((3, 2))}, jnp.ones((3, 2)), jax.random.key(0)


RISING = EarlyStopping(lambda step, w: float(w["x"].sum()), check_every=5, patience=1)
FALLING = EarlyStopping(lambda step, w: 5.0 - step, check_every=5, patience=3)


@pytest.mark.parametrize(
    ("stopping", "rest", "best"), [(None, [15, 20, 23], 23), (RISING, [15, 20, 23], 23), (FALLING, [15], 0)]
)
def test_an_interrupted_training_resumes_to_the_same_weights(tmp_path, stopping, rest, best):
    schedule = Schedule(23, 0.1)
    settings = {"steps_per_dispatch": 5, "early_stopping": stopping}
    whole = train(quadratic, START, TARGET, schedule, KEY, **settings)

    def stop(done, value):
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path, "same") as checkpoints:
        train(quadratic, START, TARGET, schedule, KEY, on_progress=stop, checkpoints=checkpoints, **settings)
    done = []
    with Checkpoints(tmp_path, "same") as checkpoints:
        resumed = train(
            quadratic, START, TARGET, schedule, KEY, checkpoints=checkpoints,
            on_progress=lambda step, value: done.append(step), **settings,
        )  # fmt: skip
    np.testing.assert_array_equal(resumed.weights["x"], whole.weights["x"])
    assert resumed[1:] == whole[1:]
    assert done == rest
    assert whole.step == best


def test_a_rest_of_steps_is_done_exactly_and_does_not_compile_anew():
    """60 steps are 60 updates, not the 100 of two whole dispatches."""
    traced, shown = [], []

    def loss(w, data, key):
        traced.append(1)
        return w["x"].sum()

    schedule = Schedule(60, 0.1, weight_decay=0.0)
    found = train(loss, START, TARGET, schedule, KEY, on_progress=lambda step, _: shown.append(step))
    once = train(loss, START, TARGET, schedule, KEY, steps_per_dispatch=60)
    single = train(loss, START, TARGET, schedule, KEY, steps_per_dispatch=1)
    np.testing.assert_array_equal(found.weights["x"], once.weights["x"])
    np.testing.assert_allclose(found.weights["x"], single.weights["x"], rtol=1e-6)
    assert shown == [50, 60]
    assert found.step == 60
    assert len(traced) == 3  # one for each of the three trainings
    np.testing.assert_allclose(np.average(found.losses, weights=[50, 10]), once.losses, rtol=1e-5)


def test_early_stopping_returns_the_best_weights_checked():
    seen = []

    def score(step, weights):
        """Best near half of the way to the target."""
        seen.append(step)
        return -abs(float(weights["x"].mean()) - 0.5)

    settings = {"steps_per_dispatch": 7, "early_stopping": EarlyStopping(score, check_every=4, patience=2)}
    found = train(quadratic, START, TARGET, Schedule(90, 0.1, 0.0), KEY, **settings)
    assert seen == list(range(0, found.step + 2 * 4 + 1, 4))
    assert 0 < found.step < 80
    assert abs(float(found.weights["x"].mean()) - 0.5) < 0.25
    # nothing is better than the start: the start comes back
    worse = EarlyStopping(lambda step, w: -float(step), check_every=4, patience=1)
    found = train(quadratic, START, TARGET, Schedule(90, 0.1), KEY, early_stopping=worse)
    assert found.step == 0
    np.testing.assert_array_equal(found.weights["x"], START["x"])
    # the last steps are checked too, though they are fewer than check_every
    steps = []
    better = EarlyStopping(lambda step, w: steps.append(step) or float(step), check_every=4, patience=1)
    assert train(quadratic, START, TARGET, Schedule(10, 0.1), KEY, early_stopping=better).step == 10
    assert steps == [0, 4, 8, 10]


def stopped_run(run, out, monkeypatch):
    """Train until the last checkpoint is written, and fail before the adapters are."""

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    lines = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("enmp_jax.runs.train.save_adapter", fail)
        train_run(run, out, lines.append)
    return lines


def weights_of(out):
    return {p.parent.name: p.read_bytes() for p in out.rglob("adapter_model.safetensors")}


@pytest.fixture
def small(run):
    """A short training of two adapters on the packaged base."""
    base = dataclasses.replace(run.base, model=run.path("demo/base"))
    shorter = dataclasses.replace(run.train, steps=12, batch_size=8, target_modules=("q_proj",))
    return dataclasses.replace(run, pretrain=None, base=base, train=shorter)


def with_rate(run, rate):
    return dataclasses.replace(run, train=dataclasses.replace(run.train, learning_rate=rate))


def test_checkpoints_of_other_settings_are_not_resumed_from(small, tmp_path, monkeypatch):
    stopped_run(small, tmp_path / "stopped", monkeypatch)
    assert (tmp_path / "stopped" / "checkpoints" / "adapters").is_dir()
    shutil.copytree(tmp_path / "stopped", tmp_path / "other")
    # with the same settings nothing is trained again
    lines = []
    train_run(small, tmp_path / "stopped", lines.append)
    assert not any("step" in line or "anew" in line for line in lines), lines
    assert not (tmp_path / "stopped" / "checkpoints").exists()
    other, lines = with_rate(small, 1e-2), []
    train_run(other, tmp_path / "other", lines.append)
    assert any("other settings: training anew" in line for line in lines)
    train_run(other, tmp_path / "new", lambda line: None)
    assert weights_of(tmp_path / "other") == weights_of(tmp_path / "new")
    assert weights_of(tmp_path / "other") != weights_of(tmp_path / "stopped")


def test_the_fingerprint_covers_all_that_the_adapters_depend_on(small, tmp_path, monkeypatch):
    class Opened(Exception):
        pass

    def spy(path, fingerprint, say):
        raise Opened(fingerprint)

    def made_of(run):
        with monkeypatch.context() as patch, pytest.raises(Opened) as opened:
            patch.setattr("enmp_jax.runs.train.Checkpoints", spy)
            train_run(run, tmp_path / "out", lambda line: None)
        return str(opened.value)

    task = small.tasks[0]
    half = dataclasses.replace(task, data=dataclasses.replace(task.data, train="train[:50%]"))
    copy = tmp_path / "base"
    shutil.copytree(small.base.model, copy)
    os.utime(copy / "model.safetensors", (0, 0))  # as another base would have another time
    changed = (
        small,
        with_rate(small, 1e-2),
        dataclasses.replace(small, tasks=(half, *small.tasks[1:])),
        dataclasses.replace(small, tasks=small.tasks[:1]),
        dataclasses.replace(small, base=dataclasses.replace(small.base, model=str(copy))),
        dataclasses.replace(small, train=dataclasses.replace(small.train, head="probe")),
    )
    assert len({made_of(run) for run in changed}) == len(changed)
    assert made_of(small) == made_of(small)
