"""Which tensor of a base model's files a module of the adapters is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from enmp_jax import models
from enmp_jax.adapters import single_file
from enmp_jax.adapters.matching import examples
from enmp_jax.adapters.stored import Storage, Stored, tensor_name
from enmp_jax.errors import UserError
from enmp_jax.io.files import is_file, read_json
from enmp_jax.io.hub import locate
from enmp_jax.io.reading import open_tensors, read_float
from enmp_jax.io.shard_index import find_shards
from enmp_jax.module_paths import split_layer

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
Canonical = Callable[[str], str | None]


def backbone_of(config: Mapping[str, Any]) -> models.Backbone | None:
    """The base's family, which knows how names are spelled; None for families without a backbone."""
    if config.get("model_type") not in models.FAMILIES:
        return None
    try:
        return models.build(config)
    except UserError:  # an unusual variant: its names can still be compared as they are
        return None


class BaseWeights:
    """The weights of a base model, read one at a time.

    Args:
        base: directory or hub id.

    Raises:
        UserError: nothing there, or damaged.
    """

    def __init__(self, base: str | Path) -> None:
        found = locate(base, ["*.safetensors", "*.json"], "base model", ownerless=True)
        self.directory = found.directory
        self._files: dict[str, Path] = {}
        for shard in find_shards(self.directory)[0]:
            with open_tensors(self.directory / shard) as handle:
                self._files |= dict.fromkeys(handle.keys(), self.directory / shard)

    def find(self, paths: Iterable[str], stored: Storage) -> dict[str, str]:
        """Module path -> name of the base's tensor; see ``match``.

        Raises:
            UserError: see ``match``.
        """
        config = self.directory / "config.json"
        backbone = backbone_of(read_json(config)) if is_file(config) else None
        return match(self._files, {p: tensor_name(p, stored) for p in paths}, backbone and backbone.canonical)

    def matrix(self, name: str, kept: Stored | None, shape: tuple[int, int]) -> np.ndarray:
        """A weight as the matrix [out, in] of float32 that a LoRA is added to.

        Raises:
            UserError: it has another shape than the adapter's.
        """
        with open_tensors(self._files[name]) as handle:
            tensor = read_float(handle, name, self._files[name]).astype(np.float32)
        matrix = (
            tensor.T if kept is not None and kept.kind == "transposed" else tensor.reshape(len(tensor), -1)
        )
        if matrix.shape != shape:
            raise UserError(
                f"{name} is {'x'.join(map(str, matrix.shape))} in the base model, but the adapter was "
                f"trained on {shape[0]}x{shape[1]}: it is another base"
            )
        return matrix


def match(tensors: Iterable[str], names: Mapping[str, str], canonical: Canonical | None) -> dict[str, str]:
    """Module path -> name of the base's tensor.

    Names are the same up to a prefix that one of them lacks (``model.``), or in the backbone's own spelling.

    Args:
        tensors: names in the base model's files.
        names: module path as the adapters' files spell it -> name of its tensor.
        canonical: ``Backbone.canonical``, where there is a backbone for the base.

    Raises:
        UserError: a module that the base does not have, or that may be several of its tensors.
    """
    known: dict[str, dict[tuple[str, ...], str]] = {}
    flat = any(map(single_file.is_flat, names))
    for name in tensors:
        path = name.removesuffix(".weight")
        template, numbers = _generic(single_file.dotted(path.replace(".", "_")) if flat else path)
        known.setdefault(template, {})[numbers] = name
    wanted: dict[str, dict[tuple[str, ...], str]] = {}
    by_tensor: dict[str, list[str]] = {}
    for path, name in names.items():
        by_tensor.setdefault(name, []).append(path)
        template, numbers = _generic(single_file.without_part(name.removesuffix(".weight")))
        wanted.setdefault(template, {})[numbers] = name
    where: dict[str, str] = {}
    missed: list[str] = []
    index = _ends(known)
    for template, modules in wanted.items():
        example = single_file.without_part(next(iter(modules.values())).removesuffix(".weight"))
        same = _same(template, example, known, index, canonical)
        if len(same) > 1:
            raise UserError(f"{template} may be {examples(same)} of the base model")
        if not same:
            missed.append(template)
            continue
        found = known[same[0]]
        for numbers, name in modules.items():
            if numbers not in found:
                raise UserError(f"the base model has no {name}: it is another base")
            where |= dict.fromkeys(by_tensor[name], found[numbers])
    if missed:
        raise UserError(
            f"the base model has {len(wanted) - len(missed)} of the {len(wanted)} adapted "
            f"projections; not {examples(missed)}, it has "
            f"{examples([t for t in known if 'norm' not in t.lower()])}"
        )
    return where


def _generic(path: str) -> tuple[str, tuple[str, ...]]:
    """A path with ``{}`` for all its numbers, and the numbers."""
    return _NUMBER.sub("{}", path), tuple(_NUMBER.findall(path))


def _ends(templates: Iterable[str]) -> dict[str, list[str]]:
    """End of a template, after a dot -> the templates that end so."""
    index: dict[str, list[str]] = {}
    for template in templates:
        parts = template.split(".")
        for i in range(len(parts)):
            index.setdefault(".".join(parts[i:]), []).append(template)
    return index


def _same(
    template: str,
    path: str,
    known: dict[str, dict[tuple[str, ...], str]],
    index: dict[str, list[str]],
    canonical: Canonical | None,
) -> list[str]:
    """The base's templates that a module's may be."""
    if template in known:
        return [template]
    own = None if canonical is None else canonical(split_layer(path)[0])
    if canonical is not None and own is not None:
        spelled = [(t, next(iter(found.values())).removesuffix(".weight")) for t, found in known.items()]
        return [t for t, example in spelled if canonical(split_layer(example)[0]) == own]
    parts = template.split(".")
    shorter = [".".join(parts[i:]) for i in range(1, len(parts))]
    return [*index.get(template, ()), *(end for end in shorter if end in known)]
