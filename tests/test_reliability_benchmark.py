"""A short version of ``benchmarks/reliability.py``: the same code, a few cases of every part."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import reliability
from reliability_fuzz import FUZZ, fuzz

# orbax leaves threads and coroutines behind when a read or a write fails
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    loaded = reliability.problem()
    return loaded, reliability.search(loaded, tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.mark.parametrize(
    ("part", "scale"), [("renames", 0.05), ("damaged", 0.25), ("faults", 0.1), ("soak", 0.05)]
)
def test_a_search_survives(undisturbed, tmp_path, part, scale):
    outcome = reliability.PARTS[part][1](undisturbed[0], tmp_path, undisturbed[1], scale)
    assert outcome.cases == outcome.survived > 0, outcome.notes


@pytest.mark.parametrize("name", FUZZ)
def test_mutated_files_are_read_or_refused_in_one_line(tmp_path, name):
    if name == "tfds" and "TFDS_DATA_DIR" not in os.environ:
        pytest.skip("needs a data set in TFDS_DATA_DIR")
    count, survived, notes = fuzz(name, 0.01, tmp_path)
    assert survived == count >= 10, notes
