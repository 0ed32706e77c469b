"""Label maps and class names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from enmp_jax.config.run_file import DataConfig
from enmp_jax.data.base import Source
from enmp_jax.errors import UserError


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
