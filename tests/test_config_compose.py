"""Run files made of others: ``extends`` and ``--set``."""

import shutil

import pytest
import yaml

from enmp_jax.cli import main as cli
from enmp_jax.cli.run_option import load_run_file
from enmp_jax.config import run_file
from enmp_jax.config.schema import to_dict
from enmp_jax.errors import UserError

PARENT = {
    "base": {"model": "org/model", "dtype": "bfloat16"},
    "tasks": [
        {"name": "a", "adapter": "x/a", "data": {"source": "npz:a.npz"}},
        {"name": "b", "adapter": "x/b", "data": {"source": "npz:b.npz"}},
    ],
    "merge": {"method": "dare_ties", "density": 0.3, "drop_rate": 0.5, "scale": 0.7, "space": "core"},
    "search": {"population": 4, "generations": 5},
    "evaluation": {"mesh": {"population": 1, "data": 2}},
}


@pytest.fixture
def files(tmp_path):
    def write(name, data):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
        return str(path)

    write("parent.yaml", PARENT)
    return write


def test_sections_are_put_together_key_by_key(files):
    child = {
        "extends": "parent.yaml",
        "search": {"population": 8},
        "tasks": PARENT["tasks"][1:],
        "evaluation": {"mesh": {"data": 4}},
    }
    run = run_file.load(files("child.yaml", child))
    assert (run.search.population, run.search.generations, run.base.dtype) == (8, 5, "bfloat16")
    assert [task.name for task in run.tasks] == ["b"]  # lists are replaced
    assert run.evaluation.mesh == {"population": 1, "data": 4}
    assert run.merge.hyperparameters == {"density": 0.3, "drop_rate": 0.5}
    assert "extends" not in to_dict(run)


@pytest.mark.parametrize(
    ("section", "hyperparameters"),
    [
        ({"method": "cart", "coefficient": 0.2}, {"coefficient": 0.2}),
        ({"method": "tsv"}, {}),
        ({"method": "dare_ties"}, {}),  # named again: its own defaults
        ({"density": 0.1}, {"density": 0.1, "drop_rate": 0.5}),
    ],
)
def test_a_method_brings_its_own_hyperparameters(files, section, hyperparameters):
    merge = run_file.load(files("child.yaml", {"extends": "parent.yaml", "merge": section})).merge
    assert merge.hyperparameters == hyperparameters
    assert merge.method == section.get("method", "dare_ties")
    assert (merge.scale, merge.space) == (0.7, "core")  # what every method takes stays


def test_packaged_run_files_can_be_extended(files, tmp_path):
    path = files("sub/child.yaml", {"extends": "demo", "search": {"seeds": 1}})
    run, demo = run_file.load(path), run_file.load("demo")
    assert run.search.seeds == 1 and run.search.generations == demo.search.generations
    assert run.base.model == "package:demo/base" and run.path(run.base.model) == demo.path(demo.base.model)
    assert run.tasks[0].data.source == "npz:package:demo/digits.npz"
    assert run.tasks[0].head.source == "adapter" and run.root == (tmp_path / "sub").resolve()
    knots = run_file.load(files("k.yaml", {"extends": "knots-vit-b-32-ties", "merge": {"density": 0.1}}))
    assert (knots.merge.method, knots.merge.scale, knots.merge.hyperparameters) == (
        "ties",
        0.3,
        {"density": 0.1},
    )
    assert knots.base.model == "openai/clip-vit-base-patch32"


def test_paths_mean_what_they_meant_in_the_file_that_they_stand_in(files, tmp_path):
    for name in ("shared/base", "shared/a", "shared/hf", "shared/mnist", "shared/adapter"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "shared/a.npz").touch()
    parent = {
        "base": {"model": "base"},
        "tasks": [
            {"name": "a", "adapter": "a", "data": {"source": "npz:a.npz", "data_dir": "./data"}},
            {"name": "b", "adapter": "org/b@main", "data": {"source": "hf:hf:plain@1"}},
            {"name": "c", "adapter": "package:demo/adapters/digit", "data": {"source": "tfds:mnist"}},
            {"name": "d", "adapter": str(tmp_path / "shared/a"), "data": {"source": "folder:~/x"}},
        ],
    }
    files("shared/parent.yaml", parent)
    files("runs/middle.yaml", {"extends": "../shared/parent.yaml"})
    run = run_file.load(files("child.yaml", {"extends": "runs/middle.yaml"}))
    assert run.base.model == "./shared/base"
    assert run.path(run.base.model) == str((tmp_path / "shared/base").resolve())
    assert [task.adapter for task in run.tasks] == [
        "./shared/a", "org/b@main", "package:demo/adapters/digit", str(tmp_path / "shared/a"),
    ]  # fmt: skip
    assert [task.data.source for task in run.tasks] == [
        "npz:./shared/a.npz", "hf:./shared/hf:plain@1", "tfds:mnist", "folder:~/x",
    ]  # fmt: skip
    assert run.tasks[0].data.data_dir == "./shared/data"
    assert {task.head.source for task in run.tasks} == {"adapter"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"extends": "child.yaml"}, "in a circle: child.yaml -> child.yaml"),
        ({"extends": "loop.yaml"}, "in a circle: child.yaml -> loop.yaml -> child.yaml"),
        ({"extends": "none.yaml"}, "none.yaml: no such file"),
        ({"extends": "vision-smal"}, "did you mean 'vision-small'?"),
        ({"extends": ["parent.yaml"]}, "the name or path of one run file"),
        ({"extends": "list.yaml"}, "list.yaml must be a mapping"),
        ({"extends": "parent.yaml", "serch": {}}, "did you mean 'search'?"),
        ({"extends": "parent.yaml", "search": {"populaton": 1}}, "did you mean 'population'?"),
        ("extends: parent.yaml\nmerge:\n  scale: 1\n  scale: 2\n", "'scale' is given twice (line 4)"),
        ("search: {population: 1}\nsearch: {generations: 1}\n", "'search' is given twice (line 2)"),
    ],
)
def test_what_cannot_be_extended_is_one_line(files, content, message):
    files("loop.yaml", {"extends": "child.yaml"})
    files("list.yaml", "- a\n")
    with pytest.raises(UserError) as caught:
        run_file.load(files("child.yaml", content))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_aliases_and_merge_keys_are_no_duplicates(files):
    text = (
        "extends: parent.yaml\nsearch: &a {population: 3, seed: 1}\n"
        "evaluation: {mesh: {<<: {data: 3, model: 1}, data: 5}}\n"
    )
    run = run_file.load(files("child.yaml", text))
    assert run.search.population == 3 and run.evaluation.mesh == {"population": 1, "data": 5, "model": 1}


@pytest.mark.parametrize("order", [1, -1])
def test_set_changes_keys_of_a_run_file(files, order):
    settings = (
        "merge.coefficient=1e-1", "search.population=32", "merge.method=cart", "evaluation.mesh={data: 8}",
        "evaluation.mesh.model=2", "search.strategy=snes", "base.allow_mismatch=true",
    )  # fmt: skip
    run = load_run_file(files("child.yaml", {"extends": "parent.yaml"}), settings[::order], seeds=3)
    assert (run.search.population, run.search.strategy, run.search.seeds) == (32, "snes", 3)
    assert run.merge.method == "cart" and run.merge.hyperparameters == {"coefficient": 0.1}
    assert run.merge.scale == 0.7 and run.base.allow_mismatch
    if order == 1:
        assert run.evaluation.mesh == {"population": 1, "data": 8, "model": 2}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "search.populaton=3",
            "--set 'search.populaton=3': unknown key 'populaton'; did you mean 'population'?",
        ),
        ("serch.population=3", "did you mean 'search'?"),
        ("merge.densty=0.3", "did you mean 'density'?"),
        ("merge.scael=0.3", "did you mean 'scale'?"),
        ("search.population", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("search.population=many", "expected int, got 'many'"),
        ("search.population=0", "search.population is 0"),
        ("search.population={", "not valid YAML"),
        ("search.population.x=3", "search.population is set as a whole"),
        ("tasks.0.reference=1", "tasks is set as a whole"),
        ("search=3", "expected a mapping"),
        ("extends=demo", "unknown key 'extends'"),
        ("root=/", "unknown key 'root'"),
    ],
)
def test_bad_settings_are_one_line(files, setting, message):
    with pytest.raises(UserError) as caught:
        load_run_file(files("child.yaml", {"extends": "parent.yaml"}), (setting,))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("command", ["search", "evaluate", "train"])
def test_commands_take_settings(command, files, tmp_path, capsys):
    path, out = files("child.yaml", {"extends": "parent.yaml"}), tmp_path / "out"
    more = () if command == "evaluate" else ("--out", str(out))
    assert cli.main([command, path, "--set", "search.seed=1", "--set", "search.populaton=3", *more]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'population'" in error and error.count("\n") == 1 and not out.exists()


def test_a_name_that_no_file_system_bears():
    with pytest.raises(UserError, match="cannot read run file") as caught:
        run_file.load("x" * 5000)
    assert len(str(caught.value)) < 400


def test_a_packaged_name_wins_over_a_directory_of_that_name(tmp_path, monkeypatch):
    shutil.copytree(run_file.SUITES / "demo", tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    assert run_file.load("demo").root == run_file.SUITES.resolve()


def test_a_run_of_an_older_version_goes_on(files, tmp_path):
    """Older versions wrote every hyperparameter of every method, null where it was not given."""
    from enmp_jax.runs.directory import RunDirectory

    run = run_file.load(files("run.yaml", PARENT))
    written = to_dict(run)
    written["merge"] |= {"gamma": None, "clusters": None, "coefficient": None}
    files("out/config.yaml", written)
    with RunDirectory(tmp_path / "out", resume=True) as directory:
        directory.start(run)
    written["merge"]["density"] = 0.4
    files("out/config.yaml", written)
    with pytest.raises(UserError, match=r"other settings: changed merge.density"):
        RunDirectory(tmp_path / "out", resume=True).start(run)
