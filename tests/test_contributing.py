"""CONTRIBUTING.md and docs/extending.md are true: the table of rooms is the checked one, recipes run."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_merges_contract import TASKS, adapters
from test_rooms import PACKAGE, ROOMS

import enmp_jax as enmp
from enmp_jax import merges, models
from enmp_jax.config.sections import DataConfig
from enmp_jax.data import load, questions
from enmp_jax.evaluation import fitness
from enmp_jax.lora import stack_adapters
from enmp_jax.search import strategies

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXTENDING = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
RECIPES = {
    heading: code
    for heading, _, body in (part.partition("\n") for part in EXTENDING.split("\n## ")[1:])
    for code in re.findall(r"^```python\n(.*?)^```$", body, re.DOTALL | re.MULTILINE)
}
REGISTRIES = (merges.METHODS, models.FAMILIES, strategies.STRATEGIES, load.SOURCES, fitness.FITNESS)


@pytest.fixture
def execute(monkeypatch):
    """Runs a recipe; returns its names. What it adds is gone after the test."""
    before = [dict(registry) for registry in REGISTRIES]

    def run(heading: str) -> dict:
        names: dict = {"__name__": "recipe"}
        exec(compile(RECIPES[heading], f"docs/extending.md, {heading}", "exec"), names)
        added = sum(len(new) - len(old) for new, old in zip(REGISTRIES, before))
        assert added == (heading != "Add a task kind"), "a recipe adds one entry"
        return names

    monkeypatch.setattr(merges, "clipped_sum", None, raising=False)  # removed again afterwards
    yield run
    for registry, old in zip(REGISTRIES, before):
        registry.clear()
        registry.update(old)


def test_every_recipe_is_tested():
    assert set(RECIPES) == {
        "Add a merge method", "Add a backbone", "Add a search strategy", "Add a data source",
        "Add a fitness kind", "Add a task kind",
    }  # fmt: skip
    assert len(TEXT.splitlines()) <= 70, "CONTRIBUTING.md is one page"


def test_a_merge_method(execute):
    names = execute("Add a merge method")
    stack = stack_adapters(adapters())
    keep = np.ones((stack.n_layers, len(TASKS)), bool)
    limited = merges.clipped_sum(limit=0.05)
    (delta,) = jax.jit(limited.merge)(limited.prepare(stack), keep, 1.0).values()
    plain = enmp.merges.sum()
    (whole,) = plain.merge(plain.prepare(stack), keep, 1.0).values()
    np.testing.assert_allclose(delta.materialise(), np.clip(whole.materialise(), -0.05, 0.05), atol=1e-5)
    (delta,) = names["method"].merge(names["method"].prepare(stack), keep, 1.0).values()
    assert np.isfinite(delta.materialise()).all()


def test_a_backbone(execute):
    backbone = execute("Add a backbone")["backbone"]
    images = jnp.asarray(np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), np.uint8))
    params = backbone.init(jax.random.key(0))
    features = jax.jit(backbone.features)(params, {"image": images})
    hidden = backbone.hidden_states(params, {"image": images})
    assert backbone.family == "vit_mean" and features.shape == (2, 8)
    np.testing.assert_allclose(features, backbone.pool(params, hidden[-1], {}), atol=1e-5)


def test_a_strategy(execute):
    strategy = execute("Add a search strategy")["strategy"]
    state = strategy.init(jax.random.key(0), jnp.zeros(6))
    best = -np.inf
    for i in range(40):
        genomes, state = strategy.ask(jax.random.key(i), state)
        state = strategy.tell(jax.random.key(i), genomes, -((genomes - 1) ** 2).sum(axis=1), state)
        assert state[1] >= best
        best = float(state[1])
        np.testing.assert_allclose(best, -((state[0] - 1) ** 2).sum(), rtol=1e-5)
    assert -3 < best < 0  # from -6 at the start


def test_a_data_source(execute):
    examples = execute("Add a data source")["examples"]
    assert examples.inputs["image"].shape == (6, 8, 8, 1) and examples.class_names == ("dark", "bright")
    brightness = examples.inputs["image"].mean(axis=(1, 2, 3))
    np.testing.assert_array_equal(examples.labels, brightness > 127)


def test_a_fitness(execute):
    names = execute("Add a fitness kind")
    np.testing.assert_allclose(names["value"], [0.75])
    assert fitness.get("brier").has_gradient


def test_a_task_kind(execute, tmp_path):
    line = execute("Add a task kind")["line"]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line) + "\n")
    assert questions.find_kind(DataConfig("jsonl:pairs"), None, tmp_path / "pairs.jsonl") == "choice"


def test_the_places_that_know_task_kinds_are_listed():
    table = EXTENDING.split("## Add a task kind")[1]
    listed = {
        path for row in re.findall(r"^\| (`.*?) \|", table, re.M) for path in re.findall(r"`(.*?)`", row)
    }
    named = re.compile(r'"(completion|choice|classification)"')
    known = {
        path.relative_to(PACKAGE).as_posix()
        for room in ("config", "data", "evaluation")
        for path in (PACKAGE / room).glob("*.py")
        if named.search(path.read_text(encoding="utf-8"))
    }
    assert listed == known


def test_the_table_of_rooms_is_the_one_that_is_checked():
    table = TEXT.split("## Rooms")[1].split("\n## ")[0]
    rows = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in table.splitlines() if row.startswith("| `")]
    assert [tuple(row) for row in rows] == list(ROOMS)


@pytest.mark.parametrize("room", sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py")))
def test_every_room_says_what_it_is_for_and_what_it_imports(room):
    opening = (PACKAGE / room / "__init__.py").read_text(encoding="utf-8").split('"""')[1]
    assert re.search(r"(May|No room may) import", opening) and len(opening.splitlines()) <= 3, opening


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        assert "://" in target or (path.parent / target).exists(), target


def test_the_readme_names_every_fitness_and_strategy_and_command():
    from enmp_jax.cli.main import COMMANDS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in (*fitness.FITNESS, *strategies.STRATEGIES, "gradient"):
        assert f"`{name}`" in text, name
    for name in COMMANDS:
        assert f"enmp {name}" in text or f"make {name}" in text, name
    assert len(text.splitlines()) < 200


def test_the_merge_of_the_readme_runs(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = text.split("## From Python")[1].split("```python\n")[1].split("\n\nrun = ")[0]
    (tmp_path / "path/to").mkdir(parents=True)
    for name, packaged in (("cars", "digit"), ("dtd", "even")):
        (tmp_path / "path/to" / name).symlink_to(PACKAGE / "suites/demo/adapters" / packaged)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "merged/adapter_model.safetensors").exists()
