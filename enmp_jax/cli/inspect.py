"""``enmp inspect``: what is in LoRA adapters, and whether they can be merged."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import tyro

from enmp_jax.adapters.lora_factors import squared_norm
from enmp_jax.adapters.matching import align, check_bases
from enmp_jax.adapters.peft_import import Adapter, one_base, read_adapter
from enmp_jax.cli.output import Json
from enmp_jax.errors import UserError
from enmp_jax.module_paths import Group, lay_out
from enmp_jax.runs.layer_scores import layer_scores


@dataclass(frozen=True)
class Args(Json):
    """Show modules, ranks, scaling, norms per layer, head and base of adapters.

    The exit code is 2 if one of them cannot be merged, or not with the others."""

    adapters: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER...")]
    """PEFT directories or hub ids (``name@revision``), or files of kohya's or diffusers'."""
    base_model: str | None = None
    """Directory or hub id, for adapters that need it (DoRA, PiSSA, OLoRA), and for --larv."""
    larv: bool = False
    """Also compare every layer with the base's weights (LARV), and give factors for layer_scaling."""
    tiers: tuple[float, ...] = (0.8, 1.0, 1.2)
    """--larv: factors, of the layers with the lowest scores first; layers are divided evenly among them."""


def run(args: Args) -> None:
    """Print the report.

    Raises:
        UserError: after printing, when an adapter is refused or they do not belong together.
    """
    if not args.adapters:
        raise UserError("give at least one adapter")
    if args.larv and args.base_model is None:
        raise UserError("--larv compares the adapters with the base model: give --base-model DIR")
    if args.larv and not (len(args.tiers) > 1 and all(map(math.isfinite, args.tiers))):
        raise UserError("--tiers: give two finite numbers or more")
    report = inspect(args.adapters, args.base_model)
    refused = [entry["source"] for entry in report["adapters"] if entry["refused"]]
    if args.larv and args.base_model is not None and not (refused or report["together"]):
        sources = {f"{i}": source for i, source in enumerate(args.adapters)}
        report["larv"] = layer_scores(sources, args.base_model, args.tiers)._asdict()
    print(json.dumps(report, indent=2) if args.json else render(report))
    if refused:
        raise UserError(
            f"{len(refused)} of {len(args.adapters)} adapters cannot be merged: {', '.join(refused)}"
        )
    if report["together"]:
        raise UserError("the adapters cannot be merged with each other: see above")


def inspect(sources: Sequence[str], base: str | None = None) -> dict[str, Any]:
    """Describe adapters, JSON-ready.

    Returns:
        ``adapters``: one dict per source with ``source``, ``refused`` (the reason, or None) and, when
        it was read, ``commit``, ``base_model``, ``task_type``, ``rank``, ``alpha``, ``rslora``,
        ``n_modules``, ``n_parameters``, ``projections`` (per template: layers, shape, ranks, scalings,
        type, kind of layer), ``norms`` (layer -> Frobenius norm of all its deltas) and ``heads`` (shapes).
        ``together``: why the readable ones cannot be merged with each other, or None.
    """
    entries, good = [], {}
    for source in sources:
        try:
            adapter = read_adapter(source, base)
            described = describe(adapter)
            entries.append({"source": source, "refused": None, **described})
            good[source] = adapter
        except UserError as error:
            entries.append({"source": source, "refused": str(error)})
    together = None
    try:
        check_bases({name: adapter.base_model for name, adapter in good.items()}, None, False)
        if good:
            align({name: list(adapter.modules) for name, adapter in good.items()}, one_base(good))
    except UserError as error:
        together = str(error)
    return {"adapters": entries, "together": together}


def describe(adapter: Adapter) -> dict[str, Any]:
    """One adapter, JSON-ready; see ``inspect``.

    Raises:
        UserError: a layer number that is none.
    """
    projections: dict[str, dict[str, Any]] = {}
    squares: dict[Group, float] = {}
    shapes = {path: (b.shape[0], a.shape[1]) for path, (a, b) in adapter.modules.items()}
    layout = lay_out(shapes)
    for path, (a, b) in adapter.modules.items():
        name, row = layout.places[path]
        layer = layout.groups[row]
        kept = adapter.stored.get(path)
        new: dict[str, Any] = {"layers": [], "shape": list(shapes[path]), "ranks": [], "scalings": []}
        new |= {"dtype": str(a.dtype), "kind": kept.kind if kept else "linear"}
        found = projections.setdefault(name, new)
        found["layers"].append(layer)
        for key, value in (("ranks", a.shape[0]), ("scalings", adapter.settings.scaling(path))):
            if value not in found[key]:
                found[key].append(value)
        squares[layer] = squares.get(layer, 0.0) + squared_norm(b, a)
    order = {group: i for i, group in enumerate(layout.groups)}
    for found in projections.values():
        found["layers"].sort(key=order.__getitem__)
    sizes = [a.size + b.size for a, b in adapter.modules.values()]
    return {
        "commit": adapter.commit,
        "base_model": adapter.base_model,
        "task_type": adapter.settings.task_type,
        "rank": adapter.settings.rank,
        "alpha": adapter.settings.alpha,
        "rslora": adapter.settings.rslora,
        "n_modules": len(adapter.modules),
        "n_parameters": sum(sizes),
        "projections": dict(sorted(projections.items())),
        "norms": {
            str(layer): float(np.sqrt(squares[layer])) for layer in sorted(squares, key=order.__getitem__)
        },
        "heads": {
            f"{path}.{name}": list(value.shape)
            for path, head in adapter.heads.items()
            for name, value in head.items()
        },
    }


def render(report: Mapping[str, Any]) -> str:
    """The report as text."""
    lines = []
    for entry in report["adapters"]:
        lines.append(entry["source"])
        if entry["refused"]:
            lines += [f"  refused: {entry['refused']}", ""]
            continue
        kind = "rsLoRA" if entry["rslora"] else "LoRA"
        lines += [
            f"  base       {entry['base_model'] or 'not named'}",
            f"  {kind:10} r {entry['rank']}, alpha {entry['alpha']:g}, {entry['n_modules']} modules, "
            f"{entry['n_parameters'] / 1e6:.2f} M parameters"
            + (f", {entry['task_type']}" * bool(entry["task_type"])),
        ]
        if entry["commit"]:
            lines.append(f"  commit     {entry['commit']}")
        for name, found in entry["projections"].items():
            out, inner = found["shape"]
            lines.append(
                f"  {name}: {out}x{inner}, layers {_ranges(found['layers'])}, rank {_join(found['ranks'])}, "
                f"scaling {_join(found['scalings'])}, {found['dtype']}"
                + f", {found['kind']}"
                * (found["kind"] != "linear")
            )
        norms = ", ".join(f"{layer}: {norm:.3g}" for layer, norm in entry["norms"].items())
        heads = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in entry["heads"].items())
        lines += [f"  norms      {norms}", f"  head       {heads or 'none'}", ""]
    if report["together"]:
        lines.append(f"not together: {report['together']}")
    if larv := report.get("larv"):
        lines.append(f"{'layer':>5} {'contrast':>9} {'conflict':>9} {'score':>9}")
        columns = zip(larv["contrast"], larv["conflict"], larv["score"], strict=True)
        lines += [f"{i:>5} {x:>9.4g} {y:>9.4g} {z:>9.4g}" for i, (x, y, z) in enumerate(columns)]
        lines.append(f"layer_scaling: [{_join(larv['layer_scaling'])}]")
    return "\n".join(lines).rstrip()


def _ranges(layers: Sequence[Group]) -> str:
    """0-3, 5 for [0, 1, 2, 3, 5]; encoder.block.0-2 for paths."""
    parts: list[tuple[str, list[int]]] = []
    for layer in layers:
        before, _, number = str(layer).rpartition(".")
        if not number.isdecimal():  # a path without a layer
            parts.append((str(layer), []))
            continue
        before, last = f"{before}." if before else "", parts[-1] if parts else ("", [])
        if last[1] and last[0] == before and int(number) == last[1][-1] + 1:
            last[1].append(int(number))
        else:
            parts.append((before, [int(number)]))
    return ", ".join(
        before + (f"{found[0]}-{found[-1]}" if len(found) > 1 else "".join(map(str, found)))
        for before, found in parts
    )


def _join(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
