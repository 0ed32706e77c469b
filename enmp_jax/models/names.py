"""How Hugging Face files, transformers 5 and PEFT adapters spell the names of a family's parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Spelling:
    """Spellings of one family.

    A *plain* name is the name in transformers 5's memory without the model's prefix:
    ``layers.3.attention.q_proj.weight``, and ``layers.{}.attention.q_proj.weight`` for all layers.

    Attributes:
        prefix: in front of plain names, in the transformers 5 model that adapters are loaded on and in the
            files that ``save`` writes (``vit.``).
        unprefixed: plain names that have no prefix in files (projections, language-model heads).
        aliases: (spelling in the files that ``save`` writes, plain spelling) of dotted parts, in order.
        old_aliases: the same for spellings that are only read.
        ignored: regular expression of the beginning of plain names that a file may hold and nobody reads.
        heads: names of classification heads, read by ``load_head``.
    """

    prefix: str
    unprefixed: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    old_aliases: tuple[tuple[str, str], ...] = ()
    ignored: str = r"(?!)"
    heads: tuple[str, ...] = ()

    def plain(self, name: str) -> str:
        """The plain name of any known spelling."""
        before = None
        while name != before:
            before, name = name, name.removeprefix(_PEFT_PREFIX).removeprefix(self.prefix)
        for old, new in (*self.old_aliases, *self.aliases):
            name = _replace(name, old, new)
        return name

    def in_file(self, plain: str) -> str:
        """The name that ``save`` writes for a plain name."""
        if plain in self.unprefixed:
            return plain
        for old, new in self.aliases:
            plain = _replace(plain, new, old)
        return self.prefix + plain

    def is_ignored(self, plain: str) -> bool:
        """Whether a tensor may be left unread (other poolers, heads, buffers)."""
        return plain.rsplit(".", 1)[0] in self.heads or re.match(self.ignored, plain) is not None


def split_index(plain: str) -> tuple[str, int | None]:
    """A plain name with ``{}`` for its layer's index, and the index; None if it has none."""
    found = _INDEX.search(plain)
    return (_INDEX.sub("{}", plain, count=1), int(found.group())) if found else (plain, None)


def _replace(name: str, old: str, new: str) -> str:
    return f".{name}.".replace(f".{old}.", f".{new}.")[1:-1]
