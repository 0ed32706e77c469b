"""Split expressions, as in TFDS and Hugging Face datasets: ``train``, ``train[:80%]``, ``a[10:]+b``."""

from __future__ import annotations

import re
from collections.abc import Mapping

from enmp_jax.data.base import Span
from enmp_jax.errors import UserError

_PART = re.compile(r"\s*(?P<split>[\w.\-]+)\s*(?:\[(?P<start>[^:\[\]]*):(?P<stop>[^:\[\]]*)\])?\s*")
_BOUND = re.compile(r"(?P<number>-?[0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?)\s*(?P<percent>%?)")


def resolve(expression: str, splits: Mapping[str, int], source: str) -> tuple[Span, ...]:
    """Rows that a split expression means.

    Percentages are rounded to the closest row, negative bounds count from the end, both as in TFDS.

    Args:
        expression: parts joined by ``+``; each a split name with an optional ``[start:stop]``.
        splits: split name -> number of examples.
        source: what to call the data in messages.

    Raises:
        UserError: malformed expression, unknown split, bound outside the split, rows named twice, or
            nothing selected.
    """
    spans: list[Span] = []
    for part in expression.split("+"):
        match = _PART.fullmatch(part)
        if match is None:
            raise UserError(
                f"{source}: cannot read the split {expression!r}; write for example "
                "train, train[:80%], validation[100:200] or train[10%:]+validation"
            )
        split = match["split"]
        if split not in splits:
            raise UserError(f"{source}: no split {split!r}; available: {', '.join(splits) or 'none'}")
        size = splits[split]
        start = _bound(match["start"], size, 0, expression, source)
        stop = _bound(match["stop"], size, size, expression, source)
        if start >= stop:
            raise UserError(f"{source}: {part.strip()} is empty; {split} has {size} examples")
        for other in spans:
            if other.split == split and start < other.stop and other.start < stop:
                raise UserError(f"{source}: {expression} names some rows of {split} twice")
        spans.append(Span(split, start, stop))
    return tuple(spans)


def _bound(text: str | None, size: int, default: int, expression: str, source: str) -> int:
    """A bound as a row number; percentages and negative numbers resolved."""
    text = (text or "").strip()
    if not text:
        return default
    match = _BOUND.fullmatch(text)
    if match is None or (not match["percent"] and "." in text):
        raise UserError(f"{source}: {text!r} in the split {expression!r} is neither a row number nor a %")
    number = float(match["number"])
    if abs(number) > (100 if match["percent"] else size):
        raise UserError(
            f"{source}: {text} in the split {expression!r} is out of range: it has {size} examples"
        )
    row = round(number * size / 100) if match["percent"] else int(number)
    return row + size if number < 0 else row
