"""How exported files were made: ``enmp_config.yaml`` and what the model card says."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from enmp_jax.adapters.peft_files import WEIGHTS
from enmp_jax.adapters.peft_import import Adapter, LoadedAdapters
from enmp_jax.io.hub import hub_id
from enmp_jax.version import __version__


@dataclass(frozen=True)
class Recipe:
    """What the merge did, for people and for repeating it.

    Attributes:
        merge: ``method``, ``space``, ``scale`` and the hyperparameters in use.
        pruned: modules left out, by name: (layer, task) or (layer, projection, task).
        seed: of the search; None when there was none.
        scores: as ``scores.json`` of a run, if the merge was evaluated.
    """

    merge: Mapping[str, Any] = field(default_factory=dict)
    pruned: Sequence[Sequence[Any]] = ()
    seed: int | None = None
    scores: Mapping[str, Any] | None = None


def config_yaml(kind: str, loaded: LoadedAdapters, recipe: Recipe, base: str | None, **options: Any) -> str:
    """``enmp_config.yaml``: adapters with their hashes, merge, pruned modules, versions, command.

    Local adapters are named by the last part of their path, so that publishing the file tells
    nothing of the machine; the hash says whether a file found again is the same one.

    Args:
        kind: the ``--format``.
        loaded: the adapters.
        recipe: the merge.
        base: name of the base model.
        options: more settings of the format (``rank``, ``dtype``); None ones are left out.
    """
    data = {
        "format": kind,
        "base_model": public_name(base),
        "tasks": [
            {"name": task, "adapter": adapter_name(adapter), "sha256": _sha256(adapter)}
            for task, adapter in loaded.adapters.items()
        ],
        "merge": plain(recipe.merge),
        "pruned": plain(recipe.pruned),
        "options": {key: value for key, value in options.items() if value is not None},
        "seed": recipe.seed,
        "scores": plain(recipe.scores),
        "versions": versions(),
    }
    line = command(kind, loaded, recipe, **options)
    return f"# Written by enmp-jax {__version__}. To repeat it:\n#   {line}\n" + yaml.safe_dump(
        data, sort_keys=False, allow_unicode=True
    )


def command(kind: str, loaded: LoadedAdapters, recipe: Recipe, **options: Any) -> str:
    """The ``enmp merge`` command line that makes the same files."""
    words = ["enmp", "merge"]
    for task, adapter in loaded.adapters.items():
        words += ["--adapter", f"{task}={adapter_name(adapter)}"]
    for key, value in {**recipe.merge, **options}.items():
        flag = f"--{key.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif isinstance(value, list | tuple):
            words += [flag, *map(str, value)]
        elif value is not None and value is not False:
            words += [flag, str(value)]
    for module in recipe.pruned:
        words += ["--prune", ":".join(map(str, module))]
    return shlex.join([*words, "--format", kind, "--out", "DIR"])


def adapter_name(adapter: Adapter) -> str:
    """Hub id with its commit, or the last part of a local path."""
    if adapter.commit:
        return f"{adapter.source.partition('@')[0]}@{adapter.commit}"
    return adapter.directory.resolve().name


def public_name(name: str | None) -> str | None:
    """A model's name with nothing of this machine's directories in it."""
    if not name:
        return None
    return name if hub_id(name) else Path(name).name


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("jax", "jaxlib", "numpy", "safetensors")
    return {
        "enmp-jax": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def plain(value: Any) -> Any:
    """Lists, dicts and Python numbers only, ready for YAML."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def _sha256(adapter: Adapter) -> str:
    with open(adapter.directory / WEIGHTS, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
