"""What may lie beside the results of a run: effects of modules, masks of seeds, intervals, exports, tables.

Runs of older versions lack some of it, and a report does without what is not there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enmp_jax.config.compose import parse_yaml
from enmp_jax.errors import UserError, one_line
from enmp_jax.io.files import is_file
from enmp_jax.report.damage import DAMAGE, finite, mapping, number, text

RECIPE = "enmp_config.yaml"
"""What an export's directory has beside its weights (see ``adapters.recipe``)."""


@dataclass(frozen=True)
class Effects:
    """What leaving out each module alone does to the fitness.

    Attributes:
        kind: ``leave_one_out``, measured, or ``first_order``, by the gradient.
        fitness: of which fitness.
        values: [*module, effect] of every module; positive where the merge is better without it.
    """

    kind: str
    fitness: str
    values: list[list[Any]]


@dataclass(frozen=True)
class Beside:
    """What was found, empty where there is none.

    Attributes:
        effects: one of each kind at most.
        seeds: seed -> ``pruned`` and perhaps ``weights`` of its winner, as in ``mask.json``.
        gain: model -> its gain over the plain merge on the test split with ``low`` and ``high``; under
            ``tasks`` that of every task.
        compare: content of ``compare.json``.
        controls: content of ``controls.json``.
        exports: directory -> its recipe.
    """

    effects: list[Effects] = field(default_factory=list)
    seeds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    gain: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    compare: Mapping[str, Any] | None = None
    controls: Mapping[str, Any] | None = None
    exports: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def read_beside(run_dir: Path) -> Beside:
    """Read what there is.

    Raises:
        UserError: a file is damaged; the line names it.
    """
    found = {
        name: _optional(run_dir / f"{name}.json", check)
        for name, check in (
            ("effects", _check_effects), ("seeds", _check_seeds), ("test-answers", _check_gain),
            ("compare", _check_compare), ("controls", _check_controls),
        )
    }  # fmt: skip
    effects = [_effects(found["effects"], found["effects"]["kind"])] if found["effects"] else []
    for row in (found["controls"] or {}).get("rows", ()):
        kind = row["row"].replace(" ", "_")
        if "effects" in row and kind not in {known.kind for known in effects}:
            effects.append(_effects(row, kind))
    gain = (found["test-answers"] or {}).get("gain", {})
    if not gain and found["controls"]:  # a run of an older version whose controls were made later
        gain = {"enmp": row["gain"] for row in found["controls"]["rows"] if row["row"] == "found"}  # noqa: B035
    exports = {}
    for path in sorted(run_dir.glob(f"*/{RECIPE}")):
        recipe = _optional(path, lambda content: str(content["format"]), _yaml)
        exports[path.parent.name] = recipe or {}
    return Beside(effects, found["seeds"] or {}, gain, found["compare"], found["controls"], exports)


def _effects(row: Mapping[str, Any], kind: str) -> Effects:
    return Effects(kind, str(row.get("fitness", "fitness")), row["effects"])


def _yaml(content: str) -> Any:
    return parse_yaml(content, "the file")


def _optional(
    path: Path, check: Callable[[Mapping[str, Any]], object], parse: Callable[[str], Any] = json.loads
) -> Mapping[str, Any] | None:
    if not is_file(path):
        return None
    try:
        content = mapping(parse(text(path)))
        check(content)
    except DAMAGE as error:
        raise UserError(
            f"{path} is damaged: {type(error).__name__} at {one_line(error)}: remove it, or make it again"
        ) from None
    return content


def _check_values(entries: Any) -> None:
    for layer, *_, task, value in entries:
        if type(layer) is not int or not isinstance(task, str):
            raise TypeError("a module")
        number(value)


def _check_effects(content: Mapping[str, Any]) -> None:
    str(content["kind"])
    _check_values(content["effects"])


def _check_seeds(content: Mapping[str, Any]) -> None:
    for seed, winner in content.items():
        int(seed)
        for _layer, *_, _task in winner["pruned"]:
            pass
        _check_values(winner.get("weights") or [])


def _check_interval(gain: Mapping[str, Any] | None) -> None:
    if gain is not None:
        for key in ("difference", "low", "high"):
            finite(gain[key])


def _check_gain(content: Mapping[str, Any]) -> None:
    for gain in content["gain"].values():
        for one in (gain, *gain.get("tasks", {}).values()):
            _check_interval(one)


def _check_compare(content: Mapping[str, Any]) -> None:
    list(content["tasks"])
    dict(content.get("left_out", {}))
    for row in content["rows"]:
        if not isinstance(row["method"], str) or not isinstance(row["space"], str):
            raise TypeError("method")
        dict(row["hyperparameters"])
        for value in (
            *row["mean_normalised"].values(),
            *row["merged"].values(),
            row["seconds"],
            row["scale"],
        ):
            finite(value)


def _check_controls(content: Mapping[str, Any]) -> None:
    list(content["sentences"])
    for row in content["rows"]:
        if not isinstance(row["row"], str):
            raise TypeError("row")
        finite(row["mean_normalised"])
        list(row["values"])
        for key in ("gain", "found_better_by"):
            _check_interval(row["gain"] if row["row"] == "found" else row.get(key))
        _check_values(row.get("effects") or [])
