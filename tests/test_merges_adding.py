"""Adding a merge method as ``merges/README.md`` says: one factory and one entry in ``METHODS``.

A throw-away method with a hyperparameter that no other method has is then used from Python, from a run
file and from the command line.
"""

import importlib
import sys
from typing import Annotated

import adapter_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import enmp_jax.cli
from enmp_jax import merges
from enmp_jax.adapters.peft_import import load_adapters
from enmp_jax.cli import main as cli
from enmp_jax.cli.run_option import load_run_file
from enmp_jax.errors import UserError
from enmp_jax.lora import stack_adapters
from enmp_jax.merges.base import LayerMethod, lift
from enmp_jax.merges.hyperparameters import Range, hyperparameters
from enmp_jax.merges.sum import sum_


def amplified(space: str = "full", loudness: Annotated[float, Range(0, 10)] = 1.0) -> LayerMethod:
    """The sum, louder.

    Args:
        space: see ``SPACES``.
        loudness: what the sum
            is multiplied by.
    """
    plain = sum_(space)
    return LayerMethod(plain.prepare, lambda x, weights: plain.merge(x, weights * loudness))


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setitem(merges.METHODS, "amplified", amplified)
    # the command makes its options from METHODS when it is imported
    command = importlib.import_module("enmp_jax.cli.merge")
    monkeypatch.setattr(enmp_jax.cli, "merge", command)
    monkeypatch.delitem(sys.modules, "enmp_jax.cli.merge")


@pytest.fixture
def directories(tmp_path):
    return {task: adapter_files.make(tmp_path / task, i) for i, task in enumerate(("cars", "dtd"))}


def merged(merge, stack):
    deltas = merge.merge(merge.prepare(stack), jnp.ones((stack.n_layers, stack.n_tasks)), 1.0)
    return {name: np.asarray(delta.materialise()) for name, delta in deltas.items()}


@pytest.mark.usefixtures("added")
def test_it_is_reached_all_three_ways(directories, tmp_path, capsys):
    loaded = load_adapters({task: str(path) for task, path in directories.items()})
    expected = {name: 3 * x for name, x in merged(merges.make("sum"), loaded.stack).items()}

    library = merged(merges.make("amplified", loudness=3.0), loaded.stack)

    tasks = [{"name": t, "adapter": str(p), "data": {"source": "npz:x"}} for t, p in directories.items()]
    run = {"base": {"model": "m"}, "tasks": tasks, "merge": {"method": "amplified", "loudness": 3.0}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    config = load_run_file(str(tmp_path / "run.yaml")).merge
    run_file = merged(
        merges.make(config.method, config.space, config.isotropize, **config.arguments()), loaded.stack
    )

    adapters = [word for t, p in directories.items() for word in ("--adapter", f"{t}={p}")]
    out = tmp_path / "out"
    assert cli.main(["merge", *adapters, "--method", "amplified", "--loudness", "3", "--out", str(out)]) == 0
    assert "--loudness 3.0" in (out / "enmp_config.yaml").read_text()
    command = load_file(out / "delta.safetensors")

    for name, x in expected.items():
        np.testing.assert_allclose(library[name], x, rtol=1e-5)
        np.testing.assert_array_equal(run_file[name], library[name])
        for layer in range(loaded.stack.n_layers):
            path = loaded.names[name][layer] + ".weight"
            np.testing.assert_allclose(command[path], x[layer], rtol=1e-4, atol=1e-6)

    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["merge", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "amplified (from 0 to 10; default 1.0): what the sum is multiplied by." in shown


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("merge: {method: amplified, loudnes: 3}", "did you mean 'loudness'?"),
        ("merge: {method: amplified, scael: 3}", "did you mean 'scale'?"),
        ("merge: {method: amplified, loudness: 11}", "loudness is 11: it must be from 0 to 10"),
        ("merge: {method: sum, loudness: 3}", "merge method 'sum' has no hyperparameter 'loudness'"),
        ("merge: {method: amplifeid}", "did you mean 'amplified'?"),
    ],
)
def test_what_is_wrong_in_a_run_file_is_one_line(section, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("base: {model: m}\ntasks: [{name: a, adapter: x/a, data: {source: 'npz:a'}}]\n" + section)
    with pytest.raises(UserError) as caught:
        load_run_file(str(path))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_line_is_as_before():
    """The throw-away method is gone with its option."""
    assert "loudness" not in hyperparameters(merges.METHODS["ties"])
    with pytest.raises(SystemExit):
        cli.main(["merge", "--loudness", "3"])


@pytest.mark.parametrize("method", merges.METHODS)
def test_every_factory_says_all_of_its_hyperparameters(method):
    for one in hyperparameters(merges.METHODS[method]).values():
        assert one.help and (one.default is None or one.check(one.default) == one.default)


def undocumented(space: str = "full", loudness: float = 1.0) -> LayerMethod:
    """Nothing of loudness here."""
    return sum_(space)


def untyped(space: str = "full", loudness=1.0) -> LayerMethod:
    """Untyped.

    Args:
        loudness: of the sum.
    """
    return sum_(space)


@pytest.mark.parametrize("factory", [undocumented, untyped])
def test_a_factory_that_leaves_something_out_is_a_fault(factory):
    with pytest.raises(TypeError, match=f"{factory.__name__}.*loudness"):
        hyperparameters(factory)


def test_a_merge_is_traced_once_for_all_projections_of_a_shape():
    traced = []

    def merge(x, weights):
        traced.append(weights.shape)
        return plain.merge(x, weights)

    plain = sum_("full")
    random = np.random.default_rng(0)
    one = {f"layers.{i}.{p}": (random.normal(size=(2, 6)), random.normal(size=(5, 2)))
           for i in range(2) for p in "qkv"}  # fmt: skip
    wide = {f"layers.{i}.o": (random.normal(size=(2, 9)), random.normal(size=(5, 2))) for i in range(2)}
    stack = stack_adapters({"a": one | wide, "b": one | wide})
    whole = lift(LayerMethod(plain.prepare, merge))
    jax.jit(whole.merge)(whole.prepare(stack), jnp.ones((2, 2)), 0.5)
    assert len(traced) == 2  # three projections of one shape, and one of another
