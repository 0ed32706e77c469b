"""Frozen dataclasses from plain mappings and back. Unknown keys and wrong types are errors."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from enmp_jax.errors import UserError


def parse(cls: type, data: Any, where: str) -> Any:
    """Build a dataclass from a mapping, checking keys and types."""
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: expected a mapping with keys such as {_some_keys(cls)}, got {_show(data)}")
    fields = {f.name: f for f in dataclasses.fields(cls) if not f.metadata.get("internal")}
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(fields)}"
            raise UserError(f"{where}: unknown key {key!r}; {hint}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise UserError(f"{where}: the key {name!r} is missing")
    return cls(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in data.items()})


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
            raise UserError(f"{where}: expected a list, got {_show(value)}")
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if origin is Literal:
        if value not in args:
            raise UserError(f"{where}: expected one of {', '.join(map(str, args))}, got {_show(value)}")
        return value
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected a mapping, got {_show(value)}")
        return {_convert(args[0], k, where): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is Any:
        return value
    if kind is float:
        # YAML 1.1 reads 1e-3 as a string
        try:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
        except (TypeError, ValueError):
            raise UserError(f"{where}: expected a number, got {_show(value)}") from None
    if (isinstance(value, bool) and kind is not bool) or not isinstance(value, kind):
        raise UserError(f"{where}: expected {kind.__name__}, got {_show(value)}")
    return value


def to_dict(config: Any) -> Any:
    """The plain form of a config, ready for YAML; internal fields left out."""
    if dataclasses.is_dataclass(config):
        fields = [f for f in dataclasses.fields(config) if not f.metadata.get("internal")]
        return {f.name: to_dict(getattr(config, f.name)) for f in fields}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return config


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _some_keys(cls: type) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls)[:3])
