"""Run files that anybody may have made: what cannot work is one line, before anything is paid for."""

import os

import pytest
import yaml

from enmp_jax.config import run_file
from enmp_jax.errors import UserError

GOOD = {
    "base": {"model": "base"},
    "tasks": [{"name": "a", "adapter": "a", "data": {"source": "npz:a.npz", "search": "all", "test": "all"}}],
}


def refused(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    with pytest.raises(UserError) as caught:
        run_file.load(path)
    line = str(caught.value)
    assert line.isprintable() and len(line) < 500
    return line


def test_what_is_changed_below_is_accepted(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(GOOD))
    assert run_file.load(tmp_path / "run.yaml").tasks[0].name == "a"


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "a/b",
        "a:b",
        "a\\b",
        "a\0",
        "a\n",
        " a",
        "x" * 201,
        "a*",
        "\ud800",
        "\x1b[31m",
    ],
)
def test_names_that_cannot_be_file_names(tmp_path, name):
    with pytest.raises(UserError, match="cannot be a file name|not valid YAML"):
        data = {**GOOD, "tasks": [{**GOOD["tasks"][0], "name": name}]}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(data))
        run_file.load(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ("merge: {scale: .nan}", "merge: scale"),
        ("merge: {scale: 1e30}", "merge.scale is 1e+30: it must lie in"),
        ("merge: {scale_grid: [0.5, -1e30]}", "merge.scale is -1e+30"),
        ("search: {population: 1000000000000}", "search.population"),
        ("search: {population: 1000000, generations: 1000000}", "masks are not kept"),
        ("search: {seed: 1e30}", "search: seed: expected int"),
        ("search: {seed: 1000000000000000000000000000000}", "search.seed is"),
        ("search: {x0: nan}", "search: x0"),
        ("search: {x0: .nan}", "search: x0"),
        ("search: {sigma0: 1e300}", "search.sigma0 is 1e+300"),
        (f"search: {{sigma0: {'1' * 400}}}", "search: sigma0: expected a finite number"),
        (f"search: {{seed: {'1' * 400}}}", "search.seed is"),
        (f"search: {{seed: {'1' * 5000}}}", "not valid YAML"),
        ("search: {seed: 2026-13-45}", "not valid YAML"),
        ("search: {seed: 2026-11-24}", "search: seed: expected int"),
        ("search: {2026-11-24: 1}", "unknown key"),
        ("search: {finalists: -1}", "search.finalists"),
        ("evaluation: {batch_size: 1000000000000}", "evaluation.batch_size"),
        ("train: {rank: 1000000}", "train.rank"),
        ("x: " + "[" * 60 + "]" * 60, "nested too deeply"),
        ("x: " + "[" * 5000, "not valid YAML"),
        ("x: [" + "1," * 70000 + "]", "more than|"),
        ("# " + "x" * 300_000, "too large for a run file"),
    ],
)  # fmt: skip
def test_what_is_refused_before_anything_is_read(tmp_path, settings, line):
    assert any(part in refused(tmp_path, yaml.safe_dump(GOOD) + settings) for part in line.split("|"))


def test_little_text_that_stands_for_a_lot(tmp_path):
    """Aliases of aliases, and mappings merged into each other."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    assert "more than" in refused(tmp_path, "\n".join(lines))
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{'<<': [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 60)]
    line = refused(tmp_path, "\n".join(lines).replace("'<<'", "<<"))
    assert "more than" in line or "unknown key 'a0'" in line  # from 6.0.4 on PyYAML merges no key twice


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match="not a (regular )?file"):
        run_file.load(tmp_path / "pipe.yaml")
    (tmp_path / "child.yaml").write_text("extends: pipe.yaml")
    with pytest.raises(UserError, match="not a (regular )?file"):
        run_file.load(tmp_path / "child.yaml")
