"""How exported files were made: ``enmp_config.yaml`` and what the model card says."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from enmp_jax.adapters.peft_files import WEIGHTS
from enmp_jax.adapters.peft_import import Adapter, LoadedAdapters
from enmp_jax.io.hub import hub_id
from enmp_jax.masks import MaskSpec
from enmp_jax.version import __version__


@dataclass(frozen=True)
class Recipe:
    """What the merge did, for people and for repeating it.

    Attributes:
        merge: ``method``, ``space``, ``scale`` and the hyperparameters in use.
        pruned: modules left out, by name: (layer, task) or (layer, projection, task).
        seed: of the search; None when there was none.
        scores: as ``scores.json`` of a run, if the merge was evaluated.
        weights: modules whose weight is not 1, pruned ones among them, as ``MaskSpec.weighted_modules``
            lists them: (layer, task, weight) or (layer, projection, task, weight).
    """

    merge: Mapping[str, Any] = field(default_factory=dict)
    pruned: Sequence[Sequence[Any]] = ()
    seed: int | None = None
    scores: Mapping[str, Any] | None = None
    weights: Sequence[Sequence[Any]] = ()

    @property
    def between(self) -> list[Sequence[Any]]:
        """Those of ``weights`` that are not pruned."""
        return [entry for entry in self.weights if entry[-1]]


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
        **({"weights": plain(recipe.weights)} if recipe.weights else {}),
        "options": {key: value for key, value in options.items() if value is not None},
        "seed": recipe.seed,
        "scores": plain(recipe.scores),
        "versions": versions(),
    }
    line = command(kind, loaded, recipe, **options)
    comment = textwrap.indent(line, "#   ", lambda _: True)
    return f"# Written by enmp-jax {__version__}. To repeat it:\n{comment}\n" + yaml.safe_dump(
        data, sort_keys=False, allow_unicode=True
    )


def command(kind: str, loaded: LoadedAdapters, recipe: Recipe, **options: Any) -> str:
    """The ``enmp merge`` command line that makes the same files; weights are in ``mask.json``."""
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
    if recipe.weights:
        words += ["--mask", "mask.json"]
    else:
        for module in recipe.pruned:
            words += ["--prune", ":".join(map(str, module))]
    return shlex.join([*words, "--format", kind, "--out", "DIR"])


def mask_text(loaded: LoadedAdapters, recipe: Recipe) -> str:
    """``mask.json`` of a recipe, which ``enmp merge --mask`` takes."""
    finer = any(len(module) == 3 for module in (*recipe.pruned, *(entry[:-1] for entry in recipe.weights)))
    spec = MaskSpec.of(loaded.stack, "projection" if finer else "layer")
    if recipe.weights:
        keep = spec.keep_from_weights(recipe.weights, recipe.pruned)
    else:
        keep = spec.keep_from_pruned(recipe.pruned)
    data = spec.to_json(keep, recipe.merge.get("scale"), plain(recipe.merge))
    return json.dumps(data, indent=1) + "\n"


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
