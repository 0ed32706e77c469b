"""Module paths of any architecture: where the layer number is, and which rows of a mask they get.

A module is identified by its path alone. Layers are needed for masks only: a module belongs to the group of
its path up to its layer number (``decoder.block.3``); a path without one (``lm_head``) is its own group.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from enmp_jax.errors import UserError, shown

MAX_LAYERS = 4096
# lists of layers within layers: down_blocks.1.attentions.0.transformer_blocks.0, layers.2.blocks.5
_NESTED = re.compile(r".*(blocks|layers|attentions|resnets|stages|samplers|modules)")

Group = int | str
"""A row of a mask: the number of a layer, or a path where there are several stacks of layers or none."""


class Layout(NamedTuple):
    """Modules sorted into stacks of equal matrices, and into groups.

    Attributes:
        groups: rows of a mask: numbers where all layers are of one stack, else paths.
        places: path -> (name of its stack, row). ``{}`` in the name stands for the group; where a name has
            matrices of several shapes, ``@OUTxIN`` follows it.
    """

    groups: tuple[Group, ...]
    places: dict[str, tuple[str, int]]


def split_layer(path: str) -> tuple[str, int | None]:
    """Split a module path into its template and layer number.

    ``encoder.layers.3.self_attn.q_proj`` -> (``encoder.layers.{}.self_attn.q_proj``, 3); the number is None
    where there is none. The number of an expert stays: each expert of a mixture is a projection of its
    layer. Of layers within layers the innermost counts; parts of a layer that are numbered themselves
    (T5's ``block.3.layer.0``, ``to_out.0``) belong to it.

    Raises:
        UserError: a number of more than ten digits.
    """
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if i and part.isascii() and part.isdecimal()]
    layers = [i for i in numbers if parts[i - 1] != "experts"] or numbers
    if not layers:
        return path, None
    chosen = layers[0]
    for i in layers[1:]:
        if i + 1 < len(parts) and _NESTED.fullmatch(parts[i - 1]):
            chosen = i
    if len(parts[chosen]) > 10:
        raise UserError(f"module {shown(path, 200)} has a layer index that is none")
    return ".".join([*parts[:chosen], "{}", *parts[chosen + 1 :]]), int(parts[chosen])


def join_layer(name: str, group: Group) -> str:
    """The path of a module: of a stack's name (``Layout.places``) and a group."""
    return name.partition("@")[0].replace("{}", str(group))


def container(path: str) -> str:
    """What stands before the layer number; all of a path without one."""
    return split_layer(path)[0].partition("{}")[0]


def lay_out(shapes: Mapping[str, tuple[int, int]]) -> Layout:
    """Sort modules, as no base model says how deep its stacks are.

    Args:
        shapes: path -> shape (out, in) of its matrix.

    Raises:
        UserError: a layer number of ``MAX_LAYERS`` or above.
    """
    split = {path: split_layer(path) for path in shapes}
    numbers = [number for _, number in split.values() if number is not None]
    if numbers and max(numbers) >= MAX_LAYERS:
        raise UserError(f"an adapter has layer {max(numbers)}: more than {MAX_LAYERS} layers are not stacked")
    stacks = {template.partition("{}")[0] for template, number in split.values() if number is not None}
    named: dict[str, tuple[str, Group]] = {}
    for path, (template, number) in split.items():
        before, found, after = template.partition("{}")
        if not found or number is None:
            named[path] = path, path
        elif len(stacks) == 1:
            named[path] = template, number
        else:
            named[path] = "{}" + after, f"{before}{number}"
    groups = _groups(group for _, group in named.values())
    row = {group: i for i, group in enumerate(groups)}
    several: dict[str, set[tuple[int, int]]] = {}
    for path, (name, _) in named.items():
        several.setdefault(name, set()).add(shapes[path])
    places = {}
    for path, (name, group) in named.items():
        out, inner = shapes[path]
        places[path] = name if len(several[name]) == 1 else f"{name}@{out}x{inner}", row[group]
    return Layout(groups, places)


def _groups(found: Iterable[Group]) -> tuple[Group, ...]:
    """Numbers from 0 without a gap, then paths as people count them (block.2 before block.10)."""
    every = set(found)
    numbers = [group for group in every if isinstance(group, int)]
    paths = [group for group in every if isinstance(group, str)]
    return *range(max(numbers, default=-1) + 1), *sorted(paths, key=_natural)


def _natural(path: str) -> list[tuple[bool, int, str]]:
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in path.split(".")]
