"""Every key of a run file with its type, default and meaning, read off the dataclasses: ``docs/run-file.md``.

python -m enmp_jax.config.reference > docs/run-file.md
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
import types
import typing
from typing import Any, Literal, NamedTuple

from enmp_jax.config import schema
from enmp_jax.config.run_file import RunConfig


class Key(NamedTuple):
    """One key of a section.

    Attributes:
        name: as in the file.
        type: in words.
        default: as YAML has it; None where a value is needed.
        help: from the docstring below the field; empty where the name says it all.
        section: the dataclass below it, if it is a section or a list of sections.
    """

    name: str
    type: str
    default: str | None
    help: str
    section: type | None


def keys_of(cls: type) -> list[Key]:
    """The keys of a section in the order of the file."""
    helps, hints = _field_docs(cls), typing.get_type_hints(cls)
    return [
        Key(name, _type(hints[name]), _default(f), helps.get(name, ""), schema.section(cls, name))
        for name, f in schema.keys(cls).items()
    ]


def reference() -> str:
    """The page, in Markdown."""
    lines = [
        "# Run files",
        "",
        "<!-- Made by `python -m enmp_jax.config.reference > docs/run-file.md`; a test compares. -->",
        "",
        "A run file is YAML. Relative paths start from its directory; `package:` is a file of the package;",
        "other names are hub ids (`name@revision`). `extends: FILE` lays it over another run file, and",
        "`--set KEY=VALUE` over both. Unknown keys, and keys given twice, are errors.",
        "`enmp init ADAPTER... > run.yaml` writes one.",
        "",
    ]
    lines += _section("The file", RunConfig, ())
    done, waiting = {RunConfig}, [((key.name,), key.section) for key in keys_of(RunConfig) if key.section]
    while waiting:
        path, cls = waiting.pop(0)
        assert cls is not None
        title = f"`{'.'.join(path)}`"
        if cls in done:
            continue
        done.add(cls)
        lines += _section(title, cls, path)
        waiting = [((*path, key.name), key.section) for key in keys_of(cls) if key.section] + waiting
    return "\n".join(lines).rstrip() + "\n"


def _section(title: str, cls: type, path: tuple[str, ...]) -> list[str]:
    lines = [f"## {title}", "", *textwrap.wrap(_words(inspect.getdoc(cls) or ""), 110), ""]
    lines += ["| key | type | default | |", "|---|---|---|---|"]
    for key in keys_of(cls):
        default = "**needed**" if key.default is None else f"`{key.default}`"
        help_ = key.help or ("see below" if key.section else "")
        cells = (f"`{key.name}`", key.type, default, help_)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def _field_docs(cls: type) -> dict[str, str]:
    """Field -> the string that stands below it in the source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for before, node in zip(tree.body, tree.body[1:]):
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name):
            text = (
                node.value.value
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                else None
            )
            if isinstance(text, str):
                found[before.target.id] = _words(text)
    return found


def _words(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def _type(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return "section"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(option) for option in args if option is not type(None))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin is tuple:
        return f"list of {_plural(args[0])}"
    if hint in (str, int, float, bool):
        return {str: "text", int: "whole number", float: "number", bool: "true or false"}[hint]
    return "mapping"


def _plural(hint: Any) -> str:
    plain = _type(hint)
    return {"section": "sections", "text": "texts", "whole number": "whole numbers", "number": "numbers"}.get(
        plain, plain
    )


def _default(f: dataclasses.Field[Any]) -> str | None:
    if f.default is not dataclasses.MISSING:
        value = f.default
    elif f.default_factory is not dataclasses.MISSING:
        value = f.default_factory()
    else:
        return None
    if dataclasses.is_dataclass(value):
        return "{}"
    return as_yaml(schema.to_dict(value))


def as_yaml(value: Any) -> str:
    """A plain value on one line, as YAML has it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_yaml, value))}]"
    return str(value)


if __name__ == "__main__":
    sys.stdout.write(reference())
