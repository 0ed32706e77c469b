"""What a search hands over: exact, or scored itself; and ``enmp export``."""

import dataclasses
import json
import re
import shlex

import numpy as np
import pytest
import yaml

from enmp_jax.adapters.peft_import import read_adapter
from enmp_jax.cli import main as cli
from enmp_jax.config.run_file import SUITES
from enmp_jax.config.sections import ExportConfig
from enmp_jax.io.progress import SILENT
from enmp_jax.io.reading import open_tensors
from enmp_jax.runs.search import search_run


def searched(demo_run, out, **export):
    """A search of which nothing matters but what it exports."""
    search = dataclasses.replace(demo_run.search, generations=1, finalists=2)
    run = dataclasses.replace(demo_run, search=search, export=ExportConfig(**export))
    return search_run(run, out, SILENT)


@pytest.fixture(scope="module")
def capped(demo_run, tmp_path_factory):
    """TIES in full space, cut to rank 2: an adapter that is not the model that was scored."""
    out = tmp_path_factory.mktemp("runs") / "capped"
    return out, searched(demo_run, out, rank=2, formats=("adapters", "peft", "delta"))


def delta_error(directory, delta):
    """Relative error of an adapter against a ``delta.safetensors``."""
    modules, lost, whole = read_adapter(directory).modules, 0.0, 0.0
    with open_tensors(delta) as handle:
        for key in handle.keys():  # noqa: SIM118
            wanted = handle.get_tensor(key).astype(np.float64)
            a, b = modules[key.removesuffix(".weight")]
            lost, whole = lost + np.sum((wanted - b.astype(float) @ a) ** 2), whole + np.sum(wanted**2)
    return np.sqrt(lost / whole)


def test_an_adapter_that_misses_the_tolerance_has_scores_of_its_own(capped, demo_evaluator):
    out, scores = capped
    own = scores["exported"]["merged"]
    assert own["rank"] == 2 and own["error"] > 0.05
    assert own["error"] == pytest.approx(
        delta_error(out / "merged", out / "delta/delta.safetensors"), rel=1e-3
    )
    assert json.loads((out / "scores.json").read_text())["exported"] == scores["exported"]
    card = (out / "merged" / "README.md").read_text()
    assert f"these files, error {own['error']:.1%}" in card
    for task, accuracy in own["accuracy"].items():
        assert re.search(rf"\| {task} \|.*\| {scores['enmp'][task]:.4f} \| {accuracy:.4f} \|", card)
    assert "these files" not in (out / "adapters" / "README.md").read_text()


def test_the_scores_of_an_export_are_those_of_its_files(capped, demo_evaluator):
    """Scored again from the adapter on the disk, as a merge of one adapter."""
    from enmp_jax.adapters.peft_import import load_adapters
    from enmp_jax.deltas import LowRank

    out, scores = capped
    backbone = demo_evaluator.loaded.backbone
    loaded = load_adapters({"all": out / "merged"}, backbone.canonical, n_layers=backbone.n_layers)
    deltas = {name: LowRank(pair.b[:, 0], pair.a[:, 0], None) for name, pair in loaded.stack.pairs.items()}
    counts = demo_evaluator.score_deltas(demo_evaluator.inputs("test"), deltas)
    accuracy = np.asarray(demo_evaluator.scoring("test").accuracy(counts))
    assert scores["exported"]["merged"]["accuracy"] == pytest.approx(
        dict(zip(demo_evaluator.loaded.tasks, accuracy.tolist(), strict=True))
    )


def test_exact_exports_have_no_scores_of_their_own(demo_run, tmp_path):
    scores = searched(demo_run, tmp_path / "run")  # dense: the rank follows the tolerance
    assert "exported" not in scores
    searched(demo_run, tmp_path / "delta", formats=("delta",))
    error = delta_error(tmp_path / "run" / "merged", tmp_path / "delta/delta/delta.safetensors")
    assert error <= 0.01


def enmp(*words, code=0):
    assert cli.main([str(word) for word in words]) == code


def files(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_export_makes_again_what_the_search_wrote(capped, tmp_path, capfd):
    out, _ = capped
    for kind, folder in (("adapters", "adapters"), ("delta", "delta"), ("peft", "merged")):
        enmp("export", out, "--format", kind, "--out", tmp_path / folder)
        assert files(tmp_path / folder) == files(out / folder)
    printed = capfd.readouterr()
    assert "scoring it on the test split" in printed.out + printed.err


def test_the_commands_in_cards_run_as_printed(capped, tmp_path, monkeypatch, capfd):
    """Where the card says: beside the run directory."""
    out, _ = capped
    monkeypatch.chdir(out.parent)
    for folder in ("adapters", "merged", "delta"):
        card = out / folder / ("enmp_config.yaml" if folder == "delta" else "README.md")
        text = card.read_text()
        assert "beside the run directory capped" in text
        words = shlex.split(re.findall(r"enmp export .*", text)[0])
        words[words.index("DIR")] = str(tmp_path / folder)
        enmp(*words[1:])
        assert files(tmp_path / folder) == files(out / folder)
    capfd.readouterr()


def test_other_settings_and_formats_of_a_finished_run(capped, tmp_path, capfd):
    out, scores = capped
    enmp("export", out, "--format", "peft", "--rank", 200, "--out", tmp_path / "exact")
    assert delta_error(tmp_path / "exact", out / "delta/delta.safetensors") <= 0.01
    assert "these files" not in (tmp_path / "exact" / "README.md").read_text()
    enmp("export", out, "--format", "checkpoint", "--dtype", "bfloat16", "--out", tmp_path / "model")
    assert "## Verified" in (tmp_path / "model" / "README.md").read_text()
    with (
        open_tensors(tmp_path / "model/model.safetensors") as ours,
        open_tensors(SUITES / "demo/base/model.safetensors") as base,
    ):
        assert set(ours.keys()) == set(base.keys())
    assert json.loads((out / "scores.json").read_text()) == scores  # written elsewhere: the run as it was


def test_bad_exports_are_one_line_and_write_nothing(capped, tmp_path, capfd):
    out, _ = capped
    target = tmp_path / "out"
    cases = {
        ("export", tmp_path, "--format", "peft"): "no directory of a finished search",
        ("export", out, "--format", "peft"): "already there",
        ("export", out, "--format", "peft", "--rank", 0, "--out", target): "at least 1",
        ("export", out, "--format", "peft", "--tolerance", "1e-9", "--out", target): "no rank meets it",
        ("export", out, "--format", "peft", "--strict", "--out", target): "tolerance is 0.01",
        ("export", out, "--format", "checkpoint", "--base-model", tmp_path, "--out", target): "config.json",
    }
    for words, message in cases.items():
        enmp(*words, code=2)
        (line,) = capfd.readouterr().err.splitlines()
        assert message in line, line
    assert not target.exists()


def test_a_mask_of_another_merge_is_refused(demo_run, tmp_path, capfd):
    searched(demo_run, tmp_path / "run", formats=("adapters",))
    path = tmp_path / "run" / "mask.json"
    mask = json.loads(path.read_text())
    mask["merge"]["density"] = 0.7
    path.write_text(json.dumps(mask))
    enmp("export", tmp_path / "run", "--format", "delta", code=2)
    (line,) = capfd.readouterr().err.splitlines()
    assert "density 0.7" in line and "density 0.4" in line and not (tmp_path / "run" / "delta").exists()


def test_every_export_says_what_was_verified(capped):
    out, _ = capped
    for card in (out / "merged", out / "adapters" / "digit"):
        text = (card / "README.md").read_text()
        assert "| modules | ok |" in text and "| vLLM: rank | ok |" in text and "| weights | ok |" in text
    config = yaml.safe_load((out / "merged" / "enmp_config.yaml").read_text())
    assert config["options"] == {"rank": 2} and config["exported"]["rank"] == 2


def test_a_mask_of_other_adapters_is_refused_unless_told_otherwise(capped, tmp_path, monkeypatch, capfd):
    """A pruned adapter of the run has its weights folded in already: the mask must not meet it again."""
    out, _ = capped
    monkeypatch.chdir(SUITES / "demo" / "adapters")
    tasks = json.loads((out / "mask.json").read_text())["tasks"]
    words = ["merge", "--mask", str(out / "mask.json"), "--out", str(tmp_path / "out")]
    own = [word for task in tasks for word in ("--adapter", f"{task}={task}")]
    other = [*own[:-1], f"{tasks[-1]}={tasks[0]}"]
    enmp(*words, *other, code=2)
    (line,) = capfd.readouterr().err.splitlines()
    assert f"another adapter of task {tasks[-1]!r}" in line and not (tmp_path / "out").exists()
    enmp(*words, *other, "--allow-other-adapters")
    enmp(*words[:-1], tmp_path / "own", *own)
    ours, theirs = (tmp_path / "own/delta.safetensors", out / "delta/delta.safetensors")
    with open_tensors(ours) as x, open_tensors(theirs) as y:
        assert all(np.array_equal(x.get_tensor(key), y.get_tensor(key)) for key in x.keys())  # noqa: SIM118


def test_everything_that_a_run_holds_is_verified(capped, capfd):
    out, _ = capped
    enmp("verify", out)
    printed = capfd.readouterr().out
    assert [f"({kind} export)" in printed for kind in ("adapters", "delta", "peft")] == [True] * 3
    assert "PEFT" in printed and "NOT  weights" not in printed
