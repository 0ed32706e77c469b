"""``report.html``: one self-contained page, light and dark, for screen, phone and print."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from enmp_jax.report.data import RunData
from enmp_jax.report.limits import drawn, shortened
from enmp_jax.report.plots import DARK, LIGHT, Plot, plots_of, render
from enmp_jax.report.tables import (
    changed,
    cost_lines,
    mean_measure,
    measure,
    percent,
    points,
    pruned_lines,
    score_rows,
    seed_sentence,
    verdict,
)  # fmt: skip

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1f2430;--muted:#667085;--line:#e4e7ec;
 --accent:#d95f02}
@media (prefers-color-scheme:dark){
 :root{--bg:#0f1218;--card:#161a22;--ink:#e6e9ef;--muted:#98a2b3;--line:#2c3340;--accent:#ff9f4a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
 "Helvetica Neue",Arial,sans-serif}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
header{padding:0 .25rem 1rem}
.kicker{margin:0;color:var(--accent);font-weight:600;font-size:.85rem;letter-spacing:.04em}
h1{margin:.25rem 0 .75rem;font-size:2rem;line-height:1.2;letter-spacing:-.01em}
h2{margin:0 0 1rem;font-size:1.2rem}
h3{margin:1.5rem 0 .5rem;font-size:.95rem;color:var(--muted);font-weight:600}
p{margin:.4rem 0 .8rem}
.lead{font-size:1.1rem}
.muted,figcaption{color:var(--muted);font-size:.88rem}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:1.5rem;
 margin:1.25rem 0}
figure{margin:0 0 1.25rem}
img{display:block;max-width:100%;height:auto}
figcaption{margin-top:.5rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.93rem;font-variant-numeric:tabular-nums}
th,td{padding:.45rem .75rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--muted);font-weight:600}
th:first-child,td:first-child,.text th,.text td{text-align:left}
tbody tr:last-child td{border-bottom:0}
.total td{font-weight:650;border-top:2px solid var(--line)}
dl{display:grid;grid-template-columns:minmax(9rem,max-content) 1fr;gap:.3rem 1.25rem;
 margin:.25rem 0 1rem;font-size:.93rem}
dt{color:var(--muted)}
dd{margin:0;overflow-wrap:anywhere}
@media print{body{background:#fff}section{break-inside:avoid;border-color:#ccc}}
"""


def page(data: RunData) -> str:
    """The report of a run as one HTML document."""
    scores, plots = data.scores, plots_of(data)
    whole, (data, notes) = data, drawn(data)
    table, more = shortened(whole.scores)
    left_out = "".join(f"<p class='muted'>{escape(note)}</p>" for note in (*notes, *more))
    what = measure(scores).capitalize()
    modules = [name for name in ("mask", "weights") if name in plots]
    sections = [
        _section(f"{what} by task", _picture(data, plots["accuracies"]), _score_table(table)),
        _section(
            "Weights of modules" if data.has_weights else "Pruned modules",
            *(_picture(data, plots[name]) for name in modules),
            _pruned_table(scores),
        ),
        _section(
            "Search",
            _picture(data, plots["convergence"]),
            _search_notes(whole),
            _seed_table(scores),
            _front_table(scores),
        ),
        _section("How the data was used", *_splits(data)),
        _section("Settings", *_settings(data)),
        _section("Environment", _pairs(_flat(data.environment))),
    ]
    sentence = seed_sentence(scores)
    again = f"<p>{escape(sentence)}</p>" if sentence else ""
    merge = data.config.get("merge") or {}
    made = f"{merge.get('method', 'merge')} in {merge.get('space', 'full')} space, {len(whole.tasks)} tasks"
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>ENMP: {escape(data.name)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><p class='kicker'>ENMP report · {escape(data.name)}</p><h1>{escape(_headline(scores))}</h1>"
        f"<p class='lead'>{escape(verdict(scores))}</p>{again}<p class='muted'>{escape(made)}</p>"
        f"{left_out}</header>" + "".join(sections) + "</main></body></html>\n"
    )


def _headline(scores: Mapping[str, Any]) -> str:
    weighted = scores.get("weighted")
    gain = scores["mean_normalised"]["enmp"] - scores["mean_normalised"]["merged"]
    if not changed(scores):
        return "No weights beat the plain merge" if weighted is not None else "No negative modules found"
    if not gain > 0:
        return f"{'Pruning' if weighted is None else 'Weighting'} did not help on the test split"
    if weighted:
        return f"{points(gain)} points with {weighted} modules weighted"
    if not scores.get("pruned"):
        return f"{points(gain)} points over the plain merge"
    return f"{points(gain)} points without {len(scores['pruned'])} negative modules"


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _picture(data: RunData, plot: Plot) -> str:
    light, dark = (
        "data:image/png;base64," + base64.b64encode(render(plot.draw, data, theme)).decode()
        for theme in (LIGHT, DARK)
    )
    caption = escape(plot.caption)
    return (
        f"<figure><picture><source media='(prefers-color-scheme: dark)' srcset='{dark}'>"
        f"<img src='{light}' alt='{caption}'></picture>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(
    header: Sequence[str], rows: Iterable[Sequence[object]], last_is_total: bool = False, text: bool = False
) -> str:
    rows = [list(row) for row in rows]
    body = "".join(
        f"<tr{' class=total' if last_is_total and row is rows[-1] else ''}>"
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    kind = " class='text'" if text else ""
    return (
        f"<div class='scroll'><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _pairs(pairs: Iterable[tuple[str, Any]]) -> str:
    items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(_show(value))}</dd>" for key, value in pairs)
    return f"<dl>{items}</dl>"


def _score_table(scores: Mapping[str, Any]) -> str:
    meaning = (
        "how often a model answers as the task's own adapter does; the data have no labels."
        if scores.get("agreement")
        else "in brackets normalised: divided by that of the task's own expert, not merged."
    )
    split = escape(str(scores.get("split", "test")))
    note = f"{measure(scores).capitalize()} on the {split} split in per cent; {meaning}"
    return _table(*score_rows(scores), last_is_total=True) + f"<p class='muted'>{note}</p>"


def _pruned_table(scores: Mapping[str, Any]) -> str:
    rows = [line.split(": ", 1) for line in pruned_lines(scores)]
    return (
        _table(["task", "pruned"], rows, text=True)
        if rows
        else "<p>Nothing is pruned: every module is merged.</p>"
    )


def _search_notes(data: RunData) -> str:
    scale = data.scores.get("scale")
    notes = [
        *cost_lines(data.scores).items(),
        ("fitness", f"{data.fitness_label} on the search split"),
        *([] if scale is None else [("merge coefficient", scale)]),
    ]
    return _pairs(notes)


def _seed_table(scores: Mapping[str, Any]) -> str:
    seeds = scores.get("seeds") or []
    if len(seeds) < 2:
        return ""
    counts = [key for key in ("weighted", "pruned") if any(s.get(key) is not None for s in seeds)]
    rows = [
        (
            f"{s['seed']}{' (chosen)' if s['seed'] == scores.get('seed') else ''}",
            *("–" if s.get(key) is None else s[key] for key in counts),
            percent(s.get("mean_normalised")),
            points(s.get("gain")),
        )
        for s in seeds
    ]
    header = [f"modules {key}" for key in counts]
    return _table(["seed", *header, f"{mean_measure(scores)}, test", "gain, points"], rows)


def _front_table(scores: Mapping[str, Any]) -> str:
    front = sorted(scores.get("pareto") or [], key=lambda point: -point["mean"])
    if not front:
        return ""
    rows = [(f"{p['mean']:.4f}", f"{p['worst']:.4f}", len(p["pruned"]), f"{p['scale']:.3g}") for p in front]
    note = "Masks that no other mask beats both in the mean and in the worst task, on the search split:"
    return f"<h3>Pareto front</h3><p>{note}</p>" + _table(["mean", "worst task", "pruned", "scale"], rows)


def _splits(data: RunData) -> list[str]:
    text = (
        "The search saw only the search split, and the merge coefficient of the plain merge was fixed there "
        "too, with nothing pruned. The selection split chose between the best masks found and the plain "
        "merge. The test split was scored once, at the end."
    )
    sizes = data.scores.get("splits") or {}
    names = ("train", "search", "selection", "test")
    rows = []
    for task in data.config.get("tasks") or []:
        source = task.get("data") or {}
        cells = [task.get("name"), source.get("source", "")]
        for which in names:
            count = (sizes.get(which) or {}).get(task.get("name"))
            cells.append((source.get(which) or "–") + (f" ({count:.0f})" if count is not None else ""))
        rows.append([str(cell) for cell in cells])
    note = "<p class='muted'>In brackets: number of examples used.</p>" if sizes else ""
    return [f"<p>{text}</p>", _table(["task", "source", *names], rows, text=True), note]


def _settings(data: RunData) -> list[str]:
    parts = []
    for key in ("base", "merge", "search", "evaluation"):
        if data.config.get(key):
            parts.append(f"<h3>{escape(key)}</h3>{_pairs(_flat(data.config[key]))}")
    return parts


def _flat(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_show(item) for item in value) or "none"
    return str(value)
