"""The public API: small, typed, documented by examples that run, loaded when used."""

import doctest
import inspect
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest

import enmp_jax as enmp
from enmp_jax import merges
from enmp_jax.api import _result as read_result
from enmp_jax.lora import stack_adapters
from enmp_jax.merges.hyperparameters import hyperparameters
from enmp_jax.merges.ties import ties as factory

FEW = {f"{split}_examples": 8 for split in ("search", "selection", "test")}
SHORT = {"strategy": "cma_es", "granularity": "layer", "population": 4, "generations": 2, "seeds": 1}
DOCUMENTED = [name for name in enmp.__all__ if name not in ("__version__", "merges")]


def run(**search):
    return enmp.load_run("demo", search=SHORT | search, evaluation=FEW | {"batch_size": 24})


def examples(item, name: str) -> None:
    (test,) = doctest.DocTestFinder(recurse=False).find(item, name, module=False, globs={})
    assert test.examples, f"{name} has no example"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = doctest.DocTestRunner().run(test)
    assert found.failed == 0


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_public_name_has_an_example_that_runs(name):
    examples(getattr(enmp, name), name)


@pytest.mark.parametrize("name", ["make", *merges.METHODS])
def test_every_merge_method_has_an_example_that_runs(name):
    examples(getattr(enmp.merges, name), name)


@pytest.mark.parametrize("name", merges.METHODS)
def test_a_public_method_shows_the_hyperparameters_of_its_factory(name):
    signature = inspect.signature(getattr(merges, name))
    for one in hyperparameters(merges.METHODS[name]).values():
        assert signature.parameters[one.name].default == one.default
    assert {"space", "isotropize"} <= set(signature.parameters)


def test_a_public_method_is_what_make_builds():
    rng = np.random.default_rng(0)
    adapter = {f"layers.{i}.q": (rng.normal(size=(2, 6)), rng.normal(size=(5, 2))) for i in range(2)}
    stack = stack_adapters({"a": adapter, "b": {k: (a[::-1], b) for k, (a, b) in adapter.items()}})

    def merged(method):
        (delta,) = method.merge(method.prepare(stack), np.ones((2, 2), bool), 0.5).values()
        return np.asarray(delta.materialise())

    given = {"space": "core", "isotropize": True, "density": 0.4, "task_weights": (1.0, 0.5)}
    np.testing.assert_array_equal(merged(enmp.merges.ties(**given)), merged(merges.make("ties", **given)))
    with pytest.raises(enmp.UserError, match="did you mean 'density'"):
        enmp.merges.ties(densty=0.4)
    assert factory is merges.METHODS["ties"]  # the module of the same name is still reached


def fresh(code: str) -> subprocess.CompletedProcess:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_importing_the_package_imports_no_jax():
    done = fresh("import sys, enmp_jax; assert not {'jax', 'numpy'} & set(sys.modules); enmp_jax.merges.sum")
    assert done.returncode == 0, done.stderr


def test_search_is_the_function_whatever_was_imported_before():
    code = (
        "import enmp_jax.search.base, enmp_jax as enmp; from enmp_jax import search;"
        "from enmp_jax.search import base;"
        "assert callable(enmp.search) and callable(search) and base.Space and 'search' in dir(enmp)"
    )
    done = fresh(code)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_blas_threads_are_warned_about_where_it_is_too_late_to_set_them():
    assert "UserWarning: scipy.linalg was imported before" in fresh("import scipy.linalg, enmp_jax").stderr
    assert not fresh("import numpy, enmp_jax").stderr
    done = fresh("import os; os.environ['OPENBLAS_NUM_THREADS'] = '2'; import scipy.linalg, enmp_jax")
    assert done.returncode == 0 and not done.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="serach"):
        enmp.serach  # noqa: B018


def test_a_result_is_what_the_run_directory_says_and_can_be_scored_again(tmp_path, capsys):
    calls = []
    result = enmp.search(run(), tmp_path / "run", on_progress=lambda *call: calls.append(call))
    assert [done for done, *_ in calls] == [1, 2] and not capsys.readouterr().out
    saved = json.loads((tmp_path / "run/mask.json").read_text())
    assert (~result.mask).sum() == len(saved["pruned"]) and result.scale == saved["scale"]
    assert result.scores == json.loads((tmp_path / "run/scores.json").read_text())
    scores = enmp.evaluate(run(), mask=result)
    assert scores["enmp"] == pytest.approx(result.scores["enmp"])
    assert scores["pruned"] == result.scores["pruned"]
    result.save(tmp_path / "mask.json")
    assert enmp.evaluate(run(), mask=tmp_path / "mask.json")["enmp"] == scores["enmp"]


def test_weights_by_projection_come_back(tmp_path):
    adapter = {f"layers.{i}.{p}": (np.ones((1, 3)), np.ones((3, 1))) for i in range(3) for p in "qk"}
    spec = enmp.MaskSpec.of(stack_adapters({"a": adapter, "b": adapter}), "projection")
    weights = spec.all_kept().astype(np.float32)
    weights[0, 1, 0], weights[2, 0, 1] = 0.0, 0.3
    (tmp_path / "mask.json").write_text(json.dumps(spec.to_json(weights, 0.5)))
    (tmp_path / "scores.json").write_text("{}")
    (tmp_path / "history.jsonl").write_text('{"seed": 0}\n')
    result = read_result(tmp_path)
    np.testing.assert_array_equal(result.weights, weights)
    np.testing.assert_array_equal(result.mask, weights != 0)
    assert result.scale == 0.5 and result.history == [{"seed": 0}]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"serach": {}}, "did you mean 'search'"),
        ({"search": {"popluation": 3}}, "did you mean 'population'"),
        ({"merge": {"method": "teis"}}, "did you mean 'ties'"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(enmp.UserError, match=message) as caught:
        enmp.load_run("demo", **settings)
    assert "\n" not in str(caught.value)


def test_there_is_nothing_to_resume_without_a_directory():
    with pytest.raises(enmp.UserError, match="give out"):
        enmp.search(run(), resume=True)
