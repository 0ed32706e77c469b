"""The run directory: what a search leaves on disk, written so that nothing is lost or half written."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import yaml

from enmp_jax.config.run_file import RunConfig
from enmp_jax.config.schema import parse, to_dict
from enmp_jax.errors import UserError
from enmp_jax.io.checkpoints import fingerprint
from enmp_jax.io.files import read_json, write_bytes

PACKAGES = ("jax", "jaxlib", "flax", "optax", "evosax", "transformers", "orbax-checkpoint", "numpy")


class RunDirectory:
    """A directory of one search: config, environment, history, checkpoints, results.

    Only process 0 of a multi-host run writes; the others hold the same object and write nothing.
    """

    def __init__(self, path: str | Path, resume: bool = False):
        """Check that ``path`` can be written to; nothing is created yet.

        Raises:
            UserError: it is a file, is not empty (and not resumed), or cannot be created.
        """
        self.path = Path(path)
        self.writes = jax.process_index() == 0
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file: give --out a directory")
        occupied = self.path.is_dir() and any(self.path.iterdir())
        if occupied and not resume:
            raise UserError(f"{self.path} is not empty: choose another --out, or --resume to continue it")
        if resume and occupied and not (self.path / "config.yaml").exists():
            raise UserError(f"{self.path} is not a run directory (no config.yaml): choose another --out")
        parent = next(p for p in [self.path, *self.path.parents] if p.exists())
        if not os.access(parent, os.W_OK):
            raise UserError(f"{self.path} cannot be written to: no permission in {parent}")
        self.resumed = occupied
        self.fingerprint = ""  # of the settings, once started

    def start(self, run: RunConfig) -> None:
        """Create the directory with the resolved config and the environment.

        Raises:
            UserError: a resumed run had another config.
        """
        config = to_dict(run)
        self.fingerprint = fingerprint(config)
        if self.resumed:
            path = self.path / "config.yaml"
            # through the schema: keys that have come or gone since then do not count as changes
            before = to_dict(parse(RunConfig, yaml.safe_load(path.read_text(encoding="utf-8")), str(path)))
            changed = [key for key in config if config[key] != before[key]]
            if changed:
                raise UserError(f"{self.path} was started with other settings for {', '.join(changed)}")
            return
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write("config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
            self.write_json("environment.json", environment() | {"root": str(run.root)})

    def write(self, name: str, text: str) -> None:
        """Write a file whole or not at all."""
        if self.writes:
            write_bytes(self.path / name, text.encode())

    def write_json(self, name: str, data: Any) -> None:
        """Write JSON, whole or not at all."""
        self.write(name, json.dumps(data, indent=1, allow_nan=False) + "\n")

    def append_history(self, record: dict[str, Any]) -> None:
        """Add a line to ``history.jsonl``."""
        if self.writes:
            with (self.path / "history.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def keep_history(self, generations: int, seed: int | None = None) -> None:
        """Drop history from generation ``generations`` on (of one seed): a resumed search repeats it."""
        path = self.path / "history.jsonl"
        if not self.writes or not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the last line of a killed run
            if (seed is not None and record["seed"] != seed) or record["generation"] < generations:
                kept.append(line + "\n")
        write_bytes(path, "".join(kept).encode())


def finished(path: Path) -> tuple[RunConfig, dict[str, Any]]:
    """The run file and the scores of a finished search.

    Raises:
        UserError: something is missing or damaged.
    """
    for name in ("config.yaml", "environment.json", "mask.json", "scores.json"):
        if not (path / name).exists():
            raise UserError(f"{path} is no directory of a finished search: {name} is missing")
    data = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    run = parse(RunConfig, data, str(path / "config.yaml"))
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
