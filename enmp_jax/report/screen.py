"""Charts as HTML and SVG: they follow the width of the window, light and dark, and take the keyboard.

Written by hand, not by matplotlib's SVG backend, which draws for a fixed width and fixed colours: scaled down
to a telephone its letters cannot be read, and a cell of a heat map costs it 200 bytes and has no name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from enmp_jax.report.charts import Curve, Dots, Heat, Lines, Mark, short, ticks
from enmp_jax.report.html import Html, el, join, table
from enmp_jax.report.limits import cut

_BINS = 10  # shades on each side of the neutral one: classes c-10 to c10
_LIGHT, _DARK = ("b8390a", "ece9e2", "1f5f99"), ("ff8f57", "2b2824", "7ab8f0")  # gone, as it is, largest


MOST_READINGS = 300
"""Most places of a chart of curves that keys stop at."""


def _shades(low: str, middle: str, high: str) -> str:
    """Style of every shade: its colour, and black or white letters, whichever can be read on it."""
    ends, rules = [[int(c[i : i + 2], 16) for i in (0, 2, 4)] for c in (low, middle, high)], []
    for step in range(-_BINS, _BINS + 1):
        end, share = ends[0] if step < 0 else ends[2], abs(step) / _BINS
        colour = [round(m + share * (e - m)) for m, e in zip(ends[1], end, strict=True)]
        linear = [((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]  # WCAG 2, relative luminance
        light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        letters = "000" if light > 0.179 else "fff"  # where both have the same contrast, 4.58
        rules.append(f".c{step}{{background:#{''.join(f'{c:02x}' for c in colour)};color:#{letters}}}")
    return "".join(rules)


SHADES = f"{_shades(*_LIGHT)}@media screen and (prefers-color-scheme:dark){{{_shades(*_DARK)}}}"


def legend(names: Mapping[Any, str]) -> Html:
    """What the marks stand for."""
    keys = (el("span", _glyph(role), name, class_="key") for role, name in names.items())
    return el("p", *keys, class_="legend")


def dots(
    chart: Dots, header: Sequence[object], rows: Sequence[Sequence[object]], total: bool = False
) -> Html:
    """A table whose second column is the chart, one row of it each.

    Args:
        chart: with as many rows as the table, or fewer by the last.
        header: of the table without the chart.
        rows: of the table; the first cell is the name.
        total: whether the last row sums up the others.
    """
    low, high = chart.limits
    at = ticks(low, high, 4)
    tracks = [_track(marks, chart, at) for _, marks in chart.rows]
    tracks += [Html("")] * (len(rows) - len(tracks))
    axis = el(
        "div",
        *(el("span", short(x), style=f"left:{_share(x, low, high):.1f}%") for x in at),
        class_="axis",
        aria_hidden="true",
    )
    wide = [[row[0], track, *row[1:]] for row, track in zip(rows, tracks, strict=True)]
    first = join(el("span", chart.axis, class_="small"), axis)
    return el(
        "figure",
        legend(chart.names),
        table([header[0], first, *header[1:]], wide, "dots", total),
        el("figcaption", chart.caption),
    )


def _track(marks: Iterable[Mark], chart: Dots, at: Sequence[float]) -> Html:
    low, high = chart.limits
    marks = list(marks)

    def x(value: float) -> str:
        return f"{_share(value, low, high):.2f}%"

    parts = [el("line", class_="grid", x1=x(t), x2=x(t), y1=0, y2="100%") for t in at]
    if chart.zero is not None:
        parts.append(el("line", class_="zero", x1=x(chart.zero), x2=x(chart.zero), y1=0, y2="100%"))
    by_role = {mark.role: mark.value for mark in marks}
    if "merged" in by_role and "found" in by_role:
        ends = x(by_role["merged"]), x(by_role["found"])
        parts.append(el("line", class_="step", x1=ends[0], x2=ends[1], y1="50%", y2="50%"))
    for mark in marks:
        if mark.low is not None and mark.high is not None:
            bounds = x(mark.low), x(mark.high)
            parts.append(
                el("line", class_=f"range {mark.role}", x1=bounds[0], x2=bounds[1], y1="50%", y2="50%")
            )
        parts.append(_shape(mark.role, x(mark.value)))
    words = ", ".join(f"{chart.names.get(mark.role, mark.role)} {mark.value:.1f}" for mark in marks)
    return el("svg", *parts, class_="track", role="img", aria_label=words)


def _shape(role: str, x: str) -> Html:
    """A mark at half the height; shapes differ too, for those who see no colours."""
    if role == "expert":
        return el("line", class_=f"mark {role}", x1=x, x2=x, y1="20%", y2="80%")
    if role == "refined":
        square = el("rect", class_=f"mark {role}", x=-4.5, y=-4.5, width=9, height=9, transform="rotate(45)")
        return el("svg", square, x=x, y="50%", overflow="visible")
    return el("circle", class_=f"mark {role}", cx=x, cy="50%", r=3.2 if role in ("base", "random") else 5)


def _glyph(role: str) -> Html:
    line = role in ("rule", "thin")
    shape = (
        el("line", class_=f"curve {role}", x1=0, x2="100%", y1="50%", y2="50%")
        if line
        else _shape(role, "50%")
    )
    return el("svg", shape, class_="glyph", aria_hidden="true")


def lines(chart: Lines, ident: str = "curves") -> Html:
    """A chart of curves; its plot is stretched to the window, its letters are not.

    Arrow keys and the pointer go from point to point; the values there are told beneath it.
    """
    (left, right), (bottom, top) = chart.limits

    def point(x: float, y: float) -> str:
        return f"{1000 * (x - left) / (right - left):.0f} {1000 * (top - y) / (top - bottom):.0f}"

    grid = [el("path", class_="grid", d=f"M0 {point(left, t).split()[1]}h1000") for t in ticks(bottom, top)]
    drawn, names = [], []
    for curve in chart.curves:
        finite = np.isfinite(curve.x) & np.isfinite(curve.y)
        at = [point(x, y) for x, y in zip(curve.x[finite], curve.y[finite], strict=True)]
        if not at:
            continue
        if curve.shape == "rule":
            d = f"M0 {at[0].split()[1]}h1000"
        elif curve.shape in ("cloud", "squares"):
            d = "".join(f"M{p}h0" for p in dict.fromkeys(at))
        else:
            d = "M" + "L".join(at)
        kind = f"curve {curve.role} {curve.shape}"
        drawn.append(el("path", class_=kind, d=d))
        if curve.name:
            sample = "M0 8h24" if curve.shape in ("line", "thin", "rule") else "M12 8h0"
            glyph = el("svg", el("path", class_=kind, d=sample), class_="glyph", aria_hidden="true")
            names.append(el("span", glyph, curve.name, class_="key"))
    y_axis = [
        el("span", f"{100 * t:.4g}", style=f"top:{100 * (top - t) / (top - bottom):.1f}%")
        for t in ticks(bottom, top)
    ]
    x_axis = [
        el("span", short(t), style=f"left:{100 * (t - left) / (right - left):.1f}%")
        for t in ticks(left, right)
    ]
    plot = el(
        "svg", *grid, *drawn, el("path", class_="here"), viewBox="0 0 1000 1000", preserveAspectRatio="none",
        aria_hidden="true",
    )  # fmt: skip
    data = readings(chart)
    most = max(0, len(data["names"]) - 1)
    told = "Point at the chart, or walk along it with the arrow keys, to read its values."
    return el(
        "figure",
        el("p", *names, class_="legend"),
        el("p", chart.y_label, class_="small"),
        el(
            "div", el("div", *y_axis, class_="y"), plot, el("div", *x_axis, class_="x"), class_="plot",
            # what is walked through in one direction is a slider to those who cannot see it
            id=ident, role="slider", tabindex=0, aria_label=chart.caption, aria_valuetext=told,
            aria_valuemin=0, aria_valuemax=most, aria_valuenow=0,
        ),
        el("p", chart.x_label, class_="small right"),
        el("output", told, id=f"{ident}-told"),
        el("figcaption", chart.caption),
        _data(ident, data),
    )  # fmt: skip


def readings(chart: Lines) -> dict[str, Any]:
    """What the script tells of a chart: ``names`` and places ``at`` (0 to 1000), ``facts`` of the curves.

    Curves of one name, as of several seeds, are one fact: a value, or the range of them. A curve has the
    value of its last point; single points are told where they are.
    """
    (left, right), _ = chart.limits
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in chart.curves:
        groups.setdefault((curve.role, curve.shape), []).append(curve)
    known = [curve.x[np.isfinite(curve.x)] for curve in chart.curves if curve.shape != "rule"]
    every = np.unique(np.concatenate(known)) if known else np.zeros(0)
    if len(every) > MOST_READINGS:
        every = every[np.rint(np.linspace(0, len(every) - 1, MOST_READINGS)).astype(int)]
    facts = []
    for (_, shape), curves in groups.items():
        values = [_range(np.concatenate([_values(curve, x) for curve in curves])) for x in every]
        name = next((curve.name for curve in curves if curve.name), shape)
        facts.append({"before": name, "values": [values], "after": " %"})
    names = [f"{x:,.0f} {chart.x_label}" for x in every]
    at = [round(1000 * (x - left) / (right - left)) for x in every]
    return {"names": names, "at": at, "facts": facts}


def _values(curve: Curve, x: float) -> Float[np.ndarray, " value"]:
    """Per cent at x: none, one, or those of all points there."""
    real = np.isfinite(curve.x) & np.isfinite(curve.y)
    if curve.shape == "rule":
        return 100 * curve.y[real][:1]
    if curve.shape in ("cloud", "squares"):
        return 100 * curve.y[real & (curve.x == x)]
    return 100 * curve.y[real & (curve.x <= x)][-1:]


def _range(values: Float[np.ndarray, " value"]) -> str | None:
    ends = (
        list(dict.fromkeys(f"{value:.1f}" for value in (values.min(), values.max()))) if len(values) else []
    )
    return " to ".join(ends) or None


def _data(ident: str, data: Mapping[str, Any]) -> Html:
    """What the script tells of the element of this id."""
    text = json.dumps(data, separators=(",", ":")).replace(
        "<", "\\u003c"
    )  # which cannot end the script early
    return el("script", Html(text), type="application/json", id=f"{ident}-data")


def heat(chart: Heat, details: Mapping[str, Any], ident: str = "modules") -> Html:
    """A grid that arrow keys walk through; what is known of the module in hand is told beneath it.

    Args:
        chart: the grid.
        details: what the script tells of cells: lists of [row][layer], and words.
        ident: of the element.
    """
    layers, finer = chart.values.shape[1], any(projection for _, projection in chart.rows)
    shades = np.rint(chart.shade() * _BINS).astype(int)
    every = 1 if layers <= 24 else 4 if layers <= 64 else 16
    heads = [el("th", layer if layer % every == 0 else "", scope="col") for layer in range(layers)]
    corner = [el("th", name, scope="col") for name in (["task", "projection"] if finer else ["task"])]
    body, groups = [], _groups(chart.rows)
    for task, rows in groups:
        for i in rows:
            cells = "".join(
                f"<td class=c{shades[i, layer]}>{chart.text(i, layer)}" for layer in range(layers)
            )  # closing tags left out, which HTML allows: a large grid is half the size
            names = [el("th", cut(task), scope="rowgroup", rowspan=len(rows))] if i == rows[0] else []
            if finer:
                names.append(el("th", chart.rows[i][1], scope="row", class_="projection"))
            body.append(el("tr", *names, Html(cells), class_="first" if finer and i == rows[0] else None))
    kind = "heat dense" if len(chart.rows) > 60 else "heat"
    grid = el(
        "table", el("thead", el("tr", *corner, *heads)), el("tbody", *body), class_=kind, role="grid",
        aria_label=chart.caption, aria_describedby=f"{ident}-told", id=ident,
        style=f"--cell:{max(15, min(44, 640 // layers))}px",
    )  # fmt: skip
    told = "Point at a cell, or walk through them with the arrow keys, to read what is known of a module."
    return el(
        "figure",
        _scale(chart),
        el("div", grid, class_="scroll"),
        el("output", told, id=f"{ident}-told", aria_live="polite"),
        el("figcaption", chart.caption),
        _data(ident, {"rows": [[task, *([p] if p else [])] for task, p in chart.rows], **details}),
    )


def _groups(rows: Sequence[tuple[str, str]]) -> list[tuple[str, list[int]]]:
    groups: list[tuple[str, list[int]]] = []
    for i, (task, _) in enumerate(rows):
        if not groups or groups[-1][0] != task:
            groups.append((task, []))
        groups[-1][1].append(i)
    return groups


def _scale(chart: Heat) -> Html:
    top = max(2.0, float(np.nanmax(chart.values)))
    steps = range(-_BINS, (_BINS if chart.weighted else 0) + 1, 2)
    bar = el("span", *(el("i", class_=f"c{step}") for step in steps), class_="ramp", aria_hidden="true")
    ends = ("× left out", f"weight {top:.3g}" if chart.weighted else "merged as it is")
    middle = " · pale: merged as it is" if chart.weighted else ""
    return el("p", ends[0], bar, ends[1], middle, class_="legend")


def _share(x: float, low: float, high: float) -> float:
    return 100 * (x - low) / (high - low)
