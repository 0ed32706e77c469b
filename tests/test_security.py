"""What SECURITY.md promises: nothing in the package can run what it reads."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "enmp_jax").rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {
    "eval",
    "exec",
    "__import__",
    "os.system",
    "os.popen",
    "torch.load",
    "yaml.unsafe_load",
    "yaml.full_load",
}


def forbidden(source):
    """Lines of a source that could run what they read."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [node.lineno for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.lineno] * ((node.module or "").split(".")[0] in MODULES)
        elif isinstance(node, ast.keyword):
            value = getattr(node.value, "value", None)
            found += [node.value.lineno] * (node.arg in ("allow_pickle", "shell") and value is not False)
            found += [node.value.lineno] * (node.arg == "trust_remote_code")
        elif isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), [*map(ast.unparse, node.args)]
            # the one way to read torch's files that runs nothing in them
            tensors = name == "torch.load" and "weights_only=True" in [ast.unparse(k) for k in node.keywords]
            found += [node.lineno] * (name in CALLS and not tensors)
            found += [node.lineno] * (name == "yaml.load" and given[1:] != ["_Loader"])
            pickles = name == "np.load" and not any(k.arg == "allow_pickle" for k in node.keywords)
            found += [node.lineno] * pickles
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_what_it_reads(path):
    assert forbidden(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from joblib import load", "eval('1')", "torch.load(x)", "np.load(x)",
     "torch.load(x, weights_only=False)", "yaml.load(x)", "np.load(x, allow_pickle=True)",
     "f(x, trust_remote_code=True)", "run(x, shell=True)", "yaml.load(x, yaml.Loader)"],
)  # fmt: skip
def test_the_check_sees_it(source):
    assert forbidden(source) == [1]


def test_the_loader_of_run_files_is_a_safe_one():
    import yaml

    from enmp_jax.config import compose

    assert issubclass(compose._Loader, yaml.SafeLoader)


def test_every_direct_dependency_is_explained():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.findall(r"[\w-]+", text)[0].replace("_", "-") for text in project["dependencies"]}
    table = re.findall(r"^\| ([\w-]+) \| (.+) \|$", (ROOT / "SECURITY.md").read_text(encoding="utf-8"), re.M)
    explained = {name.replace("_", "-") for name, why in table if name != "package"}
    assert explained == names
