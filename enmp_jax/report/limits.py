"""What a picture can show of a run, however large it is: the rest is left out, and said."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from enmp_jax.report.data import Generation, RunData

LAYERS, TASKS, SEEDS, POINTS = 256, 48, 20, 1000


def drawn(data: RunData) -> tuple[RunData, list[str]]:
    """A run with as much as can be drawn, and a sentence for everything left out."""
    notes = []
    layers, tasks = min(data.mask["layers"], LAYERS), data.tasks[:TASKS]
    if data.mask["layers"] > layers:
        notes.append(f"Pictures show the first {layers} of {data.mask['layers']} layers.")
    if len(data.tasks) > len(tasks):
        notes.append(f"Pictures show the first {len(tasks)} of {len(data.tasks)} tasks.")
    history: list[Generation] = []
    seeds = data.by_seed()
    if len(seeds) > SEEDS:
        notes.append(f"Pictures show the first {SEEDS} of {len(seeds)} seeds.")
    for generations in list(seeds.values())[:SEEDS]:
        step = -(-len(generations) // POINTS)
        history += [*generations[:-1:step], generations[-1]]
    if len(history) < sum(map(len, list(seeds.values())[:SEEDS])):
        notes.append(f"Pictures show about {POINTS} generations of each seed, evenly spread.")
    if not notes:
        return data, []
    mask = {**data.mask, "layers": layers, "tasks": [t for t in data.mask["tasks"] if t in set(tasks)]}
    scores: dict[str, Any] = {**data.scores, "tasks": tasks}
    mask["pruned"] = _within(data.mask["pruned"], layers, mask["tasks"], 0)
    if data.mask.get("weights"):
        mask["weights"] = _within(data.mask["weights"], layers, mask["tasks"], 1)
    return dataclasses.replace(data, history=tuple(history), mask=mask, scores=scores), notes


def _within(entries: Any, layers: int, tasks: list[str], behind: int) -> list[Any]:
    """The entries ``[layer, *projection, task, *behind]`` of these layers and tasks."""
    known = set(tasks)
    return [entry for entry in entries if entry[0] < layers and entry[-1 - behind] in known]


def as_label(name: object) -> str:
    """A name as a picture shows it: short, on one line, and no formula (matplotlib's ``$``)."""
    text = "".join(c if c.isprintable() else " " for c in str(name))
    text = text if len(text) <= 40 else text[:37] + "..."
    return text.replace("$", r"\$")


def shortened(scores: Mapping[str, Any], most: int = 500) -> tuple[Mapping[str, Any], list[str]]:
    """Scores with as many tasks as a table bears, and a sentence on the others."""
    tasks = scores["tasks"]
    if len(tasks) <= most:
        return scores, []
    return {**scores, "tasks": tasks[:most]}, [f"The table shows the first {most} of {len(tasks)} tasks."]
