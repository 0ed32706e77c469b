"""Runs of choices and completions from the command line: search, evaluate, refine, train, and bad input."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from generative_files import loaded_run, save_all
from safetensors.numpy import load_file, save_file

from enmp_jax import models
from enmp_jax.adapters.recipe import RECIPE
from enmp_jax.cli.main import main
from enmp_jax.config import run_file
from enmp_jax.io.progress import SILENT
from enmp_jax.runs.evaluate import evaluate_run
from enmp_jax.training.experts import answer_loss

TASKS = ("say", "pick")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("generative"))


@pytest.fixture
def small(root, tmp_path):
    """The same files, for runs that write beside them."""
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    return tmp_path


def enmp(capsys, *args):
    """Exit code, standard output and standard error of a command."""
    return main([str(a) for a in args]), *capsys.readouterr()


def answers_add_up_to(scores, out, *models):
    """test-answers.json: the scores again, from single examples, and the gains with their intervals."""
    kept = json.loads((out / "test-answers.json").read_text())
    assert set(kept["tokens"]) == {"say"}
    for model in ("merged", *models):
        own = kept["answers"]["say"][model]
        assert len(own) == len(kept["tokens"]["say"]) == 7
        assert sum(own) / sum(kept["tokens"]["say"]) == pytest.approx(-scores["loss"][model]["say"], rel=1e-5)
        right = kept["answers"]["pick"][model]
        assert right.count("1") / 7 == pytest.approx(scores[model]["pick"], abs=1e-6)
    assert list(scores["interval"]) == list(models)
    for model in models:
        gain, mean = kept["gain"][model], scores["mean_normalised"]
        assert gain["difference"] == pytest.approx(mean[model] - mean["merged"], abs=1e-5)
        assert scores["interval"][model] == {key: value for key, value in gain.items() if key != "tasks"}
        for task, change in gain["tasks"].items():
            known = scores[model][task] - scores["merged"][task]
            assert change["difference"] == pytest.approx(known, abs=1e-5)
            assert change["low"] <= change["difference"] <= change["high"]


def test_search_evaluate_and_refine(small, capsys):
    """A run of both kinds from the run file to a refined adapter; every task's metric is named."""
    loaded_run(small, search=", fitness: expert_kl", strategy="gradient")
    text = (small / "run.yaml").read_text()
    (small / "run.yaml").write_text(text.replace("name: say,", "name: say, metrics: [exact_match, chrf],"))
    assert enmp(capsys, "search", small / "run.yaml", "--out", small / "out")[0] == 0
    scores = json.loads((small / "out" / "scores.json").read_text())
    assert scores["metric"] == {"say": "likelihood", "pick": "accuracy"}
    for name in ("reference", "merged", "enmp", "base"):
        loss = scores["loss"][name]
        assert scores[name]["say"] == pytest.approx(np.exp(-loss["say"]), rel=1e-5)
        assert 0 <= scores[name]["pick"] <= 1 and loss["pick"] > 0
    relative = [scores["enmp"][t] / scores["reference"][t] for t in TASKS]
    assert scores["mean_normalised"]["enmp"] == pytest.approx(np.mean(relative), rel=1e-5)
    assert (small / "out" / "report.html").exists()
    answers_add_up_to(scores, small / "out", "enmp")
    assert set(scores["generated"]["say"]) == {"exact_match", "chrf"} and "pick" not in scores["generated"]
    config = json.loads((small / "out" / "merged" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and not config["modules_to_save"]

    code, printed, errors = enmp(
        capsys, "evaluate", small / "run.yaml", "--mask", small / "out" / "mask.json", "--json"
    )
    assert code == 0, errors
    result = json.loads(printed[printed.index("{") :])
    assert result["metric"] == scores["metric"]
    assert result["generated"] == scores["generated"]
    for name in ("reference", "merged", "enmp"):
        for task in TASKS:
            assert result["loss"][name][task] == pytest.approx(scores["loss"][name][task], rel=1e-4)
    code, printed, _ = enmp(capsys, "evaluate", small / "run.yaml", "--mask", small / "out" / "mask.json")
    assert code == 0 and "accuracy, of completions likelihood exp(-loss)" in " ".join(printed.split())

    exported = small / "exported"
    assert enmp(capsys, "export", small / "out", "--format", "delta", "--out", exported)[0] == 0
    given = [word for task in TASKS for word in ("--adapter", f"{task}={small / 'experts' / task}")]
    code, _, errors = enmp(capsys, "verify", exported, *given)
    assert code == 0, errors

    assert enmp(capsys, "refine", small / "out", "--steps", "3", "--cross-fit")[0] == 0
    refined = json.loads((small / "out" / "scores.json").read_text())
    assert set(refined["loss"]["refined"]) == set(TASKS)
    answers_add_up_to(refined, small / "out", "enmp", "refined")
    assert (small / "out" / "refined" / "adapter_model.safetensors").exists()
    recipe = yaml.safe_load((small / "out" / "refined" / RECIPE).read_text())
    assert recipe["refined"]["cross_fit"] is True and recipe["refined"]["steps"] == 3


def test_what_was_found_is_compared_with_controls(small, capsys):
    """Completions have intervals of their likelihoods, and rows of several models keep each of them."""
    loaded_run(small, search=", fitness: log_likelihood", strategy="gradient")
    assert enmp(capsys, "search", small / "run.yaml", "--out", small / "out")[0] == 0
    chosen = ["random", "first_order", "greedy", "transfer"]
    command = "controls", small / "out", "--seeds", 2, "--rows", *chosen
    code, printed, errors = enmp(capsys, *command)
    assert code == 0, errors
    assert "What was found is" in printed and "of 20 random masks are as good" in printed
    found = json.loads((small / "out" / "controls.json").read_text())
    scores = json.loads((small / "out" / "scores.json").read_text())
    rows = {row["row"]: row for row in found["rows"]}
    assert {"plain", "found", "random masks", "first order", "greedy", "transfer to ties"} <= set(rows)
    for name, model in (("plain", "merged"), ("found", "enmp")):
        assert rows[name]["scores"] == pytest.approx(scores[model], rel=1e-5)
    gains = {name: row["gain"] for name, row in rows.items() if "gain" in row}
    assert gains["found"]["difference"] == pytest.approx(scores["interval"]["enmp"]["difference"], abs=1e-6)
    random = rows["random masks"]
    assert len(random["values"]) == 20 and np.std(random["values"]) > 0
    known = np.mean(random["values"]) - rows["plain"]["values"][0]
    assert gains["random masks"]["difference"] == pytest.approx(known, abs=1e-5)
    own = rows["transfer to ties"]
    assert own["gain"]["difference"] == pytest.approx(own["mean_normalised"] - own["plain"], abs=1e-5)
    assert not any("examples" in row or "baseline" in row for row in rows.values())
    assert enmp(capsys, *command)[0] == 0
    assert json.loads((small / "out" / "controls.json").read_text()) == found


def test_training_lowers_the_loss_and_reloads(small, capsys):
    """Two tasks in one compiled step; what is saved scores as an expert that beats the base by far."""
    shutil.rmtree(small / "experts")
    loaded_run(small, train=", epochs: 5, learning_rate: 0.03, rank: 4, gradient_checkpointing: true")
    text = (small / "run.yaml").read_text().replace("experts/", "out/adapters/")
    (small / "run.yaml").write_text(text.replace("search: search", "search: train"))
    code, said, errors = enmp(capsys, "train", small / "run.yaml", "--out", small / "out")
    assert code == 0, errors
    assert [f"step {n} of 30" in said for n in (10, 20, 30)] == [True] * 3  # steps are slow: heard of soon
    record = json.loads((small / "out" / "training.json").read_text())
    assert record["say"]["steps"] == 30 and record["pick"]["examples"] == 24  # 5 * 24 / 4
    config = json.loads((small / "out" / "adapters" / "pick" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and config["r"] == 4 and not config["modules_to_save"]
    result = evaluate_run(run_file.load(small / "run.yaml"), "search", None, 1.0, False, SILENT)
    assert result["loss"]["reference"]["say"] < result["loss"]["base"]["say"] - 1
    assert result["loss"]["reference"]["pick"] < result["loss"]["base"]["pick"]


def test_checkpointed_layers_have_the_same_gradient(root):
    ids = jnp.asarray([[0, 30, 31, 32], [0, 40, 41, 0]])
    inputs = {
        "input_ids": ids, "attention_mask": jnp.asarray([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "target_ids": jnp.asarray([[31, 32], [41, 0]]), "target_from": jnp.asarray([[1, 2], [1, 0]]),
        "target_branch": jnp.asarray([[1, 1], [1, 0]]),
    }  # fmt: skip
    found = []
    for remat in (False, True):
        backbone, params = models.load(root / "base", gradient_checkpointing=remat)
        loss = lambda p, b=backbone: answer_loss(b, p, inputs, {})  # noqa: E731
        found.append(jax.value_and_grad(loss)(params))
        text = str(jax.make_jaxpr(jax.grad(loss))(params))
        assert ("prevent_cse=False" in text) == remat
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def refused(root, capsys, *change, command="evaluate", out=()):
    text = (root / "run.yaml").read_text()
    for old, new in change:
        assert old in text
        text = text.replace(old, new)
    (root / "bad.yaml").write_text(text)
    before = sorted(root.rglob("*"))
    code, _, errors = enmp(capsys, command, root / "bad.yaml", *out)
    assert code == 2 and errors.count("\n") <= 2, errors
    assert sorted(root.rglob("*")) == before
    return " ".join(errors.split())


def test_bad_runs_are_one_line_and_write_nothing(small, capsys):
    loaded_run(small)
    out = ("--out", small / "out")
    search = {"command": "search", "out": out}
    racing = refused(small, capsys, ("finalists: 2", "finalists: 2, fidelity: racing"), **search)
    assert "racing compares examples, and completions are scored by the token" in racing
    head = refused(small, capsys, ("name: say,", "name: say, head: {source: base},"), **search)
    assert "tasks.say.head: a generative task has no head" in head
    metrics = refused(small, capsys, ("name: pick,", "name: pick, metrics: [chrf],"), **search)
    assert "tasks.pick.metrics: nothing is generated in a choice task" in metrics
    source = refused(small, capsys, ("name: say,", "name: say, kind: choice,"), **search)
    assert "choices must be a list of two or more strings" in source
    config = json.loads((small / "base" / "config.json").read_text())
    classifier = config | {"architectures": ["LlamaForSequenceClassification"]}
    (small / "base" / "config.json").write_text(json.dumps(classifier))
    for command in ("search", "train"):
        errors = refused(small, capsys, command=command, out=out)
        assert (
            "tasks.say is a completion task, and the base model base (llama) has no language-model" in errors
        )


def test_adapters_that_change_what_tasks_share_are_refused(small, capsys):
    loaded_run(small)
    config = small / "experts" / "say" / "adapter_config.json"
    settings = json.loads(config.read_text())
    tensors = load_file(small / "experts" / "say" / "adapter_model.safetensors")
    for module, message in (
        ("lm_head", "the adapter of 'say' saved lm_head of its own, and generative tasks share"),
        ("model.embed_tokens", "embed"),
    ):
        config.write_text(json.dumps(settings | {"modules_to_save": [module.rsplit(".", 1)[-1]]}))
        head = {f"base_model.model.{module}.weight": np.zeros((4, 16), np.float32)}
        save_file(tensors | head, small / "experts" / "say" / "adapter_model.safetensors")
        assert message in refused(small, capsys, command="search", out=("--out", small / "out"))
