"""Frozen dataclasses from plain mappings and back. Unknown keys and wrong types are errors.

A field with the metadata ``rest`` collects the keys that no other field of its dataclass has; in the
plain form they stand beside the others. Fields with the metadata ``internal`` have no plain form.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from enmp_jax.errors import UserError, shown, suggestion

_LARGEST = sys.float_info.max


def keys(cls: Any) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a dataclass, or of an instance of one, that a mapping names."""
    hidden = ("internal", "rest")
    return {f.name: f for f in dataclasses.fields(cls) if not any(map(f.metadata.get, hidden))}


def rest(cls: Any) -> str | None:
    """The field that collects all other keys."""
    return next((f.name for f in dataclasses.fields(cls) if f.metadata.get("rest")), None)


def section(cls: type | None, key: str) -> type | None:
    """The dataclass below a key, that of the items if it is a list; None where there is none."""
    if cls is None or key not in keys(cls):
        return None
    hint = typing.get_type_hints(cls)[key]
    options = [hint, *typing.get_args(hint)]
    return next((typing.cast(type, x) for x in options if dataclasses.is_dataclass(x)), None)


def parse(cls: type, data: Any, where: str) -> Any:
    """Build a dataclass from a mapping, checking keys and types.

    Raises:
        UserError: an unknown or missing key, or a value of the wrong type.
    """
    fields, hints, other = keys(cls), typing.get_type_hints(cls), rest(cls)
    if not isinstance(data, Mapping):
        raise UserError(
            f"{where}: expected a mapping with keys such as {', '.join(list(fields)[:3])}, got {shown(data)}"
        )
    for key in data:
        if key not in fields and (other is None or not isinstance(key, str)):
            hint = suggestion(key if isinstance(key, str) else shown(key), fields, "known keys")
            raise UserError(f"{where}: unknown key {shown(key)}; {hint}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise UserError(f"{where}: the key {name!r} is missing")
    given = {key: _convert(hints[key], data[key], f"{where}: {key}") for key in fields if key in data}
    if other is not None:
        # null is as good as not given
        given[other] = {k: v for k, v in data.items() if k not in fields and v is not None}
    return cls(**given)


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return parse(typing.cast(type, kind), value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors: list[UserError] = []
        for option in args:
            if option is not type(None):
                try:
                    return _convert(option, value, where)
                except UserError as error:
                    errors.append(error)
        raise errors[-1]
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise UserError(f"{where}: expected a list, got {shown(value)}")
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if origin is Literal:
        if value not in args:
            raise UserError(f"{where}: expected one of {', '.join(map(str, args))}, got {shown(value)}")
        return value
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected a mapping, got {shown(value)}")
        return {_convert(args[0], k, where): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is Any:
        return value
    if kind is float:
        # compared, as an integer may be larger than any float
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
            raise UserError(f"{where}: expected a finite number, got {shown(value)}")
        return float(value)
    if (isinstance(value, bool) and kind is not bool) or not isinstance(value, kind):
        raise UserError(f"{where}: expected {kind.__name__}, got {shown(value)}")
    return value


def to_dict(config: Any) -> Any:
    """The plain form of a config, ready for YAML; internal fields left out."""
    if dataclasses.is_dataclass(config):
        own, other = keys(config), rest(config)
        beside = {} if other is None else to_dict(getattr(config, other))
        return {name: to_dict(getattr(config, name)) for name in own} | beside
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return config
