"""What a run was made of, by content: the code, base, adapters, heads and examples; and what has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from enmp_jax.errors import one_line
from enmp_jax.evaluation.loaded_run import LoadedRun
from enmp_jax.io.checkpoints import fingerprint
from enmp_jax.models import checkpoint
from enmp_jax.version import __version__, code_digest

_ONLY_RESULTS = ("search.refine", "search.finalists", "evaluation.test_examples")
_HOW_IT_RUNS = ("evaluation.mesh", "evaluation.member_chunk", "search.checkpoint_every")
"""Settings that change no result: a search may go on with others, say on fewer devices."""


def fingerprints(loaded: LoadedRun) -> dict[str, str]:
    """What it is, in words -> a hash of its content."""
    found = {
        "the code of enmp-jax": f"{__version__} {code_digest()}",
        "the base model": _base(loaded.base),
    }
    if loaded.run.merge.statistics is not None:
        found["the statistics"] = _file(Path(loaded.run.merge.statistics))
    for i, task in enumerate(loaded.tasks):
        factors = {name: (pair.a[:, i], pair.b[:, i]) for name, pair in loaded.stack.pairs.items()}
        found[f"the adapter of {task}"] = fingerprint(None, factors)
        found[f"the head of {task}"] = fingerprint(
            loaded.heads.normalise, jax.tree.map(lambda x, i=i: np.asarray(x)[i], loaded.heads)
        )
        for split, examples in loaded.examples.items():
            data = fingerprint(None, examples[i].inputs, examples[i].labels)
            found[f"the {split} data of {task}"] = data
    return found


def _base(base: str) -> str:
    """Hash of the configuration and weights of a base model."""
    directory = checkpoint.find(base)
    digest = hashlib.blake2b(repr(checkpoint.read_config(directory)).encode(), digest_size=20)
    for path in sorted(directory.glob("*.safetensors")):
        real = path.resolve()
        content = real.name  # in the hub's cache, the name of the real file is the hash of its content
        if not (path.is_symlink() and len(content) == 64):
            content = _file(path)
        digest.update(f"{path.name} {content} ".encode())
    return digest.hexdigest()


def _file(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def changed_inputs(before: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """The names whose hash differs, those that came or went included."""
    return [name for name in dict.fromkeys((*before, *now)) if before.get(name) != now.get(name)]


def changed_settings(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """``search.population (8, now 16)`` for each key of two plain configurations that differs."""
    if before == now or path in _HOW_IT_RUNS:
        return
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*before, *now)):
            yield from changed_settings(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now) and path == "tasks":
        for old, new in zip(before, now, strict=True):
            yield from changed_settings(old, new, f"{path}.{old.get('name')}")
    else:
        yield f"{path} ({one_line(repr(before), 60)}, now {one_line(repr(now), 60)})"


def only_results(changes: list[str]) -> bool:
    """Whether changes touch what comes after the search alone, so that its checkpoints still hold."""
    return all(change.startswith((*_ONLY_RESULTS, "the test data of")) for change in changes)


def of_search(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a plain configuration that the checkpoints of a search depend on."""
    kept = {section: dict(config[section]) for section in ("search", "evaluation")}
    for path in (*_ONLY_RESULTS, *_HOW_IT_RUNS):
        section, key = path.split(".")
        kept[section].pop(key, None)
    return {**config, **kept}
