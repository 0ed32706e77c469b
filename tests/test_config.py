"""Run files: what is accepted, and that what is not is named."""

import dataclasses

import pytest
import yaml

from enmp_jax.cli.run_option import load_run_file
from enmp_jax.config import run_file
from enmp_jax.config.compose import packaged_names
from enmp_jax.config.schema import to_dict
from enmp_jax.errors import UserError

MINIMAL = {
    "base": {"model": "some/model"},
    "tasks": [
        {"name": "a", "adapter": "x/a", "data": {"source": "npz:a.npz"}},
        {"name": "b", "adapter": "x/b", "data": {"source": "npz:b.npz"}},
    ],
}


def write(tmp_path, data):
    path = tmp_path / "run.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def test_defaults(tmp_path):
    search = run_file.load(write(tmp_path, MINIMAL)).search
    assert (search.strategy, search.population, search.generations) == ("cma_es", 8, 30)
    assert (search.x0, search.sigma0, search.threshold, search.max_pruned) == ("auto", 0.5, 0.0, 0.2)
    assert (search.fitness, search.objective, search.start) == ("margin", "mean", "none")


@pytest.mark.parametrize("name", packaged_names())
def test_packaged_suites_load_and_come_back_from_their_plain_form(name, tmp_path):
    run = load_run_file(name)
    again = run_file.load(write(tmp_path, to_dict(run)))
    assert dataclasses.replace(again, root=run.root) == run


def change(path, value):
    def apply(data):
        *parents, last = path
        for key in parents:
            data = data[key] if isinstance(data, list) else data.setdefault(key, {})
        data[last] = value

    return apply


BAD = {
    "misspelt key": (change(["search"], {"populaton": 4}), "did you mean 'population'"),
    "unknown key": (change(["zzz"], 1), "unknown key 'zzz'"),
    "wrong type": (change(["search"], {"population": "many"}), "expected int, got 'many'"),
    "bool for int": (change(["search"], {"population": True}), "expected int"),
    "population 0": (change(["search"], {"population": 0}), "search.population is 0"),
    "generations below 0": (change(["search"], {"generations": -1}), "search.generations"),
    "cross_fit": (
        change(["search"], {"cross_fit": True, "strategy": "greedy"}),
        "follows a gradient, and search.strategy greedy has none: take strategy gradient",
    ),
    "max_pruned": (change(["search"], {"max_pruned": 1.5}), "max_pruned is 1.5: it must lie in 0..1"),
    "granularity": (change(["search"], {"granularity": "head"}), "expected one of layer, projection"),
    "two tasks of one name": (change(["tasks", 1, "name"], "a"), "two tasks are named 'a'"),
    "no tasks": (change(["tasks"], []), "at least one task"),
    "missing key": (change(["tasks", 0], {"name": "a"}), "the key 'adapter' is missing"),
    "reference": (change(["tasks", 0, "reference"], 90.0), "scores lie in 0..1"),
    "scale": (change(["merge"], {"scale": "best"}), "merge: scale"),
    "empty grid": (change(["merge"], {"scale_grid": []}), "scale_grid is empty"),
    "task name": (change(["tasks", 0, "name"], "a:b"), "cannot be a file name"),
    "infinite": (change(["search"], {"sigma0": float("inf")}), "sigma0: expected a finite number, got inf"),
    "not a mapping": (change(["base"], "some/model"), "expected a mapping"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_run_files_get_one_clear_line(case, tmp_path):
    apply, message = BAD[case]
    data = yaml.safe_load(yaml.safe_dump(MINIMAL))
    apply(data)
    with pytest.raises(UserError) as caught:
        run_file.load(write(tmp_path, data))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "- a\n- b\n", "", "base: [unclosed", "base: {model: a, model: b}"])
def test_what_is_no_run_file_is_refused(text, tmp_path):
    with pytest.raises(UserError) as caught:
        run_file.load(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_run_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot read run file"):
        run_file.load(tmp_path / "none.yaml")


def test_numbers_in_scientific_notation(tmp_path):
    data = (
        yaml.safe_dump(MINIMAL) + "train: {learning_rate: 1e-3}\nmerge: {method: cart, rank_fraction: 4E-2}\n"
    )
    run = load_run_file(str(write(tmp_path, data)))
    assert run.train.learning_rate == pytest.approx(1e-3)
    assert run.merge.hyperparameters == {"rank_fraction": 0.04}
    with pytest.raises(UserError, match="expected a finite number, got '1e-3'"):
        run_file.load(write(tmp_path, yaml.safe_dump(MINIMAL) + "train: {learning_rate: '1e-3'}\n"))


def test_paths_start_from_the_run_file(tmp_path):
    (tmp_path / "adapters").mkdir()
    run = run_file.load(write(tmp_path, MINIMAL))
    assert run.path("adapters") == str(tmp_path.resolve() / "adapters")
    assert run.path("org/model") == "org/model"  # nothing there: a hub id
    assert run.path("./missing") == str(tmp_path.resolve() / "missing")
    assert run.path("package:demo.yaml") == str(run_file.SUITES / "demo.yaml")


def test_other_keys_of_the_merge_section_are_hyperparameters(tmp_path):
    data = MINIMAL | {"merge": {"method": "dare", "drop_rate": 0.5, "seed": 3, "gamma": None}}
    merge = run_file.load(write(tmp_path, data)).merge
    assert merge.hyperparameters == {"drop_rate": 0.5}  # null is as good as not given
    assert merge.arguments() == {"seed": 3, "drop_rate": 0.5}
    plain = to_dict(merge)
    assert plain["drop_rate"] == 0.5 and "hyperparameters" not in plain
    assert hash(merge) == hash(dataclasses.replace(merge))
