"""The run file that several commands take, with what the command line changes in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from enmp_jax.config import run_file

RunFile = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN.yaml")]


def load_run_file(name: str, skip_bad: bool = False, **overrides: Any) -> run_file.RunConfig:
    """A run file or packaged suite by name; ``overrides`` of its ``search`` section, None ones left out."""
    path = Path(name)
    packaged = run_file.SUITES / f"{name}.yaml"
    loaded = run_file.load(packaged if not path.exists() and packaged.exists() else path)
    if skip_bad:
        loaded = run_file.skip_bad_images(loaded)
    given = {key: value for key, value in overrides.items() if value is not None}
    return run_file.check(dataclasses.replace(loaded, search=dataclasses.replace(loaded.search, **given)))
