"""What is built is what is in the tree."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from enmp_jax.version import __version__

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_module_and_data_file(wheel):
    tree = ROOT / "enmp_jax"
    ignored = ("__pycache__",)
    expected = {
        f"enmp_jax/{p.relative_to(tree).as_posix()}"
        for p in tree.rglob("*")
        if p.is_file() and not any(part in ignored for part in p.parts)
    }
    missing = expected - set(wheel.namelist())
    assert not missing, sorted(missing)[:10]
    assert any(name.endswith("suites/demo/digits.npz") for name in expected)
    assert "enmp_jax/py.typed" in expected


def test_the_wheel_holds_nothing_else(wheel):
    assert all(name.startswith(("enmp_jax/", "enmp_jax-")) for name in wheel.namelist())


def test_the_version_stands_in_one_place_and_heads_the_changelog():
    (newest, *_) = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest == __version__
    for name in ("pyproject.toml", "CITATION.cff", "README.md", "mkdocs.yml"):
        assert f'"{__version__}"' not in (ROOT / name).read_text(), name


def test_the_packaged_weights_stay_small(wheel):
    assert sum(info.compress_size for info in wheel.infolist()) < 20e6


def test_the_rooms_at_the_top_are_links_to_the_real_ones():
    for room in ("models", "merges", "search"):
        assert (ROOT / room).is_symlink() and (ROOT / room).resolve() == ROOT / "enmp_jax" / room
