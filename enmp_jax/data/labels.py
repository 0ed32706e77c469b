"""Where labels are, label maps and class names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from enmp_jax.config.sections import DataConfig
from enmp_jax.data.base import Source
from enmp_jax.errors import UserError, shown

_MAX_LABEL = 2**31 - 1  # labels become int32


def label_key(config: DataConfig, available: Iterable[str], where: str = "") -> str | None:
    """The key of the labels; None: the data have none, or the run file says to ignore them (``label: null``).

    Args:
        config: the run file's data.
        available: all keys of the data.
        where: what to call the data in messages; default: the source.

    Raises:
        UserError: the run file names a key of its own, and it is not there.
    """
    if config.label is None or config.label in available:
        return config.label
    if config.label == DataConfig.label:  # not asked for in particular: such data are unlabelled
        return None
    has = ", ".join(available)
    raise UserError(f"{where or config.source}: no label key {config.label!r}; it has {has}")


def number_labels(values: Sequence[Any], config: DataConfig) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as int64 numbers, and the class names when the labels are names.

    Names are numbered in the order of ``config.class_names`` if it has them all, else sorted. None
    becomes -1: no label.

    Raises:
        UserError: labels that are neither integers nor names.
    """
    given = [v for v in values if v is not None]
    if all(isinstance(v, int | np.integer) and not isinstance(v, bool) for v in given):
        large = next((v for v in given if not -_MAX_LABEL <= v <= _MAX_LABEL), None)
        if large is not None:
            raise UserError(f"{config.source}: the label {shown(large)} is too large to number a class")
        return np.asarray([-1 if v is None else v for v in values], np.int64), ()
    for v in given:
        if not isinstance(v, str):
            said = f"the label {shown(v, 80)} is neither a whole number nor a class name"
            raise UserError(f"{config.source}: {said}")
    found = sorted(set(given))
    names = config.class_names if set(found) <= set(config.class_names) else tuple(found)
    number = {None: -1} | {name: i for i, name in enumerate(names)}
    return np.asarray([number[v] for v in values], np.int64), names


def apply(
    labels: np.ndarray,
    names: Sequence[str],
    table: Sequence[int] | None,
    known_names: Sequence[str],
    where: str,
) -> np.ndarray:
    """Map the labels of a source to the classes of the head; -1 means that the example is left out.

    Args:
        labels: int64 ``[n]``; -1 where the source gives none.
        names: what to call each example.
        table: the label map, or None.
        known_names: names of the classes (see ``class_names``); empty when nobody knows them.
        where: what to call the data in messages.

    Raises:
        UserError: a label without a name or without an entry in the label map.
    """
    known = len(known_names) if table is None else len(table)
    wrong = (labels < -1) | ((labels >= known) if known else False)
    if wrong.any():
        i = int(np.flatnonzero(wrong)[0])
        what = "class names are known" if table is None else "entries are in the label map"
        raise UserError(f"{where}: label {labels[i]} of {names[i]} is out of range: {known} {what}")
    if table is None:
        return labels
    return np.where(labels == -1, -1, np.asarray(table, np.int64)[labels])


def class_names(config: DataConfig, source: Source) -> tuple[str, ...]:
    """Names of the classes that mapped labels count, or empty if nobody names them.

    A class that several source classes map to is named after all of them, joined by ``/``.

    Raises:
        UserError: the run file names another number of classes than the data have, or the label map
            points outside them.
    """
    found, given, table = source.class_names(), config.class_names, config.labels
    if table is None:
        if given and found and len(found) != len(given):
            raise UserError(
                f"{config.source}: class_names has {len(given)} names but the data have {len(found)} classes"
            )
        return given or found
    if not table or min(table) < -1 or max(table) < 0:
        raise UserError(f"{config.source}: the label map {list(table)} must hold class numbers or -1")
    if found and len(found) != len(table):
        raise UserError(
            f"{config.source}: the label map has {len(table)} entries but the data have {len(found)} classes"
        )
    if given and max(table) >= len(given):
        raise UserError(
            f"{config.source}: the label map points to class {max(table)} of {len(given)} class_names"
        )
    if given or not found:
        return given
    targets = range(max(table) + 1)
    return tuple("/".join(n for n, target in zip(found, table) if target == t) for t in targets)


def require_class_names(names: Sequence[str], where: str) -> tuple[str, ...]:
    """The names of all classes, for heads made from them.

    Raises:
        UserError: there are none, or one is empty.
    """
    if not names or not all(name.strip() for name in names):
        missing = (
            "no class names"
            if not names
            else f"no name for class {[bool(n.strip()) for n in names].index(False)}"
        )
        raise UserError(
            f"{where}: {missing}, and a zero-shot head is made from them; list class_names in the run file"
        )
    return tuple(names)
