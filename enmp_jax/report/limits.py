"""How much of a run a page or a picture shows, however large it is: the rest is left out, and said."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from enmp_jax.report.data import Generation, RunData


class Limits(NamedTuple):
    """Most of everything."""

    layers: int
    tasks: int
    cells: int
    seeds: int
    generations: int


PAGE = Limits(layers=256, tasks=500, cells=24_000, seeds=20, generations=300)
PICTURE = Limits(layers=256, tasks=48, cells=6_000, seeds=20, generations=1000)
CLOUD = 4000
"""Most members that are drawn one by one."""


def drawn(data: RunData, most: Limits = PICTURE) -> tuple[RunData, list[str]]:
    """A run with as much as can be drawn, and a sentence for everything left out."""
    notes = []
    layers = min(data.mask["layers"], most.layers)
    tasks = data.tasks[: max(1, min(most.tasks, most.cells // layers))]
    if data.mask["layers"] > layers:
        notes.append(f"Pictures show the first {layers} of {data.mask['layers']} layers.")
    if len(data.tasks) > len(tasks):
        notes.append(f"Pictures show the first {len(tasks)} of {len(data.tasks)} tasks.")
    history: list[Generation] = []
    seeds = data.by_seed()
    if len(seeds) > most.seeds:
        notes.append(f"Pictures show the first {most.seeds} of {len(seeds)} seeds.")
    for generations in list(seeds.values())[: most.seeds]:
        step = -(-len(generations) // most.generations)
        history += [*generations[:-1:step], generations[-1]]
    if len(history) < sum(map(len, list(seeds.values())[: most.seeds])):
        notes.append(f"Pictures show about {most.generations} generations of each seed, evenly spread.")
    if not notes:
        return data, []
    known = set(tasks)
    mask = {**data.mask, "layers": layers, "tasks": [t for t in data.mask["tasks"] if t in known]}
    mask["pruned"] = [entry for entry in data.mask["pruned"] if entry[0] < layers and entry[-1] in known]
    if data.mask.get("weights"):
        mask["weights"] = [e for e in data.mask["weights"] if e[0] < layers and e[-2] in known]
    scores: dict[str, Any] = {**data.scores, "tasks": tasks}
    return dataclasses.replace(data, history=tuple(history), mask=mask, scores=scores), notes


def cut(name: object) -> str:
    """A name short enough for a picture, on one line."""
    text = "".join(c if c.isprintable() else " " for c in str(name))
    return text if len(text) <= 40 else text[:37] + "..."


def shortened(scores: Mapping[str, Any], most: int = PAGE.tasks) -> tuple[Mapping[str, Any], list[str]]:
    """Scores with as many tasks as a table bears, and a sentence on the others."""
    tasks = scores["tasks"]
    if len(tasks) <= most:
        return scores, []
    return {**scores, "tasks": tasks[:most]}, [f"The table shows the first {most} of {len(tasks)} tasks."]
