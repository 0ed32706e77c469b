"""The command line end to end: what it prints, exit codes, and that bad input leaves nothing behind."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file, save_file

from enmp_jax.cli import main as cli
from enmp_jax.config import run_file


@pytest.fixture
def suite(tmp_path):
    """A small run file of its own beside copies of the demo's files."""
    shutil.copytree(run_file.SUITES / "demo", tmp_path / "demo")
    data = yaml.safe_load((run_file.SUITES / "demo.yaml").read_text())
    data["tasks"] = data["tasks"][:2]
    data["search"] = {"population": 4, "generations": 2, "sigma0": 1.0}
    data["evaluation"] = {
        "batch_size": 20,
        "search_examples": 10,
        "selection_examples": 8,
        "test_examples": 9,
    }
    data["merge"] = {"method": "ties", "density": 0.4, "scale": 0.5}
    del data["pretrain"]
    return tmp_path, data


def enmp(tmp_path, data, *arguments):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(data))
    return cli.main([str(x) for x in arguments])


def test_search_prints_the_table_and_writes_the_directory(suite, capsys):
    tmp_path, data = suite
    out = tmp_path / "out"
    assert enmp(tmp_path, data, "search", tmp_path / "run.yaml", "--out", out) == 0
    printed = capsys.readouterr().out
    for word in ("digit", "mirrored", "merged + ENMP", "8 masks evaluated", "masks per second", str(out)):
        assert word in printed, word
    assert json.loads((out / "scores.json").read_text())["masks_evaluated"] == 8

    # and on: evaluate the mask, write the report again, refuse the directory, go on with it
    assert cli.main(["evaluate", str(tmp_path / "run.yaml"), "--mask", str(out / "mask.json"), "--json"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text[text.index("{") :])["enmp"].keys() == {"digit", "mirrored"}
    assert cli.main(["report", str(out)]) == 0
    capsys.readouterr()
    assert enmp(tmp_path, data, "search", tmp_path / "run.yaml", "--out", out) == 2
    assert "is not empty" in capsys.readouterr().err
    assert enmp(tmp_path, data, "search", tmp_path / "run.yaml", "--out", out, "--resume") == 0


def no_adapter(tmp_path, data):
    data["tasks"][1]["adapter"] = "demo/adapters/none"


def other_base(tmp_path, data):
    """An adapter of another architecture: none of its modules is in the base."""
    path = tmp_path / "demo/adapters/mirrored/adapter_model.safetensors"
    tensors = load_file(path)
    save_file(
        {k.replace("vit.layers", "model.blocks"): np.ascontiguousarray(v) for k, v in tensors.items()}, path
    )


def partly_other_base(tmp_path, data):
    path = tmp_path / "demo/adapters/mirrored/adapter_model.safetensors"
    tensors = load_file(path)
    renamed = {k.replace("q_proj", "queries"): np.ascontiguousarray(v) for k, v in tensors.items()}
    save_file(renamed, path)
    settings = path.with_name("adapter_config.json")
    settings.write_text(settings.read_text().replace("q_proj", "queries"))


def nan(tmp_path, data):
    path = tmp_path / "demo/adapters/mirrored/adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(k for k in tensors if "lora_A" in k)[0]
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, path)


def overlap(tmp_path, data):
    data["tasks"][0]["data"]["test"] = "search"


def labels(tmp_path, data):
    data["tasks"][0]["data"]["labels"] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12]


def empty_split(tmp_path, data):
    data["tasks"][0]["data"]["selection"] = "selection[:0]"


def leaking_content(tmp_path, data):
    """Another row, but the same image."""
    arrays = dict(np.load(tmp_path / "demo/digits.npz"))
    rows = [np.flatnonzero(arrays["split"] == name)[0] for name in ("selection", "search")]
    arrays["image"][rows[0]] = arrays["image"][rows[1]]
    np.savez(tmp_path / "demo/leak.npz", **arrays)
    data["tasks"] = data["tasks"][:1]
    data["tasks"][0]["data"]["source"] = "npz:demo/leak.npz"
    data["evaluation"] = {"batch_size": 20}


def no_names(tmp_path, data):
    for task in data["tasks"]:
        task["head"] = {"source": "zero-shot", "templates": ["a photo of a {}."]}


def image_folder(tmp_path, data, bad=1):
    """The second task reads PNG files, of which some do not decode."""
    arrays = np.load(tmp_path / "demo/digits.npz")
    for split in ("search", "selection", "test"):
        for i, image in enumerate(arrays["image"][arrays["split"] == split][:20]):
            path = tmp_path / f"images/{split}/{i % 10}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.squeeze(image)).save(path)
    for i in range(bad):
        (tmp_path / f"images/search/{i}/{i}.png").write_text("no image")
    splits = {"search": "search", "selection": "selection", "test": "test"}
    data["tasks"][1]["data"] = {"source": "folder:images", **splits}
    data["evaluation"] = {"batch_size": 20}


def no_data(tmp_path, data):
    data["tasks"][0]["data"]["source"] = "npz:nowhere.npz"


def no_base(tmp_path, data):
    data["base"]["model"] = "./nowhere"


def setting(section, key, value):
    def apply(tmp_path, data):
        data[section][key] = value

    return apply


BAD = {
    "misspelt key": (setting("search", "populaton", 4), "did you mean 'population'"),
    "population 0": (setting("search", "population", 0), "search.population is 0"),
    "max_pruned": (setting("search", "max_pruned", -0.1), "must lie in 0..1"),
    "strategy": (setting("search", "strategy", "cmaes"), "did you mean 'cma_es'"),
    "method": (setting("merge", "method", "tiess"), "ties"),
    "hyperparameter": (setting("merge", "clusters", 3), "clusters"),
    "density": (setting("merge", "density", 0.0), "density"),
    "mesh": (setting("evaluation", "mesh", {"population": 64}), "needs 64 devices"),
    "mesh axis": (setting("evaluation", "mesh", {"members": 1}), "unknown axis 'members'"),
    "missing adapter": (no_adapter, "demo/adapters/none"),
    "adapter of another base": (other_base, "0 of 24"),
    "adapter that fits in part": (partly_other_base, "18 of 24"),
    "NaN in weights": (nan, "lora_A"),
    "splits that overlap": (overlap, "search"),
    "labels the head lacks": (labels, "label 12"),
    "an empty split": (empty_split, "selection[:0]"),
    "content that two splits share": (leaking_content, "selection"),
    "no class names": (no_names, "class names"),
    "images that do not decode": (image_folder, "does not decode"),
    "missing data": (no_data, "nowhere.npz"),
    "missing base": (no_base, "nowhere"),
    "two tasks of one name": (lambda t, d: d["tasks"][1].update(name="digit"), "two tasks are named 'digit'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_exit_code_2_and_nothing_on_disk(case, suite, capsys):
    tmp_path, data = suite
    apply, message = BAD[case]
    apply(tmp_path, data)
    assert enmp(tmp_path, data, "search", tmp_path / "run.yaml", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_bad_images_can_be_left_out(suite, capsys):
    tmp_path, data = suite
    image_folder(tmp_path, data, bad=2)
    assert enmp(tmp_path, data, "search", tmp_path / "run.yaml", "--out", tmp_path / "out", "--skip-bad") == 0
    assert "mirrored, search: 2 images did not decode and were left out" in capsys.readouterr().out


def test_modules_that_do_not_match_show_examples_of_both_sides(suite, capsys):
    tmp_path, data = suite
    other_base(tmp_path, data)
    enmp(tmp_path, data, "search", tmp_path / "run.yaml", "--out", tmp_path / "out")
    error = capsys.readouterr().err
    assert error.count("model.blocks") >= 2 and error.count("vit.layers") >= 2


def test_overview_and_unknown_commands(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    assert cli.main(["serach"]) == 2
    assert "did you mean 'search'" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0 and f"enmp {name}" in capsys.readouterr().out


def test_help_imports_no_jax():
    code = "import sys, enmp_jax.cli.main as c; c.main(['--help']); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
