"""``README.md`` of what is exported: hub metadata, and what was merged, dropped and measured."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import yaml

from enmp_jax.adapters.checks import Check
from enmp_jax.adapters.peft_import import LoadedAdapters
from enmp_jax.adapters.recipe import Recipe, adapter_names, command, public_name, versions, where
from enmp_jax.errors import one_line
from enmp_jax.io.hub import hub_id

Kind = Literal["adapters", "peft", "checkpoint", "gguf"]
_MAX_ROWS = 400  # modules listed one by one


def model_card(
    kind: Kind,
    loaded: LoadedAdapters,
    recipe: Recipe,
    base: str | None,
    *,
    task: str | None = None,
    notes: Sequence[str] = (),
    checks: Sequence[Check] = (),
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
        checks: what was looked at in the files written.
        options: as for ``recipe.config_yaml``.
    """
    dropped = [module for module in recipe.pruned if task is None or module[-1] == task]
    weighted = [entry for entry in recipe.between if task is None or entry[-2] == task]
    subject = f"LoRA adapter: {_escaped(task)}" if task else "LoRA adapters"
    kind_of_mask = "Weighted " if weighted else "Pruned " if dropped else ""
    title = {
        "adapters": f"{kind_of_mask}{subject}",
        "peft": "Merged LoRA adapter",
        "checkpoint": "Merged model",
        "gguf": "Merged LoRA adapter for llama.cpp",
    }[kind]
    lines = [f"# {title}", "", _what(kind, loaded, base, bool(dropped), bool(weighted)), ""]
    for note in notes:
        lines += [note, ""]
    lines += ["## Adapters", "", "| task | adapter | rank | modules |", "|---|---|---|---|"]
    names = adapter_names(loaded)
    for name, adapter in loaded.adapters.items():
        if task in (None, name):
            ranks = sorted({a.shape[0] for a, _ in adapter.modules.values()})
            text = ", ".join(map(str, ranks))
            lines.append(f"| {_escaped(name)} | {_escaped(names[name])} | {text} | {len(adapter.modules)} |")
    lines += ["", *_scores(recipe), *_modules("Dropped modules", dropped)]
    if weighted:
        shown = [(*module, f"weight {weight:.6g}") for *module, weight in weighted]
        lines += _modules("Weights of other modules", shown)
    lines += _verified(checks)
    merge = ", ".join(f"{key} {value}" for key, value in recipe.merge.items() if value is not None)
    lines += ["## How it was made", ""]
    if merge and kind != "adapters":
        lines += [f"Merge: {merge}.", ""]
    if recipe.seed is not None:
        lines += [f"Seed of the search: {recipe.seed}.", ""]
    lines += [", ".join(f"{name} {version}" for name, version in versions().items()) + ".", ""]
    words = command(kind, loaded, recipe, **options)
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", words)), 0)
    place = where(loaded, recipe)
    lines += [f"To repeat it, {place}:", "", fence, words, fence, ""]
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


def _what(kind: Kind, loaded: LoadedAdapters, base: str | None, pruned: bool, weighted: bool) -> str:
    of = f" of {_escaped(public_name(base))}" if base else ""
    if kind == "adapters":
        what = "with their negative modules removed" if pruned else "with nothing pruned"
        what = "with a weight on every module" if weighted else what
        return (
            f"LoRA adapters{of} {what} (ENMP, arXiv 2604.17753), made to be merged. "
            "The scaling is in the weights: lora_alpha equals r."
        )
    whole = "One model" if kind == "checkpoint" else "One LoRA adapter"
    return f"{whole}{of} for {len(loaded.adapters)} tasks: {', '.join(map(_escaped, loaded.adapters))}."


def _scores(recipe: Recipe) -> list[str]:
    scores = recipe.scores
    if not scores:
        return []
    columns = [c for c in ("reference", "merged", "enmp") if isinstance(scores.get(c), Mapping)]
    if not (recipe.pruned or recipe.weights) and "enmp" in columns and scores["enmp"] == scores.get("merged"):
        columns.remove("enmp")  # the plain merge again
    tasks = list(dict.fromkeys(task for c in columns for task in scores[c]))
    titles = {
        "reference": "own adapter",
        "merged": "merged, nothing pruned",
        "enmp": "merged, weighted"
        if recipe.weights
        else "merged, pruned"
        if recipe.pruned
        else "merged, as searched",
    }
    own = recipe.exported
    if own:  # the files are not quite the model that was scored
        scores = {**scores, "exported": own["accuracy"]}
        columns.append("exported")
        titles["exported"] = f"these files, error {own['error']:.1%}"
        tasks = tasks or list(own["accuracy"])
    what = "Agreement with the own adapter" if scores.get("agreement") else "Accuracy"
    if "likelihood" in scores.get("metric", {}).values():
        what += ", of completions exp(-loss)"
    lines = [f"## {what} ({scores.get('split', 'test')} split)", ""]
    lines += [f"| task | {' | '.join(titles[c] for c in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for task in tasks:
        values = [scores[c].get(task) for c in columns]
        cells = ["" if value is None else f"{value:.4f}" for value in values]
        lines.append(f"| {_escaped(task)} | {' | '.join(cells)} |")
    return [*lines, ""]


def _verified(checks: Sequence[Check]) -> list[str]:
    if not checks:
        return []
    lines = ["## Verified", "", "| what | | |", "|---|---|---|"]
    rows = [
        f"| {check.name} | {'ok' if check.ok else 'not'} | {_escaped(check.detail)} |" for check in checks
    ]
    return [*lines, *rows, ""]


def _modules(title: str, modules: Sequence[Sequence[Any]]) -> list[str]:
    """A list of modules, and of their weights where they come last."""
    lines = [f"## {title}", ""]
    for layer, *words in modules[:_MAX_ROWS]:
        group = f"layer {layer}" if isinstance(layer, int) else _escaped(layer)
        lines.append(f"- {group}, {', '.join(_escaped(word) for word in words)}")
    if len(modules) > _MAX_ROWS:
        lines.append(f"- and {len(modules) - _MAX_ROWS} more")
    return [*lines, *([] if modules else ["None."]), ""]


def _escaped(text: object) -> str:
    """A name as Markdown shows it: on one line, no markup. Underscores within words are no markup anyway."""
    shown = re.sub(r"([\\`*\[\]<>|~#&])", r"\\\1", one_line(text))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", shown)
