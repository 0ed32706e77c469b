"""``README.md`` of what is exported: hub metadata, and what was merged, dropped and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import yaml

from enmp_jax.adapters.peft_import import LoadedAdapters
from enmp_jax.adapters.recipe import Recipe, adapter_name, command, public_name, versions
from enmp_jax.io.hub import hub_id

Kind = Literal["adapters", "peft", "checkpoint"]
_MAX_ROWS = 400  # dropped modules listed one by one


def model_card(
    kind: Kind,
    loaded: LoadedAdapters,
    recipe: Recipe,
    base: str | None,
    *,
    task: str | None = None,
    notes: Sequence[str] = (),
    **options: Any,
) -> str:
    """The model card of an export, without a local path.

    Args:
        kind: the export format.
        loaded: the adapters.
        recipe: the merge.
        base: name of the base model (a hub id goes into the metadata).
        task: for ``adapters``: whose pruned adapter this directory holds; None: the directory of all.
        notes: paragraphs on this export (rank, error, types).
        options: as for ``recipe.config_yaml``.
    """
    dropped = [module for module in recipe.pruned if task is None or module[-1] == task]
    subject = f"LoRA adapter: {task}" if task else "LoRA adapters"
    title = {
        "adapters": f"Pruned {subject}" if dropped else subject,
        "peft": "Merged LoRA adapter",
        "checkpoint": "Merged model",
    }[kind]
    lines = [f"# {title}", "", _what(kind, loaded, base, bool(dropped)), ""]
    for note in notes:
        lines += [note, ""]
    lines += ["## Adapters", "", "| task | adapter | rank | modules |", "|---|---|---|---|"]
    for name, adapter in loaded.adapters.items():
        if task in (None, name):
            ranks = sorted({a.shape[0] for a, _ in adapter.modules.values()})
            text = ", ".join(map(str, ranks))
            lines.append(
                f"| {_cell(name)} | {_cell(adapter_name(adapter))} | {text} | {len(adapter.modules)} |"
            )
    lines += ["", *_scores(recipe), *_dropped(dropped)]
    merge = ", ".join(f"{key} {value}" for key, value in recipe.merge.items() if value is not None)
    lines += ["## How it was made", ""]
    if merge and kind != "adapters":
        lines += [f"Merge: {merge}.", ""]
    if recipe.seed is not None:
        lines += [f"Seed of the search: {recipe.seed}.", ""]
    lines += [", ".join(f"{name} {version}" for name, version in versions().items()) + ".", ""]
    lines += ["```", command(kind, loaded, recipe, **options), "```", ""]
    return f"---\n{_metadata(kind, base)}---\n\n" + "\n".join(lines)


def _metadata(kind: Kind, base: str | None) -> str:
    data: dict[str, Any] = {"library_name": "transformers" if kind == "checkpoint" else "peft"}
    if found := hub_id(base):
        # the hub's own vocabulary
        data |= {
            "base_model": found.repository,
            "base_model_relation": "merge" if kind == "checkpoint" else "adapter",
        }
    data["tags"] = ["lora", "merge", "model-merging", "enmp", *(["peft"] if kind != "checkpoint" else [])]
    return yaml.safe_dump(data, sort_keys=False)


def _what(kind: Kind, loaded: LoadedAdapters, base: str | None, pruned: bool) -> str:
    of = f" of {public_name(base)}" if base else ""
    if kind == "adapters":
        what = "with their negative modules removed" if pruned else "with nothing pruned"
        return (
            f"LoRA adapters{of} {what} (ENMP, arXiv 2604.17753), made to be merged. "
            "The scaling is in the weights: lora_alpha equals r."
        )
    whole = "One model" if kind == "checkpoint" else "One LoRA adapter"
    return f"{whole}{of} for {len(loaded.adapters)} tasks: {', '.join(loaded.adapters)}."


def _scores(recipe: Recipe) -> list[str]:
    scores = recipe.scores
    if not scores:
        return []
    columns = [c for c in ("reference", "merged", "enmp") if isinstance(scores.get(c), Mapping)]
    if not recipe.pruned and "enmp" in columns and scores["enmp"] == scores.get("merged"):
        columns.remove("enmp")  # the plain merge again
    tasks = list(dict.fromkeys(task for c in columns for task in scores[c]))
    titles = {
        "reference": "own adapter",
        "merged": "merged, nothing pruned",
        "enmp": "merged, pruned" if recipe.pruned else "merged, as searched",
    }
    what = "Agreement with the own adapter" if scores.get("agreement") else "Accuracy"
    lines = [f"## {what} ({scores.get('split', 'test')} split)", ""]
    lines += [f"| task | {' | '.join(titles[c] for c in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for task in tasks:
        values = [scores[c].get(task) for c in columns]
        cells = ["" if value is None else f"{value:.4f}" for value in values]
        lines.append(f"| {_cell(task)} | {' | '.join(cells)} |")
    return [*lines, ""]


def _dropped(dropped: Sequence[Sequence[Any]]) -> list[str]:
    if not dropped:
        return ["## Dropped modules", "", "None.", ""]
    lines = ["## Dropped modules", ""]
    for module in dropped[:_MAX_ROWS]:
        layer, *projection, name = module
        lines.append(f"- layer {layer}, {', '.join([*projection, name])}")
    if len(dropped) > _MAX_ROWS:
        lines.append(f"- and {len(dropped) - _MAX_ROWS} more")
    return [*lines, ""]


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
