"""The run directory: what a search leaves on disk, written so that nothing is lost or half written."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import yaml

from enmp_jax.config.compose import read_yaml
from enmp_jax.config.run_file import RunConfig
from enmp_jax.config.schema import parse, to_dict
from enmp_jax.errors import UserError, one_line, reason
from enmp_jax.io.checkpoints import fingerprint
from enmp_jax.io.files import is_temporary, read_json, remove_leftovers
from enmp_jax.io.lock import NAME as LOCK
from enmp_jax.io.lock import Lock
from enmp_jax.io.signals import GO_ON
from enmp_jax.io.writing import write_file
from enmp_jax.runs.provenance import changed_inputs, changed_settings, of_search, only_results

PACKAGES = ("jax", "jaxlib", "flax", "optax", "evosax", "transformers", "orbax-checkpoint", "numpy")


_BEGUN = ("fingerprints.json", "environment.json")
"""Written before ``config.yaml``, with which a run directory is complete."""
_SEARCH = ("checkpoints", "history.jsonl", "effects.json")
_RESULTS = (
    "mask.json", "seeds.json", "scores.json", "test-answers.json", "controls.json", "compare.json",
    "adapters", "merged", "refined", "plots", "report.html",
)  # fmt: skip
_EARLIER = re.compile(r"earlier-\d+")


class RunDirectory:
    """A directory of one search: config, environment, history, checkpoints, results.

    Only process 0 of a multi-host run writes; the others hold the same object and write nothing. A lock keeps
    other runs out until ``close``; as a context manager it closes itself.
    """

    def __init__(
        self,
        path: str | Path,
        resume: bool = False,
        anyway: bool = False,
        say: Callable[[str], None] = print,
    ):
        """Check that ``path`` can be written to; a new one is not created yet.

        Args:
            path: the directory.
            resume: go on with the run that is there.
            anyway: and where what it was made of has changed, begin the part that depends on it anew.
            say: told of what dead processes left there.

        Raises:
            UserError: it is a file, is not empty (and not resumed), is in use, or cannot be created.
        """
        self.path, self.anyway, self.say = Path(path), anyway, say
        self.writes = jax.process_index() == 0
        self.fingerprint = ""  # of the settings, once started
        self._lock: Lock | None = None
        try:
            parent = next(p for p in [self.path, *self.path.parents] if p.exists())
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"{self.path} is a file: give --out a directory")
            self.resumed = self._is_run()
            occupied = self.resumed or (self.path.is_dir() and not all(map(_of_start, self.path.iterdir())))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot make the directory {one_line(path)}: {reason(error)}") from None
        if occupied and not (resume or anyway):
            raise UserError(f"{self.path} is not empty: choose another --out, or --resume to continue it")
        if occupied and not self.resumed:
            raise UserError(f"{self.path} is not a run directory (no config.yaml): choose another --out")
        if not os.access(parent, os.W_OK):
            raise UserError(f"{self.path} cannot be written to: no permission in {parent}")
        if self.resumed:
            self._take()

    def _is_run(self) -> bool:
        return (self.path / "config.yaml").exists()

    def _take(self) -> None:
        if self.writes:
            self._lock = Lock(self.path, self.say)
            remove_leftovers(self.path)

    def start(self, run: RunConfig, made_of: Mapping[str, str] | None = None) -> None:
        """Create the directory with the resolved config and the environment, or check it against them.

        Args:
            run: the run.
            made_of: name -> hash of what else the results depend on (see ``provenance``); None: not checked.

        Raises:
            UserError: a resumed run had another config or was made of something else, or the directory
                cannot be made.
        """
        config = to_dict(run)
        self.fingerprint = fingerprint(of_search(config))
        if not self.writes:
            return
        if self.resumed and not self._same(config, made_of):
            self.resumed = False
        try:
            if self._lock is None:
                self.path.mkdir(parents=True, exist_ok=True)
                self._take()
                if self._is_run():  # made while this process was loading
                    raise UserError(f"{self.path} is not empty: another process has just begun a run there")
            if made_of is not None and not (self.resumed and (self.path / _BEGUN[0]).exists()):
                self.write_json("fingerprints.json", dict(made_of))
            if not (self.resumed and (self.path / _BEGUN[1]).exists()):
                self.write_json("environment.json", environment() | {"root": str(run.root)})
            if not self.resumed:  # last: with it the directory is one of a run
                self.write("config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {reason(error)}") from None

    def _same(self, config: dict[str, Any], made_of: Mapping[str, str] | None) -> bool:
        """Whether the run that is there is this one; if not, what does not hold any more is set aside."""
        path = self.path / "config.yaml"
        # through the schema: keys that have come or gone since then do not count as changes
        before = to_dict(parse(RunConfig, read_yaml(path), str(path)))
        changes = [text for key in config for text in changed_settings(before[key], config[key], key)]
        what = "other settings"
        if made_of is not None:
            recorded = self.path / _BEGUN[0]
            if not recorded.exists():
                inputs = ["what it was made of, which an older version did not record"]
            else:
                inputs = changed_inputs(read_json(recorded), made_of)
            what = "other settings or files" if inputs else what
            changes += inputs
        if not changes:
            return True
        if not self.anyway:
            raise UserError(
                f"{self.path} was started with {what}: changed {_listed(changes)}; restore that, choose "
                "another --out, or give --resume-anyway to begin anew what depends on it"
            )
        parts = _RESULTS if only_results(changes) else (*_SEARCH, *_RESULTS)
        aside = self._set_aside(
            (*parts, *_BEGUN, "config.yaml")
        )  # config.yaml last: a kill repeats the refusal
        again = "results" if parts is _RESULTS else "the search"
        self.say(f"changed {_listed(changes)}: {again} anew; what was there is in {aside}")
        return False

    def _set_aside(self, names: Sequence[str]) -> Path:
        number = next(n for n in itertools.count(1) if not (self.path / f"earlier-{n}").exists())
        aside = self.path / f"earlier-{number}"
        aside.mkdir()
        for name in names:
            if (self.path / name).exists():
                (self.path / name).rename(aside / name)
        return aside

    def close(self) -> None:
        """Let others have the directory."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, UserError) and self._is_run():
            error.add_note(GO_ON)
        self.close()

    def write(self, name: str, text: str) -> None:
        """Write a file whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        if self.writes:
            write_file(self.path / name, lambda temporary: temporary.write_bytes(text.encode()))

    def write_json(self, name: str, data: Any) -> None:
        """Write JSON, whole or not at all."""
        self.write(name, json.dumps(data, indent=1, allow_nan=False) + "\n")

    def append_history(self, record: dict[str, Any]) -> None:
        """Add a line to ``history.jsonl``.

        Raises:
            UserError: the disk is full, ...
        """
        if self.writes:
            path = self.path / "history.jsonl"
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise UserError(
                    f"cannot write {path}: {reason(error)}; --resume goes on from the newest checkpoint"
                ) from None

    def flush_history(self) -> None:
        """Have ``history.jsonl`` on disk: a checkpoint that outlives a power cut must find its lines."""
        path = self.path / "history.jsonl"
        if self.writes and path.exists():
            with path.open("rb+") as file:
                os.fsync(file.fileno())

    def keep_history(self, generations: int, seed: int | None = None) -> None:
        """Drop history from generation ``generations`` on (of one seed): a resumed search repeats it."""
        path = self.path / "history.jsonl"
        if not self.writes or not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                if (seed is not None and record["seed"] != seed) or record["generation"] < generations:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a killed run
        self.write(path.name, "".join(kept))


def _of_start(path: Path) -> bool:
    """Whether it is in nobody's way: left by a killed start, or an earlier run that was set aside."""
    return path.name in (LOCK, *_BEGUN) or is_temporary(path) or _EARLIER.fullmatch(path.name) is not None


def _listed(changes: list[str]) -> str:
    shown = ", ".join(changes[:6])
    return shown + (f" and {len(changes) - 6} more" if len(changes) > 6 else "")


def finished(path: Path) -> tuple[RunConfig, dict[str, Any]]:
    """The run file and the scores of a finished search.

    Raises:
        UserError: something is missing or damaged.
    """
    for name in ("config.yaml", "environment.json", "mask.json", "scores.json"):
        if not (path / name).exists():
            raise UserError(f"{path} is no directory of a finished search: {name} is missing")
    run = parse(RunConfig, read_yaml(path / "config.yaml"), str(path / "config.yaml"))
    root = read_json(path / "environment.json").get("root", ".")
    return dataclasses.replace(run, root=Path(root)), read_json(path / "scores.json")


def environment() -> dict[str, Any]:
    """Versions, machine and commit: what a figure needs beside it."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "enmp_jax": metadata.version("enmp-jax"),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _commit() -> str | None:
    try:
        root = Path(__file__).parent
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
