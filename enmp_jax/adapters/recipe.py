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

from enmp_jax.adapters import single_file
from enmp_jax.adapters.peft_import import Adapter, LoadedAdapters
from enmp_jax.io.hub import hub_id
from enmp_jax.masks import Keep, MaskSpec
from enmp_jax.version import __version__

RECIPE = "enmp_config.yaml"


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
        run: name of the run directory that it is exported from.
        refined: settings of the LoRA that was trained from the merge; None where there is none.
        exported: scores of the exported model itself, where it is not the one that was scored:
            ``rank``, ``error``, ``accuracy`` by task and ``mean_normalised``.
    """

    merge: Mapping[str, Any] = field(default_factory=dict)
    pruned: Sequence[Sequence[Any]] = ()
    seed: int | None = None
    scores: Mapping[str, Any] | None = None
    weights: Sequence[Sequence[Any]] = ()
    run: str | None = None
    refined: Mapping[str, Any] | None = None
    exported: Mapping[str, Any] | None = None

    @property
    def between(self) -> list[Sequence[Any]]:
        """Those of ``weights`` that are not pruned."""
        return [entry for entry in self.weights if entry[-1]]


def config_yaml(
    kind: str,
    loaded: LoadedAdapters,
    recipe: Recipe,
    base: str | None,
    error: float | None = None,
    **options: Any,
) -> str:
    """``enmp_config.yaml``: adapters with their hashes, merge, pruned modules, versions, command.

    Local adapters are named by the last part of their path, so that publishing the file tells
    nothing of the machine; the hash says whether a file found again is the same one.

    Args:
        kind: the ``--format``.
        loaded: the adapters.
        recipe: the merge.
        base: name of the base model.
        error: relative error that the files have, where there is one to claim.
        options: more settings of the format (``rank``, ``dtype``); None ones are left out.
    """
    names = adapter_names(loaded)
    data = {
        "format": kind,
        "base_model": public_name(base),
        "tasks": [
            {"name": task, "adapter": names[task], "sha256": sha256(adapter)}
            for task, adapter in loaded.adapters.items()
        ],
        "merge": plain(recipe.merge),
        "pruned": plain(recipe.pruned),
        **({"weights": plain(recipe.weights)} if recipe.weights else {}),
        "options": {key: value for key, value in options.items() if value is not None},
        **({} if error is None else {"error": error}),
        "seed": recipe.seed,
        **({"refined": plain(recipe.refined)} if recipe.refined else {}),
        "scores": plain(recipe.scores),
        **({"exported": plain(recipe.exported)} if recipe.exported else {}),
        "versions": versions(),
    }
    line = command(kind, loaded, recipe, **options)
    comment = textwrap.indent(line, "#   ", lambda _: True)
    how = f"To repeat it, {where(loaded, recipe)}:"
    return f"# Written by enmp-jax {__version__}. {how}\n{comment}\n" + yaml.safe_dump(
        data, sort_keys=False, allow_unicode=True
    )


def command(kind: str, loaded: LoadedAdapters, recipe: Recipe, **options: Any) -> str:
    """The command line that makes the same files, to be run ``where`` says."""
    if _from_run(loaded, recipe):
        if recipe.refined is not None:
            given = {key: recipe.refined[key] for key in ("rank", "steps", "learning_rate", "fitness")}
            words = ["enmp", "refine", str(recipe.run)]
        else:
            given = {key: value for key, value in options.items() if key != "base_model"}
            words = ["enmp", "export", str(recipe.run), "--format", kind]
        return shlex.join([*words, *_flags(given), "--out", "DIR"])
    words = ["enmp", "merge"]
    for task, name in adapter_names(loaded).items():
        words += ["--adapter", f"{task}={name}"]
    if options.get("base_model") is None and any(x.settings.needs_base for x in loaded.adapters.values()):
        options["base_model"] = public_name(loaded.base_model) or "BASE"
    words += _flags({**recipe.merge, **options})
    if recipe.weights:
        words += ["--mask", "mask.json"]
    else:
        for module in recipe.pruned:
            words += ["--prune", ":".join(map(str, module))]
    return shlex.join([*words, "--format", kind, "--out", "DIR"])


def where(loaded: LoadedAdapters, recipe: Recipe) -> str:
    """Where ``command`` runs as it is printed."""
    if _from_run(loaded, recipe):
        return f"beside the run directory {recipe.run}"
    mask = ["mask.json from here"] if recipe.weights else []
    local = ["the adapters under these names"] if _local(loaded) else []
    needed = " and ".join([*local, *mask])
    return f"in a directory with {needed}" if needed else "anywhere"


def _flags(options: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif isinstance(value, list | tuple):
            words += [flag, *map(str, value)]
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return words


def _local(loaded: LoadedAdapters) -> bool:
    return not all(adapter.commit for adapter in loaded.adapters.values())


def _from_run(loaded: LoadedAdapters, recipe: Recipe) -> bool:
    """Whether the run directory repeats it: adapters of the hub are found without it, by everybody.

    Random methods draw by the names of modules, which a run takes from its backbone.
    """
    renamed = any(list(paths) != loaded.stack.paths(name) for name, paths in loaded.names.items())
    return recipe.run is not None and (recipe.refined is not None or renamed or _local(loaded))


def mask_of(loaded: LoadedAdapters, recipe: Recipe) -> tuple[MaskSpec, Keep]:
    """The modules of a recipe, and its mask or weights on them.

    Raises:
        UserError: it names modules that these adapters do not have.
    """
    finer = any(len(module) == 3 for module in (*recipe.pruned, *(entry[:-1] for entry in recipe.weights)))
    spec = MaskSpec.of(loaded.stack, "projection" if finer else "layer")
    if recipe.weights:
        return spec, spec.keep_from_weights(recipe.weights, recipe.pruned)
    return spec, spec.keep_from_pruned(recipe.pruned)


def mask_text(loaded: LoadedAdapters, recipe: Recipe) -> str:
    """``mask.json`` of a recipe, which ``enmp merge --mask`` takes."""
    spec, keep = mask_of(loaded, recipe)
    made_of = plain(recipe.merge), hashes(loaded), loaded.spelling
    data = spec.to_json(keep, recipe.merge.get("scale"), *made_of)
    return json.dumps(data, indent=1) + "\n"


def adapter_names(loaded: LoadedAdapters) -> dict[str, str]:
    """Task -> hub id with its commit, or the last part of a local path (the task's name if two share it)."""
    last = {
        task: adapter.file if single_file.is_one(adapter.source) else adapter.directory.resolve().name
        for task, adapter in loaded.adapters.items()
    }
    distinct = len(set(last.values())) == len(last)
    return {
        task: f"{adapter.source.partition('@')[0]}@{adapter.commit}"
        if adapter.commit
        else last[task]
        if distinct
        else task
        for task, adapter in loaded.adapters.items()
    }


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


def hashes(loaded: LoadedAdapters) -> dict[str, str]:
    """Task -> hash of its adapter."""
    return {task: sha256(adapter) for task, adapter in loaded.adapters.items()}


def sha256(adapter: Adapter) -> str:
    """Hash of an adapter's weights, which tells it from all others."""
    with open(adapter.directory / adapter.file, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
