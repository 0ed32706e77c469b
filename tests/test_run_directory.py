"""A run directory: made whole or not at all, of one process at a time, and of what it says it is made of."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from enmp_jax.config import run_file
from enmp_jax.errors import UserError
from enmp_jax.io import files, lock
from enmp_jax.io.lock import Lock
from enmp_jax.io.writing import new_directory
from enmp_jax.runs.directory import RunDirectory
from enmp_jax.runs.provenance import changed_inputs, changed_settings, fingerprints


@pytest.fixture(scope="module")
def run():
    return run_file.load("demo")


def names(path):
    return sorted(p.name for p in path.iterdir())


class Killed(BaseException):
    """Stands for SIGKILL: no handler may see it."""


def test_a_start_killed_at_any_rename_can_be_made_again(run, tmp_path, monkeypatch):
    """After each of the files is there, and before: a fresh start and a resume both work."""
    replace, made, kill_at = Path.replace, [], [0]

    def one(self, target):
        if len(made) == kill_at[0]:
            raise Killed
        made.append(target)
        return replace(self, target)

    for resume in (False, True):
        for kill_at[0] in range(4):
            made.clear()
            out = tmp_path / f"{resume}{kill_at[0]}"
            with monkeypatch.context() as patch:
                patch.setattr(Path, "replace", one)
                patch.setattr(Path, "unlink", lambda *args, **kwargs: None)  # a killed process cleans nothing
                try:
                    with RunDirectory(out, resume) as directory:
                        directory.start(run, {"a": "1"})
                except Killed:
                    assert not (out / "config.yaml").exists()
                    assert any(name.endswith(".tmp") for name in names(out))
                else:
                    assert kill_at[0] == 3
            again = resume or kill_at[0] == 3
            with RunDirectory(out, again, say=lambda line: None) as directory:
                directory.start(run, {"a": "1"})
            assert names(out) == ["config.yaml", "environment.json", "fingerprints.json"]


def test_a_run_without_its_environment_gets_one(run, tmp_path):
    with RunDirectory(tmp_path / "run") as directory:
        directory.start(run, {"a": "1"})
    (tmp_path / "run" / "environment.json").unlink()
    with RunDirectory(tmp_path / "run", resume=True) as directory:
        directory.start(run, {"a": "1"})
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["root"] == str(run.root)


def test_leftovers_of_the_killed_go_and_those_of_the_living_stay(run, tmp_path):
    with RunDirectory(tmp_path / "run") as directory:
        directory.start(run)
    for name in (".adapters.0a1b2c3d.tmp", ".scores.json.12345.tmp"):
        (tmp_path / "run" / name).mkdir()
    (tmp_path / "run" / ".mine.tmp").write_text("precious")
    with RunDirectory(tmp_path / "run", resume=True):
        assert names(tmp_path / "run") == [".lock", ".mine.tmp", "config.yaml", "environment.json"]
    ours = files.temporary_name(tmp_path / "merged")
    dead = subprocess.Popen(["true"])
    dead.wait()
    theirs = ours.with_name(ours.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-"))
    other = theirs.with_name(theirs.name.replace(".merged.", ".other."))
    for path in (ours, theirs, other):
        path.mkdir()
    with new_directory(tmp_path / "merged"):
        assert [path.exists() for path in (ours, theirs, other)] == [True, False, True]


HOLD = """
import sys, time
from pathlib import Path
from enmp_jax.io.lock import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_is_refused_and_a_killed_one_taken_over(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"is in use by process {holder.pid} on .* wait for its end"):
            Lock(tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    said = []
    held = Lock(tmp_path, said.append)
    assert len(said) == 1 and f"process {holder.pid}" in said[0] and "taking over" in said[0]
    held.release()
    assert names(tmp_path) == []
    Lock(tmp_path, said.append).release()
    assert len(said) == 1


def test_another_host_is_alive_while_its_file_is_touched(tmp_path, monkeypatch):
    """Where the file system shares no locks, the time of the file decides."""
    path = tmp_path / lock.NAME
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "time": "now"}))
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.5)
    said = []
    Lock(tmp_path, said.append).release()  # nobody touched it for half a second
    assert "waiting" in said[0] and "taking over" in said[1]
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "time": "now"}))
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (sleep(seconds), os.utime(path)))
    with pytest.raises(UserError, match="in use by process 1 on elsewhere"):
        Lock(tmp_path, said.append)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x\\n"}'])
def test_a_damaged_lock_file_is_no_obstacle(tmp_path, content, monkeypatch):
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.0)
    (tmp_path / lock.NAME).write_text(content)
    Lock(tmp_path, lambda line: None).release()
    assert names(tmp_path) == []


def test_what_has_changed_is_named_and_set_aside_if_asked(run, tmp_path):
    out = tmp_path / "run"

    def resume(run, made_of, **more):
        said = []
        with RunDirectory(out, True, say=said.append, **more) as directory:
            directory.start(run, made_of)
            return said, directory.fingerprint

    with RunDirectory(out) as directory:
        directory.start(run, {"the base model": "1", "the adapter of digit": "1"})
    (out / "history.jsonl").write_text("{}\n")
    (out / "mask.json").write_text("{}")
    made_of = {"the base model": "1", "the adapter of digit": "2"}
    with pytest.raises(UserError, match="changed the adapter of digit; .* --resume-anyway"):
        resume(run, made_of)
    other = dataclasses.replace(run, search=dataclasses.replace(run.search, population=77))
    with pytest.raises(UserError, match=r"changed search.population \(\d+, now 77\); "):
        resume(other, {"the base model": "1", "the adapter of digit": "1"})
    # what comes after the search leaves the search as it is
    later = dataclasses.replace(run, search=dataclasses.replace(run.search, finalists=3))
    said, same = resume(later, {"the base model": "1", "the adapter of digit": "1"}, anyway=True)
    assert "results anew" in said[0] and names(out / "earlier-1") == [
        "config.yaml", "environment.json", "fingerprints.json", "mask.json"
    ]  # fmt: skip
    assert (out / "history.jsonl").exists() and same == directory.fingerprint
    said, _ = resume(later, made_of, anyway=True)
    assert "the search anew" in said[0] and (out / "earlier-2" / "history.jsonl").exists()
    assert names(out) == ["config.yaml", "earlier-1", "earlier-2", "environment.json", "fingerprints.json"]
    assert resume(later, made_of)[0] == []


def test_a_run_that_recorded_nothing_is_not_believed(run, tmp_path):
    with RunDirectory(tmp_path / "run") as directory:
        directory.start(run)
    with (
        pytest.raises(UserError, match="older version did not record"),
        RunDirectory(tmp_path / "run", True) as d,
    ):
        d.start(run, {"a": "1"})


def test_fingerprints_tell_what_has_changed(demo_loaded):
    before = fingerprints(demo_loaded)
    assert fingerprints(demo_loaded) == before
    tasks = demo_loaded.tasks
    template = next(iter(demo_loaded.stack.pairs))
    pair = demo_loaded.stack.pairs[template]
    changed = pair.replace(a=pair.a.at[0, 1, 0, 0].add(1))
    stack = demo_loaded.stack.replace(pairs={**demo_loaded.stack.pairs, template: changed})
    adapters = dataclasses.replace(demo_loaded.adapters, stack=stack)
    one = dataclasses.replace(demo_loaded, adapters=adapters)
    assert changed_inputs(before, fingerprints(one)) == [f"the adapter of {tasks[1]}"]
    bias = demo_loaded.heads.bias.at[2, 0].add(1)
    two = dataclasses.replace(demo_loaded, heads=demo_loaded.heads.replace(bias=bias))
    assert changed_inputs(before, fingerprints(two)) == [f"the head of {tasks[2]}"]
    examples = {split: list(e) for split, e in demo_loaded.examples.items()}
    labels = examples["search"][0].labels.copy()
    labels[0] += 1
    examples["search"][0] = examples["search"][0]._replace(labels=labels)
    three = dataclasses.replace(demo_loaded, examples=examples)
    assert changed_inputs(before, fingerprints(three)) == [f"the search data of {tasks[0]}"]


def test_changed_settings_are_named_by_their_keys():
    before = {
        "tasks": [{"name": "a", "head": {"source": "x"}}],
        "merge": {"scale": 1.0},
        "search": {"seed": 0},
    }
    now = {"tasks": [{"name": "a", "head": {"source": "y"}}], "merge": {}, "search": {"seed": 0}}
    before["evaluation"], now["evaluation"] = {"mesh": None}, {"mesh": {"data": 2}}  # no result depends on it
    found = [text for key in before for text in changed_settings(before[key], now[key], key)]
    assert found == ["tasks.a.head.source ('x', now 'y')", "merge.scale (1.0, now None)"]
