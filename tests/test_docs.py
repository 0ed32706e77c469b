"""The documentation is true: commands parse (test_docs_commands.py runs them), Python and data are right."""

import functools
import importlib
import json
import re
import shutil
import subprocess
import sys

import doc_files
import pytest
import tyro
import yaml
from doc_blocks import PAGES, ROOT, TORCH, blocks, commands, of

from enmp_jax.cli import main as cli
from enmp_jax.config.compose import read_yaml
from enmp_jax.config.run_file import RunConfig
from enmp_jax.config.schema import parse

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A directory with the files that the pages speak of."""
    return doc_files.save_all(tmp_path_factory.mktemp("docs"))


def parsed(words):
    """The arguments of a command, which is not run."""
    assert words[0] in cli.COMMANDS, words
    module = importlib.import_module(f"enmp_jax.cli.{words[0]}")
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    try:
        tyro.cli(module.Args, args=words[1:], config=config)
    except SystemExit:
        pytest.fail(f"enmp {' '.join(words)}: this command cannot work")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_is_one_that_exists_with_these_options(page):
    for block in of(page, "sh", "bash", ""):
        for words in commands(block.text):
            parsed(words)
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`enmp ([^`\[]+?)`", prose):
        fields = importlib.import_module(f"enmp_jax.cli.{code.split()[0]}").Args.__dataclass_fields__
        options = {option.replace("-", "_") for option in re.findall(r"--([\w-]+)", code)}
        assert options <= {*fields, "help"}, f"{page.name}: enmp {code}"


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for name in re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE):
            assert name in targets, f"{page.name}: make {name}"


@functools.cache
def quickstart_run():
    return yaml.safe_load(next(b for b in of(DOCS / "quickstart.md", "yaml")).text)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_yaml_and_json_are_read_as_run_files_and_data(page, tmp_path):
    for block in blocks(page):
        if block.language == "yaml":
            (tmp_path / "run.yaml").write_text(block.text)
            parse(
                RunConfig,
                {**quickstart_run(), **read_yaml(tmp_path / "run.yaml")},
                f"{page.name}:{block.line}",
            )
        elif block.language == "json":
            for line in block.text.splitlines():
                assert isinstance(json.loads(line), dict)


def test_python_blocks_run_or_compile(here, monkeypatch):
    """Those of extending.md are run by test_contributing.py, the README's by it and test_docs_commands.py."""
    monkeypatch.chdir(here)
    ran = 0
    for page in PAGES:
        for block in of(page, "python"):
            code = compile(block.text, f"{page.name}:{block.line}", "exec")
            if page.name not in ("README.md", "extending.md") and not TORCH.search(block.text):
                exec(code, {"__name__": page.stem})
                ran += 1
    assert ran >= 1


def test_figures_stand_in_the_results():
    results = "".join((ROOT / f"benchmarks/results/{name}.md").read_text() for name in ("search", "evidence"))
    figures = set(re.findall(r"\b0\.\d{3}\b|\b\d{3},\d{3}\b", (DOCS / "choosing.md").read_text()))
    assert len(figures) > 15 and not {figure for figure in figures if figure not in results}


def test_the_notebook_compiles_and_has_no_results_in_it():
    book = json.loads((DOCS / "demo.ipynb").read_text())
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 4 and not [cell for cell in code if cell["outputs"] or cell["execution_count"]]
    for cell in code:
        compile("".join(cell["source"]), "demo.ipynb", "exec")


def test_the_citation_is_yaml_with_what_a_citation_needs():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "title", "authors", "message"} <= citation.keys()
    assert len(citation["preferred-citation"]["authors"]) == 8


@pytest.mark.skipif(shutil.which("mkdocs", path=f"{sys.prefix}/bin") is None, reason="needs the extra docs")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [f"{sys.prefix}/bin/mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
