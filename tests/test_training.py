"""``enmp train``: experts and a base from a run file, in small."""

import json
import shutil

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
from enmp_jax.runs.train import train_run
from enmp_jax.training.experts import target_templates, train_experts
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
    experts = np.asarray(evaluator.score_experts("search").correct) / sizes
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


def test_an_interrupted_training_resumes_to_the_same_weights(tmp_path):
    import jax

    from enmp_jax.training.loop import Schedule, train

    loss = lambda w, data, key: ((w["x"] - data) ** 2).sum() * (1 + jax.random.uniform(key))  # noqa: E731
    start, target = {"x": jnp.zeros((3, 2))}, jnp.ones((3, 2))
    schedule, key = Schedule(20, 0.1), jax.random.key(0)
    whole, _ = train(loss, start, target, schedule, key, steps_per_dispatch=5)

    def stop(done, value):
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            loss, start, target, schedule, key, steps_per_dispatch=5, on_progress=stop, checkpoints=tmp_path
        )
    resumed, losses = train(loss, start, target, schedule, key, steps_per_dispatch=5, checkpoints=tmp_path)
    np.testing.assert_allclose(resumed["x"], whole["x"], rtol=1e-6)
    assert len(losses) == 4
