"""What a report says in sentences."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from enmp_jax.report.data import RunData
from enmp_jax.report.tables import changed, how_many, percent, points

EXACT = {
    "delta": "exact: what the merge adds to each weight",
    "checkpoint": "exact up to the rounding of the file's type",
    "peft": "one LoRA adapter",
    "gguf": "one LoRA adapter for llama.cpp",
    "adapters": "the adapters as they go into the merge, exact; a plain sum of them is the merge, other "
    "methods also look at what they merge",
}
"""Format of an export -> what it keeps of the model that was scored (see docs/exports.md)."""


def headline(scores: Mapping[str, Any], gain: Mapping[str, Any] | None) -> str:
    """One line for those who read nothing else.

    Args:
        scores: of the run.
        gain: with its interval, if there is one.
    """
    weighted, total = scores.get("weighted"), scores.get("modules")
    if not changed(scores):
        return "No weights beat the plain merge" if weighted is not None else "No negative modules found"
    count = weighted or len(scores.get("pruned") or [])
    of = f"{count} of {total}" if total and count != total else f"{count}"
    act = "Another scale" if not count else f"{'Weighting' if weighted else 'Leaving out'} {of} LoRA modules"
    if not points_gained(scores) > 0:
        return f"{act} did not help on the test split"
    if gain is not None and gain["low"] <= 0:
        return f"{act} may help: the gain is within what chance can do"
    return f"{act} makes the merged model better"


def points_gained(scores: Mapping[str, Any]) -> float:
    """What the search gained in the mean."""
    return scores["mean_normalised"]["enmp"] - scores["mean_normalised"]["merged"]


def within(gain: Mapping[str, Any] | None) -> str:
    """``+1.2 to +3.4``, empty without an interval."""
    return "" if gain is None else f"{points(gain['low'])} to {points(gain['high'])}"


def left_out(data: RunData) -> str:
    """Which tasks and layers lost most modules."""
    scores = data.scores
    modules = [(layer, str(task)) for layer, *_, task in scores.get("pruned") or []]
    if not modules:
        return f"{_capital(how_many(scores))}; none is left out."
    tasks, layers = (Counter(module[i] for module in modules).most_common() for i in (1, 0))
    (task, most), (layer, busiest) = tasks[0], layers[0]
    untouched = [name for name in scores["tasks"] if name not in dict(tasks)]
    said = f"{_capital(how_many(scores))}."
    said += f" Most were taken from {task} ({most}), and in layer {layer} ({busiest})."
    if untouched and len(untouched) <= 8:
        said += f" Nothing was taken from {', '.join(untouched)}."
    return said


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def export_rows(data: RunData) -> list[list[str]]:
    """Directory, format and exactness of everything that was exported."""
    rows = []
    for folder, recipe in data.beside.exports.items():
        kind = str(recipe["format"])
        said, own = EXACT.get(kind, kind), recipe.get("exported")
        options = recipe.get("options") or {}
        if isinstance(options, Mapping) and options.get("rank"):
            said += f" of rank {options['rank']}"
        if isinstance(own, Mapping):
            said += (
                f"; it misses the merge by {percent(own.get('error'))} % and was scored itself: "
                f"{percent(own.get('mean_normalised'))} %"
            )
        elif isinstance(recipe.get("error"), float):
            said += (
                f"; it misses the merge by {100 * recipe['error']:.2g} %" if recipe["error"] else "; exact"
            )
        rows.append([f"{folder}/", kind, said])
    return rows


def commands(data: RunData) -> list[tuple[str, str]]:
    """Commands that run as they are in the directory of the run directory, and what they do."""
    name = shlex.quote(f"./{data.name}")
    again = shlex.quote(f"./{data.name}-again")
    return [
        (f"enmp search {name} --out {again}", "the same search once more, with the settings that it keeps"),
        (f"enmp controls {name}", "is it more than luck, and more than simpler ways give?"),
        (f"enmp compare {name}", "every other merge method on the same adapters"),
        (f"enmp verify {name}", "prove that the exported files are what they claim"),
        (f"enmp report {name}", "this page again"),
    ]


def typed(environment: Mapping[str, Any]) -> str | None:
    """The command that made the run, as it was typed."""
    command = environment.get("command")
    if not isinstance(command, Sequence) or isinstance(command, str) or not command:
        return None
    return shlex.join(["enmp" if word == "__main__.py" else str(word) for word in command])
