"""Reading the files of a run as a stranger's: what is no number where one belongs is damage, no traceback."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enmp_jax.errors import UserError, one_line, reason
from enmp_jax.io.files import is_file

DAMAGE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What reading and checking damaged content raises."""
_MAX_BYTES = 2**28


def text(path: Path) -> str:
    """A file's text.

    Raises:
        UserError: it is missing, too large or not UTF-8.
    """
    if not is_file(path):
        raise UserError(
            f"{path.parent} has no {path.name}: the search there has not finished (continue with --resume)"
        )
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise UserError(f"{path} has {size} bytes: more than {_MAX_BYTES} are not read")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None


def mapping(content: Any) -> Mapping[str, Any]:
    """A JSON object.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(content, Mapping):
        raise TypeError("it must hold a mapping")
    return content


def number(value: Any) -> float:
    """A number; JSON has no NaN, but null.

    Raises:
        TypeError: it is none.
    """
    if isinstance(value, str | bool):
        raise TypeError(f"a {type(value).__name__} where a number belongs")
    return math.nan if value is None else float(value)


def finite(value: Any) -> float:
    """A number that can be drawn.

    Raises:
        ValueError: it is too large, or NaN.
    """
    if not abs(number(value)) < 1e6:  # NaN is not smaller either
        raise ValueError(f"the number {one_line(value, 40)}")
    return float(value)
