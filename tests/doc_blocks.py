"""The code blocks of the pages: commands, Python, YAML and JSON, as a reader would copy them."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
GENERATED = {"run-file.md"}  # compared with the code in test_config.py
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.name not in GENERATED)]
TORCH = re.compile(r"^(from|import) (torch|peft|transformers|lm_eval)\b", re.MULTILINE)
"""Blocks that import these are run by tests/reference."""


class Block(NamedTuple):
    """A code block of a page, and the line that it begins on."""

    language: str
    text: str
    line: int


def blocks(page):
    """All blocks of a page: fenced ones, and indented ones, which have no language."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(m[1], m[2], text[: m.start()].count("\n") + 2)
        for m in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]
    plain = re.sub(r"^```.*?^```$", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    for m in re.finditer(r"(?<=\n\n)((?: {4}[^ \n].*\n)(?: {4}.*\n)*)", plain):
        found.append(
            Block("", re.sub(r"^ {4}", "", m[1], flags=re.MULTILINE), plain[: m.start()].count("\n") + 1)
        )
    return found


def of(page, *languages):
    """The blocks of a page in these languages, in their order."""
    return [block for block in blocks(page) if block.language in languages]


def commands(text):
    """The ``enmp`` commands of a shell block, as lists of words, what another shell runs included."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    for line in lines:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue  # prose in an indented block
        for inner in [
            words,
            *(shlex.split(word) for word in words if " enmp " in f" {word} " and " " in word),
        ]:
            while "enmp" in inner:
                inner = inner[inner.index("enmp") + 1 :]
                ends = [i for i, word in enumerate(inner) if word in ("&&", "|", ">", "enmp")]
                yield inner[: min(ends, default=len(inner))]


def printed(page):
    """The commands of a page with their lines: of its shell blocks (the line where the block begins), and of
    sentences and tables.

    A bare name such as ``enmp compare`` in a sentence speaks of the command and is none.
    """
    found = []
    for block in of(page, "sh", "bash"):
        for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
            plain = re.sub(r"\s+#.*$", "", line)
            apart = plain.split(" && ") if "'" not in plain else [plain]  # a quoted one is another's argument
            found += [(block.line, " ".join(command.split())) for command in apart if command]
    prose = re.sub(
        r"^```.*?^```$", lambda m: "\n" * m[0].count("\n"), page.read_text(), flags=re.DOTALL | re.MULTILINE
    )
    for m in re.finditer(r"`((?:[A-Z_]+=\S+ )?(?:enmp|make|pip|source|git)\s[^`]+)`", prose):
        command = " ".join(m[1].split())
        if not re.fullmatch(r"enmp [a-z]+", command):
            found.append((prose.count("\n", 0, m.start()) + 1, command))
    return sorted(found, key=lambda one: one[0])
