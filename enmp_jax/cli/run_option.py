"""The run file that several commands take, with what the command line changes in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from enmp_jax import merges
from enmp_jax.config import compose, run_file
from enmp_jax.errors import UserError
from enmp_jax.io.files import read_json

RunFile = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN.yaml")]
Settings = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(
        metavar="KEY=VALUE",
        help="Change a key of the run file (``search.population=32``); may be given many times. "
        "A new ``merge.method`` brings its own hyperparameters.",
    ),
]


RunOrDirectory = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN.yaml|DIR")]


def load_run_or_directory(
    name: str, settings: Settings, skip_bad: bool = False
) -> tuple[run_file.RunConfig, Path | None]:
    """A run file, or that of a finished search by its directory, which comes second.

    Raises:
        UserError: as ``load_run_file``; or a directory that holds no finished search; or settings for one.
    """
    if not Path(name).is_dir():
        return load_run_file(name, settings, skip_bad), None
    if settings:
        raise UserError(f"--set changes a run file, and the search in {name} is finished: give its run file")
    from enmp_jax.runs.directory import finished

    config = finished(Path(name))[0]
    return (run_file.skip_bad_images(config) if skip_bad else config), Path(name)


def load_run_file(
    name: str, settings: Settings = (), skip_bad: bool = False, **overrides: Any
) -> run_file.RunConfig:
    """A run file, a packaged one by name, or that of a run directory, as the command line wants it.

    Args:
        name: path or packaged name.
        settings: ``--set``.
        skip_bad: leave out images that do not decode, in every task.
        overrides: of the ``search`` section, None ones left out; they win over ``settings``.

    Raises:
        UserError: a run file, setting, merge method or hyperparameter that cannot be.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    over = compose.settings(run_file.RunConfig, settings)
    directory = _run_directory(name)
    file = name if directory is None else str(directory / "config.yaml")
    loaded = run_file.load(file, over, {"search": given} if given else {})
    if directory is not None:  # its paths are relative to where the run was made from
        root = read_json(directory / "environment.json").get("root", ".")
        loaded = dataclasses.replace(loaded, root=Path(root))
    merge = loaded.merge
    try:
        merges.make(merge.method, merge.space, merge.isotropize, **merge.arguments())
    except UserError as error:
        raise UserError(f"{name}: merge: {error}") from None
    return run_file.skip_bad_images(loaded) if skip_bad else loaded


def _run_directory(name: str) -> Path | None:
    """A directory that holds a run; a packaged run file of the same name comes first."""
    path = Path(name)
    packaged = (run_file.SUITES / f"{name}.yaml").exists()
    return path if not packaged and (path / "config.yaml").exists() else None
