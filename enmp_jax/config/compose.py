"""Run files made of others: ``extends``, ``--set``, and the packaged run files by name.

Everything here happens to plain mappings, before they are checked: a run file's own keys lie over
those of the file that it extends, and settings of the command line over both.

- Mappings are put together key by key, and so are theirs; lists, tasks among them, are replaced whole.
- Where a ``merge`` section names its ``method``, the hyperparameters below it, which belong to another
  method, are dropped. Space, scale, scale_grid and what else every method takes stay.
- Relative paths go on meaning what they meant in the file that they stand in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from enmp_jax.config import schema
from enmp_jax.config.paths import SUITES, moved_path
from enmp_jax.errors import UserError, one_line, reason, shown, suggestion
from enmp_jax.io.files import is_file

_VARIANTS = "knots-methods"  # suite -> name -> merge section; SUITE-NAME is the suite with that section
_TABLES = ("prompts", _VARIANTS)  # what lies beside the packaged run files


_MAX_BYTES = 2**18
_MAX_VALUES = 100_000
_MAX_DEPTH = 50


class _Loader(yaml.SafeLoader):
    """YAML as in 1.2 where 1.1 surprises: a key given twice is an error, and 1e-3 a number."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    where = f"line {key.start_mark.line + 1}"
                    raise yaml.YAMLError(f"the key {key.value!r} is given twice ({where})")
                seen.add((key.tag, key.value))
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MAX_VALUES:  # mappings merged into each other double every time
            raise yaml.YAMLError(f"more than {_MAX_VALUES} keys in one mapping")


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """YAML to Python values.

    Raises:
        UserError: no YAML, a key given twice, or more values or levels than a run file can need.
    """
    if len(text) > _MAX_BYTES:
        raise UserError(f"{where} is too large for a run file: {len(text)} characters, at most {_MAX_BYTES}")
    try:
        data = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, OverflowError, AttributeError) as error:
        # the constructors of dates and numbers raise what Python does
        raise UserError(f"{where} is not valid YAML: {one_line(error)}") from None
    _check_extent(data, where)
    return data


def _check_extent(data: Any, where: str) -> None:
    """Aliases make little text stand for a lot: what they stand for is counted."""
    left, level = _MAX_VALUES, [data]
    for _ in range(_MAX_DEPTH):
        left -= len(level)
        if left < 0:
            raise UserError(f"{where} has more than {_MAX_VALUES} values: too many for a run file")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value.values()
            elif isinstance(value, list | set | tuple):
                below += value
            if len(below) > left:
                break
        if not below:
            return
        level = below
    raise UserError(f"{where} is nested too deeply: at most {_MAX_DEPTH} levels")


def read_yaml(path: Path) -> Any:
    """A YAML file.

    Raises:
        UserError: unreadable, no YAML, or a key given twice.
    """
    if not is_file(path):
        raise UserError(f"cannot read run file {path}: no such file")
    try:
        if path.stat().st_size > 4 * _MAX_BYTES:  # bytes of a character
            raise UserError(f"{path} is too large for a run file: {path.stat().st_size} bytes")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid YAML: {one_line(error)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read run file {path}: {reason(error)}") from None
    return parse_yaml(text, str(path))


def packaged_names() -> list[str]:
    """The names of the packaged run files."""
    files = [path.stem for path in SUITES.glob("*.yaml") if path.stem not in _TABLES]
    return sorted(files + [f"{suite}-{name}" for suite, names in _variants().items() for name in names])


def _variants() -> Mapping[str, Mapping[str, Any]]:
    return read_yaml(SUITES / f"{_VARIANTS}.yaml")


def find(name: str, root: Path) -> tuple[Path, dict[str, Any]]:
    """The file of a run file, a path from ``root`` or a packaged name, and what lies over its content.

    Raises:
        UserError: neither a file nor a packaged name.
    """
    path = root / Path(name).expanduser()
    try:
        if path.is_file():
            return path, {}
    except OSError as error:
        raise UserError(f"cannot read run file {one_line(path)}: {reason(error)}") from None
    if name in packaged_names():
        for suite, variants in _variants().items():
            variant = name.removeprefix(f"{suite}-")
            if variant != name and variant in variants:
                return SUITES / f"{suite}.yaml", {"merge": variants[variant]}
        return SUITES / f"{name}.yaml", {}
    if path.exists():
        raise UserError(f"cannot read run file {path}: it is not a file")
    hint = suggestion(name, packaged_names(), "packaged run files")
    raise UserError(f"cannot read run file {path}: no such file; {hint}")


def read(cls: type, name: str, root: Path = Path()) -> tuple[dict[str, Any], Path]:
    """A run file with all that it extends, and the directory that its relative paths start from.

    Args:
        cls: the dataclass of a whole run file.
        name: a path from ``root`` or a packaged name.
        root: see ``name``.

    Raises:
        UserError: no such file, no mapping, or a circle of ``extends``.
    """
    data, path = _read(cls, name, root, ())
    return data, path.parent


def _read(cls: type, name: str, root: Path, below: tuple[Path, ...]) -> tuple[dict[str, Any], Path]:
    path, over = find(name, root)
    resolved = path.resolve()
    if resolved in below:
        circle = " -> ".join(p.name for p in (*below[below.index(resolved) :], resolved))
        raise UserError(f"{path}: run files extend each other in a circle: {circle}")
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise UserError(f"{path} must be a mapping with the keys base and tasks")
    parent = data.pop("extends", None)
    if parent is not None:
        if not isinstance(parent, str):
            raise UserError(f"{path}: extends: expected the name or path of one run file: {shown(parent)}")
        try:
            lower, its_path = _read(cls, parent, path.parent, (*below, resolved))
        except UserError as error:
            raise UserError(f"{path}: extends: {error}") from None
        data = overlay(cls, moved(cls, lower, its_path.parent, path.parent), data)
    return overlay(cls, data, over), path


def overlay(cls: type | None, below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, both plain forms of ``cls`` or parts of one (None: of no dataclass)."""
    result = dict(below)
    owner = None if cls is None else _owner(cls)
    if cls is not None and owner is not None and owner in above:
        result = {key: value for key, value in below.items() if key in schema.keys(cls)}
    for key, value in above.items():
        old = result.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            value = overlay(schema.section(cls, key), old, value)
        result[key] = value
    return result


def _owner(cls: type) -> str | None:
    """The key whose value says what the keys of the ``rest`` field mean."""
    other = schema.rest(cls)
    return None if other is None else cls.__dataclass_fields__[other].metadata["rest"]


def settings(cls: type, texts: Sequence[str]) -> dict[str, Any]:
    """``("search.population=32", ..)`` as a mapping to lay over a run file; values are YAML.

    Raises:
        UserError: not of that form, or a path that no run file has.
    """
    result: dict[str, Any] = {}
    for text in texts:
        path, equals, value = text.partition("=")
        names = path.strip().split(".")
        if not equals or not all(names):
            raise UserError(f"--set {text!r}: expected KEY=VALUE, like search.population=32")
        part: type | None = cls
        for depth, name in enumerate(names):
            if part is not None and name not in schema.keys(part) and schema.rest(part) is None:
                hint = suggestion(name, schema.keys(part), "known keys")
                raise UserError(f"--set {text!r}: unknown key {name!r}; {hint}")
            if depth < len(names) - 1 and _is_leaf(part, name):
                raise UserError(f"--set {text!r}: {'.'.join(names[: depth + 1])} is set as a whole")
            part = schema.section(part, name)
        nested: Any = parse_yaml(value, f"--set {text!r}: the value")
        for name in reversed(names):
            nested = {name: nested}
        result = overlay(None, result, nested)
    return result


def _is_leaf(cls: type | None, key: str) -> bool:
    """Whether nothing below a key can be set on its own: a plain value or a list."""
    if cls is None or key not in schema.keys(cls):
        return False
    hint = str(schema.keys(cls)[key].type)
    return "Mapping" not in hint and (schema.section(cls, key) is None or hint.startswith("tuple"))


def moved(cls: type | None, data: Any, old: Path, new: Path) -> Any:
    """The plain form of ``cls``, its relative paths rewritten from the directory ``old`` to ``new``.

    Paths stand in the fields with the metadata ``path``, a function of a value and of what moves a path.
    """
    if isinstance(data, list):
        return [moved(cls, item, old, new) for item in data]
    if cls is None or not isinstance(data, Mapping):
        return data
    fields, result = schema.keys(cls), {}
    for key, value in data.items():
        rewrite = fields[key].metadata.get("path") if key in fields else None
        if rewrite is not None and isinstance(value, str):
            result[key] = rewrite(value, lambda path: moved_path(path, old, new))
        else:
            result[key] = moved(schema.section(cls, key), value, old, new)
    return result
