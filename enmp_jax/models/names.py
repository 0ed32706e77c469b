"""Key tables: how Hugging Face files, transformers 5 and PEFT adapters spell a family's parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class KeyTable:
    """Spellings of one family.

    A *plain* name is the transformers 5 in-memory name without the model prefix, with ``{}`` for the
    layer index: ``layers.{}.attention.q_proj``.

    Attributes:
        prefix: in front of plain names in the transformers 5 model that adapters are loaded on.
        file_prefix: in front of names in checkpoint files that ``save`` writes.
        prefixes: prefixes to strip from keys of files and adapters, repeatedly.
        layer: plain prefix of a layer, ``layers.{}.``.
        modules: block short name (q, k, v, o, up, down, gate) -> plain name inside a layer.
        norms: block norm name (norm1, norm2, q_norm, k_norm) -> plain name inside a layer.
        other: path in our parameters, joined by ``/`` -> plain name of the remaining parameters.
        unprefixed: plain names of ``other`` that stand outside the model prefix (projections, LM heads).
        aliases: (spelling of files that ``save`` writes, plain spelling) of dotted segments, in order.
        old_aliases: the same for spellings that are only read.
        ignored: regular expression of plain names that may be in a file and are not read.
        heads: names of classification heads, read by ``load_head``.
    """

    prefix: str
    file_prefix: str
    prefixes: tuple[str, ...]
    layer: str
    modules: Mapping[str, str]
    norms: Mapping[str, str]
    other: Mapping[str, str]
    unprefixed: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    old_aliases: tuple[tuple[str, str], ...] = ()
    ignored: str = r"(?!)"
    heads: tuple[str, ...] = ()

    def plain(self, key: str) -> str:
        """The plain name of any known spelling; layer indices stay."""
        stripped = True
        while stripped:
            stripped = False
            for prefix in self.prefixes:
                if key.startswith(prefix):
                    key, stripped = key.removeprefix(prefix), True
        for old, new in (*self.old_aliases, *self.aliases):
            key = _replace(key, old, new)
        return key

    def canonical(self, template: str) -> str | None:
        """The backbone's template for an adapter's template, None for anything else."""
        plain = self.plain(template)
        return self.prefix + plain if plain in self.templates() else None

    def templates(self) -> dict[str, str]:
        """Plain module template -> block short name."""
        return {self.layer + name: short for short, name in self.modules.items()}

    def modules_by_template(self) -> dict[str, str]:
        """Canonical module template -> block short name."""
        return {self.prefix + name: short for name, short in self.templates().items()}

    def path(self, plain: str) -> tuple[str, int | None] | None:
        """Where a plain parameter name goes in our parameters: (path, layer index or None)."""
        found = _INDEX.search(plain)
        template = _INDEX.sub("{}", plain, count=1) if found else plain
        path = self.paths().get(template)
        return None if path is None else (path, int(found.group()) if found else None)

    def paths(self) -> dict[str, str]:
        """Plain parameter name -> path in our parameters."""
        paths = {name: path for path, name in self.other.items()}
        for short, name in (*self.modules.items(), *self.norms.items()):
            for part in ("weight", "bias"):
                paths[f"{self.layer}{name}.{part}"] = f"layers/{short}/{part}"
        return paths

    def file_name(self, path: str) -> str:
        """The name that ``save`` writes for a path of our parameters, ``{}`` for the layer."""
        name = next(name for name, known in self.paths().items() if known == path)
        if name in self.unprefixed:
            return name
        for old, new in self.aliases:
            name = _replace(name, new, old)
        return self.file_prefix + name

    def is_ignored(self, plain: str) -> bool:
        """Whether a plain name may be left unread (pooler, heads, buffers)."""
        head = plain.rsplit(".", 1)[0]
        return head in self.heads or re.match(self.ignored, plain) is not None


def _replace(key: str, old: str, new: str) -> str:
    return f".{key}.".replace(f".{old}.", f".{new}.")[1:-1]
