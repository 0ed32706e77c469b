"""``enmp init``: a run file to start from, written from what the adapters say of themselves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from enmp_jax.adapters.matching import check_bases
from enmp_jax.adapters.peft_import import Adapter, read_adapter
from enmp_jax.config.reference import keys_of
from enmp_jax.config.sections import EvaluationConfig, ExportConfig, MergeConfig, SearchConfig
from enmp_jax.errors import UserError

_DATA = """\
    data:
      # npz:FILE, tfds:NAME, hf:NAME, folder:DIR or jsonl:FILE; three splits that share no example
      source: {source}
      search: {search}
      selection: {selection}
      test: {test}
"""
_SECTIONS = {
    "merge": (
        MergeConfig,
        ("scale_grid", "seed", "task_weights"),
        "density: 0.2  # hyperparameters of the method",
    ),
    "search": (SearchConfig, (), ""),
    "evaluation": (EvaluationConfig, (), ""),
    "export": (ExportConfig, (), ""),
}


def starting_run_file(sources: Sequence[str]) -> str:
    """The text of a run file for these adapters, its optional keys as comments.

    Args:
        sources: directories or hub ids of the adapters, one a task.

    Raises:
        UserError: no adapter, one that cannot be merged, or of another base than the others.
    """
    if not sources:
        raise UserError("give at least one adapter: enmp init ADAPTER... > run.yaml")
    adapters = [read_adapter(source) for source in sources]
    names = _names(adapters)
    base = check_bases({n: a.base_model for n, a in zip(names, adapters)}, None, False)
    lines = [
        "# A run file of enmp-jax: fill in what stands in CAPITALS, then",
        "#   enmp search run.yaml --dry-run",
        "#   enmp search run.yaml --out runs/mine",
        "# Every key: docs/run-file.md. Lines that begin with # are the defaults.",
        "",
        "base:",
        f"  model: {_quoted(base or 'DIRECTORY_OR_HUB_ID')}",
        "  # dtype: float32           # or bfloat16",
        "",
        "tasks:",
    ]
    for name, adapter in zip(names, adapters):
        lines += _task(name, adapter)
    for section, (cls, hidden, more) in _SECTIONS.items():
        lines += ["", f"{section}:" if section == "merge" else f"# {section}:"]
        lines += ["  method: ties"] if section == "merge" else []
        lines += [f"  # {more}"] if more else []
        for key in keys_of(cls):
            if key.name not in hidden and not (section == "merge" and key.name == "method"):
                first = re.split(r"(?<=[.;:]) ", key.help)[0].rstrip(".;:")
                indent = "  # " if section == "merge" else "#   "
                line = f"{indent}{key.name}: {key.default}"
                lines.append(f"{line:<32} # {first}" if first and len(first) < 70 else line)
    return "\n".join(lines) + "\n"


def _task(name: str, adapter: Adapter) -> list[str]:
    causal = adapter.settings.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not adapter.heads
    source = adapter.source if adapter.commit else str(Path(adapter.source).expanduser())
    lines = [f"  - name: {_quoted(name)}", f"    adapter: {_quoted(source)}"]
    splits = ("search", "selection", "test") if causal else ("train[:500]", "train[500:1000]", "test")
    kind = f"jsonl:DATA/{name}" if causal else "tfds:NAME"
    data = _DATA.format(
        source=_quoted(kind), search=_quoted(splits[0]), selection=_quoted(splits[1]), test=splits[2]
    )
    lines += data.rstrip().splitlines()
    if causal:
        return lines
    if adapter.heads:
        return [
            *lines,
            f"    # head: {{source: adapter}}    # {', '.join(adapter.heads)}, saved with the adapter",
        ]
    return [
        *lines,
        "    head: {source: base}         # or zero-shot with prompts (CLIP), or a safetensors file",
    ]


def _names(adapters: Sequence[Adapter]) -> list[str]:
    """One name a task: the last part of its path or hub id, numbered where it is not alone."""
    plain = [
        re.sub(r"[/:]", "-", a.source.partition("@")[0].rstrip("/").rsplit("/", 1)[-1]) for a in adapters
    ]
    return [
        name if plain.count(name) == 1 and name not in ("", ".", "..") else f"task-{i + 1}"
        for i, name in enumerate(plain)
    ]


def _quoted(text: str) -> str:
    """A text as YAML has it on one line."""
    return yaml.safe_dump(text, width=10**6, allow_unicode=True).split("\n")[0]
