"""Model cards and recipes of exports, the command that repeats them, and ``enmp inspect``."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import yaml
from adapter_files import PRUNED, RECIPE, TASKS, make, make_base, merged

from enmp_jax.adapters import load_adapters, read_adapter, save_adapter
from enmp_jax.adapters.hf_export import export_checkpoint
from enmp_jax.adapters.peft_export import export_adapters, export_peft
from enmp_jax.adapters.recipe import Recipe
from enmp_jax.cli import main as cli
from enmp_jax.cli.inspect import inspect
from enmp_jax.errors import UserError


def export_all(loaded, keep, tmp_path):
    make_base(tmp_path / "base")
    deltas = merged(loaded, keep)
    export_adapters(tmp_path / "adapters", loaded, keep, RECIPE)
    export_peft(tmp_path / "peft", loaded, deltas, RECIPE, rank=2)
    export_checkpoint(tmp_path / "checkpoint", loaded, deltas, tmp_path / "base", RECIPE, dtype="bfloat16")
    return [tmp_path / name for name in ("adapters", "adapters/cars", "peft", "checkpoint")]


def test_cards_have_hub_metadata_and_no_local_path(loaded, keep, tmp_path):
    relations = {"adapters": "adapter", "cars": "adapter", "peft": "adapter", "checkpoint": "merge"}
    for directory in export_all(loaded, keep, tmp_path):
        text = (directory / "README.md").read_text()
        _, metadata, body = text.split("---\n", 2)
        data = yaml.safe_load(metadata)
        assert data["base_model"] == "org/base"
        assert data["base_model_relation"] == relations[directory.name]
        assert {"lora", "merge", "enmp"} <= set(data["tags"])
        assert data["library_name"] == ("transformers" if directory.name == "checkpoint" else "peft")
        assert "| cars | 0.8000 | 0.6000 |" in body and "Seed of the search: 7" in body and "jax " in body
        assert "- layer 0, cars" in body and ("- layer 1, dtd" in body) == (directory.name != "cars")
        for file in (*directory.glob("*.md"), *directory.glob("*.yaml"), *directory.glob("*.json")):
            assert "secret-user" not in file.read_text() and str(tmp_path) not in file.read_text()


def test_cards_of_a_search_that_prunes_nothing_claim_nothing(loaded, keep, tmp_path):
    assert RECIPE.scores
    same = dict(RECIPE.scores) | {"enmp": RECIPE.scores["merged"]}
    some = dataclasses.replace(RECIPE, scores=same | {"enmp": {"cars": 0.7, "dtd": 0.4}})
    nothing = dataclasses.replace(RECIPE, scores=same, pruned=())
    for recipe, mask in ((some, keep), (nothing, np.ones_like(keep))):
        out, pruned = tmp_path / f"pruned-{len(recipe.pruned)}", bool(recipe.pruned)
        export_adapters(out / "adapters", loaded, mask, recipe)
        export_peft(out / "peft", loaded, merged(loaded, mask), recipe, rank=2)
        for card in out.rglob("README.md"):
            text, adapters = card.read_text(), card.parent.name != "peft"
            assert ("negative modules removed" in text) == (pruned and adapters)
            assert ("# Pruned LoRA" in text) == (pruned and adapters)
            assert ("with nothing pruned" in text) == (not pruned and adapters)
            assert ("| merged, nothing pruned | merged, pruned |" in text) == pruned
            assert "| merged, nothing pruned |" in text


def test_config_repeats_the_merge(loaded, keep, tmp_path):
    for directory in export_all(loaded, keep, tmp_path):
        if (directory / "enmp_config.yaml").exists():
            text = (directory / "enmp_config.yaml").read_text()
            data = yaml.safe_load(text)
            assert data["format"] == directory.name and data["seed"] == 7
            assert data["merge"] == dict(RECIPE.merge) and data["pruned"] == [list(p) for p in PRUNED]
            assert [t["name"] for t in data["tasks"]] == list(TASKS)
            assert all(len(t["sha256"]) == 64 for t in data["tasks"])
            assert "enmp merge --adapter cars=cars --adapter dtd=dtd --method ties" in text
            assert "--isotropize " in text and "--prune 0:cars --prune 1:dtd" in text
    assert yaml.safe_load((tmp_path / "peft" / "enmp_config.yaml").read_text())["options"] == {"rank": 2}


def test_a_local_base_is_not_named_as_a_hub_model(tmp_path):
    make(tmp_path / "a", 0)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "private" / "llama")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    loaded = load_adapters({"a": tmp_path / "a"})
    export_adapters(tmp_path / "out", loaded, np.ones((3, 1), bool), Recipe())
    for card in (tmp_path / "out" / "README.md", tmp_path / "out" / "a" / "README.md"):
        assert "base_model" not in card.read_text() and "private" not in card.read_text()


def test_names_are_text_in_cards(tmp_path):
    """Markdown in the name of a task is shown, not rendered."""
    name = "[free](x) `code` #1 &lt; __bold__"
    make(tmp_path / "a", 0)
    loaded = load_adapters({name: tmp_path / "a"})
    keep = np.ones((3, 1), bool)
    keep[1] = False
    export_adapters(tmp_path / "out", loaded, keep, Recipe(pruned=((1, name),)))
    for card in (tmp_path / "out" / "README.md", tmp_path / "out" / name / "README.md"):
        body = card.read_text().split("---\n", 2)[2]
        body = body.partition("enmp merge")[0]  # a command in a block of code is as it is typed
        assert r"\[free\](x) \`code\` \#1 \&lt; \_\_bold\_\_" in body and "[free](x)" not in body


def test_a_directory_in_use_is_refused_untouched(loaded, keep, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    make_base(tmp_path / "base")
    deltas = merged(loaded, keep)
    for export in (
        lambda: export_adapters(tmp_path / "out", loaded, keep, RECIPE),
        lambda: export_peft(tmp_path / "out", loaded, deltas, RECIPE),
        lambda: export_checkpoint(tmp_path / "out", loaded, deltas, tmp_path / "base", RECIPE),
    ):
        with pytest.raises(UserError, match="already there"):
            export()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("task", ["../x", "a/b", ".hidden", "", "x" * 300])
def test_task_names_that_are_no_file_names(tmp_path, task):
    make(tmp_path / "a", 0)
    loaded = load_adapters({task: tmp_path / "a"})
    with pytest.raises(UserError, match="task name"):
        export_adapters(tmp_path / "out", loaded, np.ones((3, 1), bool), Recipe())
    assert {p.name for p in tmp_path.iterdir()} == {"a"}


def test_inspect_describes_and_reports_what_is_refused(loaded, tmp_path, capfd):
    cars, broken = tmp_path / "secret-user" / "cars", tmp_path / "broken"
    shutil.copytree(cars, broken)
    (broken / "adapter_model.safetensors").write_bytes(b"junk")
    report = inspect([str(cars), str(broken)])
    good, bad = report["adapters"]
    assert good["n_modules"] == 6 and good["rank"] == 2 and good["alpha"] == 4 and good["refused"] is None
    assert good["projections"]["model.layers.{}.mlp.up_proj"] == {
        "layers": [0, 1, 2], "shape": [9, 6], "ranks": [2], "scalings": [2.0], "dtype": "float32",
        "kind": "linear",
    }  # fmt: skip
    assert good["heads"] == {"score.weight": [2, 6]}
    modules = loaded.adapters["cars"].modules
    norm = np.sqrt(sum(np.sum((b @ a) ** 2) for path, (a, b) in modules.items() if ".1." in path))
    assert good["norms"]["1"] == pytest.approx(float(norm), rel=1e-6)
    assert "not a valid safetensors" in bad["refused"]

    assert cli.main(["inspect", "--json", str(cars)]) == 0
    assert json.loads(capfd.readouterr().out)["adapters"] == [good]
    assert cli.main(["inspect", str(cars), str(broken)]) == 2
    out, err = capfd.readouterr()
    assert (
        "layers 0-2, rank 2, scaling 2, float32" in out and "refused:" in out and len(err.splitlines()) == 1
    )


def test_inspect_says_when_adapters_do_not_belong_together(tmp_path):
    make(tmp_path / "a", 0)
    save_adapter(tmp_path / "b", read_adapter(tmp_path / "a").modules, 2, 2, "org/other")
    assert "org/other" in inspect([str(tmp_path / "a"), str(tmp_path / "b")])["together"]
    assert inspect([str(tmp_path / "a")])["together"] is None


def test_the_recorded_command_repeats_the_files(loaded, tmp_path, monkeypatch, capfd):
    """Run ``enmp merge``, then the command line that it recorded, and compare every file."""
    import re
    import shlex

    make_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path / "secret-user")
    shutil.copytree(tmp_path / "base", "base")
    prune = ["--prune", "0:model.layers.{}.mlp.up_proj:cars", "--prune", "1:q_proj:dtd"]
    extra = {
        "adapters": [],
        "peft": ["--rank", "3"],
        "checkpoint": ["--base-model", "base", "--dtype", "bfloat16"],
    }
    for kind, options in extra.items():
        words = [
            "merge",
            "--adapter",
            "cars=cars",
            "--adapter",
            "dtd=dtd",
            "--method",
            "ties",
            "--density",
            "0.4",
        ]
        first = tmp_path / f"{kind}-1"
        assert cli.main([*words, *options, *prune, "--format", kind, "--out", str(first)]) == 0
        recorded = re.search(r"# +(enmp merge .*)", (first / "enmp_config.yaml").read_text())
        assert recorded
        again = [str(tmp_path / f"{kind}-2") if word == "DIR" else word for word in shlex.split(recorded[1])]
        assert cli.main(again[1:]) == 0
        files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
        assert len(files) > 3
        for file in files:
            assert (first / file).read_bytes() == (tmp_path / f"{kind}-2" / file).read_bytes(), file
    capfd.readouterr()


def test_files_can_be_read_by_others(loaded, keep, tmp_path):
    import os

    old = os.umask(0o022)
    try:
        export_adapters(tmp_path / "out", loaded, keep, RECIPE)
    finally:
        os.umask(old)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").rglob("*") if p.is_file()} == {0o644}
