"""Checkpoints: what is saved comes back bit for bit, and damage or other settings are seen."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enmp_jax.errors import UserError
from enmp_jax.io.checkpoints import Checkpoints, OtherSettings, fingerprint

# orbax leaves threads and coroutines behind when a read fails
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def tree(value):
    noise = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)  # does not compress
    return {
        "state": (jnp.asarray(noise) + value, jax.random.key(3)),
        "archive": noise * value,
        "count": jnp.asarray(value),
    }


def bits(tree):
    return fingerprint(None, tree)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with checkpoints of the steps 5 and 10."""
    path = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(path, "same") as checkpoints:
        for step in (1, 5, 10):
            checkpoints.save(step, tree(step), {"losses": [0.1, step]})
    return path


def latest(path, fingerprint="same"):
    said = []
    with Checkpoints(path, fingerprint, say=said.append) as checkpoints:
        return checkpoints.latest(tree(0)), said


def test_the_newest_comes_back_bit_for_bit(saved, tmp_path):
    found, said = latest(saved)
    assert said == []
    assert found.step == 10
    assert found.meta == {"losses": [0.1, 10]}
    assert bits(found.tree) == bits(tree(10))
    assert isinstance(found.tree["archive"], np.ndarray)
    assert isinstance(found.tree["count"], jax.Array)
    found.tree["archive"][0] = 0  # may be written to
    assert sorted(p.name for p in saved.iterdir() if p.is_dir()) == ["10", "5"]
    assert latest(tmp_path / "new") == (None, [])


FILES = ("state/manifest.ocdbt", "state/_METADATA", "meta/metadata", "_CHECKPOINT_METADATA", "state/d/*",
         "state/ocdbt.process_0/manifest.ocdbt", "state/ocdbt.process_0/d/*")  # fmt: skip


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


DAMAGE = {
    "flipped": flip,
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_never_believed(saved, tmp_path, kind):
    """Damage one file after the other: the newest comes back whole, or the one before it does."""
    skipped = 0
    names = [p.relative_to(saved) for pattern in FILES for p in sorted((saved / "10").glob(pattern))]
    for i, name in enumerate(names):
        copy = tmp_path / str(i)
        shutil.copytree(saved, copy)
        DAMAGE[kind](copy / name)
        found, said = latest(copy)
        assert found.step in (5, 10), name
        assert bits(found.tree) == bits(tree(found.step)), name
        assert found.meta == {"losses": [0.1, found.step]}, name
        if found.step == 5:
            skipped += 1
            assert len(said) == 1
            assert str(copy / "10") in said[0]
    assert skipped >= 3  # orbax reads past some of its files


def test_none_whole_is_said_and_new_ones_take_their_place(saved, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(saved, path)
    (path / "99").mkdir()
    found, said = latest(path)
    assert found.step == 10
    assert str(path / "99") in said[0]
    for step in (5, 10):
        shutil.rmtree(path / str(step) / "state")
    found, said = latest(path)
    assert found is None
    assert len(said) == 3
    assert "anew" in said[-1]
    with Checkpoints(path, "same") as checkpoints:
        checkpoints.save(2, tree(2), {})
    assert latest(path)[0].step == 2


def test_other_settings_are_refused(saved, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(saved, path)
    with pytest.raises(OtherSettings, match="other settings"):
        latest(path, "another")
    assert latest(path)[0].step == 10
    with Checkpoints(path, "another") as checkpoints:
        checkpoints.clear()
        checkpoints.save(3, tree(3), {})
    assert latest(path, "another")[0].step == 3


def test_a_changed_header_is_seen(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    path = tmp_path / "copy" / "10" / "meta" / "metadata"
    text = path.read_text()
    assert text.count("0.1,") == 1
    path.write_text(text.replace("0.1,", "0.3,"))
    found, said = latest(tmp_path / "copy")
    assert (found.step, len(said)) == (5, 1)


def test_what_is_saved_is_a_copy(tmp_path, monkeypatch):
    """The write goes on in the background, while the caller changes its arrays and lists."""
    import orbax.checkpoint as ocp

    given, save = [], ocp.CheckpointManager.save

    def spy(self, step, args, metrics):
        given.append(args)
        return save(self, step, args=args, metrics=metrics)

    monkeypatch.setattr(ocp.CheckpointManager, "save", spy)
    array, losses = np.zeros(3), [1.0]
    with Checkpoints(tmp_path, "same") as checkpoints:
        checkpoints.save(1, {"x": array}, {"losses": losses})
    assert not np.shares_memory(given[0]["state"].item["x"], array)
    assert given[0]["meta"].item["record"]["meta"]["losses"] is not losses


def test_the_best_is_kept_beside_the_newest(tmp_path):
    with Checkpoints(tmp_path, "same") as checkpoints:
        for step, value in enumerate((0.1, 0.9, 0.3, float("nan"), 0.5), 1):
            checkpoints.save(step, {"x": np.zeros(2)}, {}, value)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["2", "4", "5"]


@pytest.mark.parametrize("leaf", ["text", np.float32(1), 3])
def test_only_arrays_are_saved(tmp_path, leaf):
    with Checkpoints(tmp_path, "same") as checkpoints:
        with pytest.raises(TypeError, match=r"\['deep'\]\['leaf'\]"):
            checkpoints.save(1, {"deep": {"leaf": leaf}}, {})
        checkpoints.save(2, {"x": np.zeros(2)}, {})
        with pytest.raises(ValueError, match="follow"):
            checkpoints.save(1, {"x": np.zeros(2)}, {})


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot keep checkpoints"):
        Checkpoints(tmp_path / "file" / "checkpoints", "same")


def test_fingerprints_tell_settings_and_contents_apart():
    same = fingerprint({"a": 1, "b": 2}, [np.arange(3)])
    assert fingerprint({"b": 2, "a": 1}, [np.arange(3)]) == same
    for other in (
        fingerprint({"a": 1, "b": 3}, [np.arange(3)]),
        fingerprint({"a": 1, "b": 2}, [np.arange(3) + 1]),
        fingerprint({"a": 1, "b": 2}, [np.arange(3).astype(np.float32)]),
        fingerprint({"a": 1, "b": 2}, [np.arange(3)[None]]),
        fingerprint({"a": 1, "b": 2}, np.arange(3)),
    ):
        assert other != same
