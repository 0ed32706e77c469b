"""HTML and SVG elements, written so that no name of a task can become markup."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


class Html(str):
    """Text that is HTML already; any other text is escaped where it is put into an element."""


_EMPTY = ("meta",)


def el(name: str, /, *children: object, **attributes: object) -> Html:
    """An element.

    Args:
        name: its tag.
        children: ``Html`` as it is, everything else as text; None is left out.
        attributes: ``class_`` is written ``class``, ``aria_label`` ``aria-label``; None and False are left
            out, True stands without a value.
    """
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _EMPTY:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: object) -> Html:
    """Children one after another."""
    return Html(
        "".join(
            child if isinstance(child, Html) else escape(str(child))
            for child in children
            if child is not None
        )
    )


def table(
    header: Sequence[object], rows: Sequence[Sequence[object]], kind: str = "", total: bool = False
) -> Html:
    """A table that scrolls sideways where it is too wide; the first cell of a row is its header.

    Args:
        header: cells.
        rows: cells of each row.
        kind: its class; ``text`` has words to the left, not figures to the right.
        total: whether the last row sums up the others.
    """
    head = el("tr", *(el("th", cell, scope="col") for cell in header))
    body = [
        el(
            "tr", el("th", row[0], scope="row"), *(_cell(cell) for cell in row[1:]),
            class_="total" if total and row is rows[-1] else None,
        )
        for row in rows
    ]  # fmt: skip
    whole = el("table", el("thead", head), el("tbody", *body), class_=kind or None)
    # a region that scrolls must be reachable by keyboard
    return el(
        "div", whole, class_="scroll", tabindex="0", role="group", aria_label=f"Table: {plain(header[0])}"
    )


def _cell(cell: object) -> Html:
    words = not isinstance(cell, Html) and len(str(cell)) > 24  # figures stay on one line, sentences need not
    return el("td", cell, class_="words" if words else None)


def plain(cell: object) -> str:
    """A cell as one line of text."""
    return " ".join(str(cell).split())


def pairs(items: Sequence[tuple[str, object]]) -> Html:
    """Names and values."""
    return el("dl", *(part for key, value in items for part in (el("dt", key), el("dd", value))))
