"""``enmp merge``: merge adapters into deltas, one adapter, pruned adapters or a checkpoint."""

from __future__ import annotations

import functools
import json
import operator
import sys
from collections.abc import Mapping
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import tyro

from enmp_jax import masks, merges
from enmp_jax.adapters.formats import ExportOptions, Merged, Written, write
from enmp_jax.adapters.peft_export import TOLERANCE
from enmp_jax.adapters.peft_import import LoadedAdapters, load_adapters
from enmp_jax.adapters.recipe import Recipe
from enmp_jax.adapters.task_vector_export import export_task_vectors, is_model
from enmp_jax.cli.output import Json
from enmp_jax.deltas import Deltas
from enmp_jax.errors import UserError, one_line
from enmp_jax.io.writing import check_unused
from enmp_jax.masks import Keep, Module
from enmp_jax.merges.base import merge_stack
from enmp_jax.merges.hyperparameters import Hyperparameter, hyperparameters
from enmp_jax.runs import mask_file


@dataclass(frozen=True)
class Options(Json):
    """Merge LoRA adapters of any architecture (PEFT's, diffusers', kohya's), all modules or under a mask or
    weights. Needs no base model and no data (but for --format checkpoint and gguf)."""

    adapter: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TASK=DIR")]
    """A task's name and its PEFT directory or hub id (``name@revision``), or a file of kohya's or diffusers',
    or a whole fine-tuned model (sum, mean, ties, dare, dare_ties, tsv and iso); once for each task."""
    out: Path
    """Directory to make."""
    format: Literal["delta", "peft", "adapters", "checkpoint", "gguf"] = "delta"
    """``delta``: delta.safetensors, exact; ``peft``: one merged adapter, exact where the merged deltas are of
    low rank, else (ties, dare, dare_ties, breadcrumbs, della and sce in full space: dense) and fisher within
    --tolerance; ``adapters``: the pruned or weighted adapters, to be merged by others; ``checkpoint``: the
    base model with everything merged in, exact but for the rounding of its type; ``gguf``: as ``peft``, for
    llama.cpp."""
    method: Annotated[
        str | None, tyro.conf.arg(help=f"One of {', '.join(merges.ALL)}; default: the mask's, else ties.")
    ] = None
    space: Annotated[
        str | None, tyro.conf.arg(help=f"One of {', '.join(merges.SPACES)}; default: the mask's, else full.")
    ] = None
    scale: float | None = None
    """Merge coefficient; default: the mask's, else 1."""
    isotropize: bool = False
    """Give the merged delta equal singular values."""
    seed: int | None = None
    """Of methods that draw at random; default: 0."""
    task_weights: tuple[float, ...] | None = None
    """One factor for each task's delta, in the order of --adapter."""
    statistics: str | None = None
    """regmean, fisher: a file of ``enmp statistics``."""
    layer_scaling: tuple[float, ...] | None = None
    """Factors of the first and the last layer's merged delta, linear between (LiNeS), or one for every layer
    (LARV: enmp inspect --larv)."""
    prune: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="LAYER[:PROJECTION]:TASK")
    ] = ()
    """A module to leave out (``0:dtd`` or ``0:q_proj:dtd``), layers by number, or by path where there are
    several stacks of them (``decoder.block.3:dtd``, ``lm_head:dtd``); may be given many times."""
    mask: Path | None = None
    """A mask.json of a search: modules, weights, scale and, unless told otherwise, the merge that it was
    found for. Another --method starts from its own defaults."""
    base_model: str | None = None
    """Directory, hub id or GGUF file, for --format checkpoint and gguf, and for adapters that are deltas only
    together with it (DoRA, PiSSA, OLoRA)."""
    rank: int | None = None
    """peft, gguf: largest rank, whatever the error."""
    tolerance: float = TOLERANCE
    """peft, gguf: relative error (Frobenius norm) that dense deltas may have, at the smallest rank for it."""
    strict: bool = False
    """peft, gguf: refuse to write an adapter that misses the tolerance, instead of a warning."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """checkpoint: type of the weights; default: the base's (GGUF: float32). gguf: of the factors."""
    allow_base_mismatch: bool = False
    """Merge adapters that name different base models."""
    allow_other_adapters: bool = False
    """Use a mask that was found for other adapters."""


def _hyperparameters() -> dict[str, dict[str, Hyperparameter]]:
    """Name -> method -> hyperparameter, over all methods."""
    found: dict[str, dict[str, Hyperparameter]] = {}
    for method, factory in merges.ALL.items():
        for name, hyperparameter in hyperparameters(factory).items():
            found.setdefault(name, {})[method] = hyperparameter
    return found


def _option(name: str, of: Mapping[str, Hyperparameter]) -> tuple[str, Any, Any]:
    """A field of ``Args``: which methods take a hyperparameter, what it is and does there."""
    lines = []
    for method, one in of.items():
        default = "" if one.default is None else f"; default {one.default}"
        lines.append(f"{method} ({one.domain()}{default}): {one.help}")
    kinds = functools.reduce(operator.or_, {one.type for one in of.values()})
    option = tyro.conf.arg(help=" ".join(lines), metavar="VALUE", help_behavior_hint="")
    return name, Annotated[kinds | None, option], None


# every hyperparameter of every method is an option
Args = make_dataclass(
    "Args", [_option(*item) for item in _hyperparameters().items()], bases=(Options,), frozen=True
)
Args.__doc__ = Options.__doc__


def run(args: Options) -> None:
    """Merge and write.

    Raises:
        UserError: bad adapters, method, hyperparameters, modules or output directory.
    """
    if args.format in ("checkpoint", "gguf") and args.base_model is None:
        raise UserError(f"--format {args.format} needs --base-model DIR")
    check_unused(args.out)
    sources = adapter_sources(args.adapter)
    if any(map(is_model, sources.values())):
        _merge_models(args, sources)
        return
    if args.mask is None:
        merges.make(**_merge(args, None))  # bad methods and values are found before anything is read
    loaded = load_adapters(sources, allow_base_mismatch=args.allow_base_mismatch, base=args.base_model)
    spec, keep, scale, found_for = _mask(args, loaded)
    chosen = _merge(args, found_for)
    method = merges.make(**chosen)
    if found_for is not None and chosen != _defaults(found_for):
        print(
            f"enmp merge: note: the mask was found for {_in_words(_defaults(found_for))}; "
            f"merging with {_in_words(chosen)}",
            file=sys.stderr,
        )
    recipe = Recipe(
        {"method": chosen["method"], "space": chosen["space"], "scale": scale, **chosen},
        spec.pruned_modules(keep),
        weights=() if keep.dtype == bool else spec.weighted_modules(keep),
    )

    def deltas() -> Deltas:
        return merge_stack(method, loaded.stack, jnp.asarray(keep), scale)

    options = ExportOptions(args.rank, args.tolerance, args.strict, args.dtype, args.base_model)
    written = write(args.out, args.format, Merged(loaded, keep, deltas, recipe), options)
    show(written, args.out, "merge", args.json)


def _merge_models(args: Options, sources: Mapping[str, str]) -> None:
    """Whole fine-tuned models, less their base.

    Raises:
        UserError: some are adapters, or options of adapters.
    """
    if args.format != "checkpoint" or args.base_model is None:
        model = next(source for source in sources.values() if is_model(source))
        raise UserError(
            f"{one_line(model)}: it is a whole model, not a LoRA adapter: whole models are merged into their "
            "base, with --format checkpoint and --base-model DIR"
        )
    if others := [task for task, source in sources.items() if not is_model(source)]:
        raise UserError(f"--adapter: {others[0]} is an adapter and others are whole models: give one kind")
    if args.prune or args.mask:
        raise UserError("--prune and --mask are for adapters: whole models are merged whole")
    scale = 1.0 if args.scale is None else args.scale
    merge = _merge(args, None)
    merges.make(**merge)
    lines = export_task_vectors(args.out, args.base_model, sources, merge, scale, args.dtype)
    show(Written(lines), args.out, "merge", args.json)


def show(written: Written, out: Path, command: str, as_json: bool = False) -> None:
    """Print what was written; warnings on standard error."""
    for warning in written.warnings:
        print(f"enmp {command}: warning: {warning}", file=sys.stderr)
    if as_json:
        print(json.dumps({"out": str(out), "lines": written.lines, "warnings": written.warnings}, indent=1))
        return
    for line in written.lines:
        print(line)
    print(f"wrote {out}")


def _merge(args: Options, found_for: Mapping[str, Any] | None) -> dict[str, Any]:
    """What ``merges.make`` takes: the merge that the mask was found for, changed as the command line says."""
    general = ("method", "space", "seed", "task_weights", "layer_scaling", "statistics")
    names = (*general, *_hyperparameters())
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    given |= {"isotropize": True} if args.isotropize else {}
    if found_for and given.get("method", found_for["method"]).replace("-", "_") == found_for["method"]:
        given = {**found_for, **given}  # those of another method mean nothing
    return _defaults(given)


def _defaults(merge: Mapping[str, Any]) -> dict[str, Any]:
    """The merge with its method and space in any case, and only what is switched on."""
    return {"method": "ties", "space": "full"} | {k: v for k, v in merge.items() if v is not False}


def _in_words(merge: Mapping[str, Any]) -> str:
    others = [key if value is True else f"{key} {value}" for key, value in merge.items()]
    return f"{merge['method']} in {merge['space']} space" + "".join(f", {text}" for text in others[2:])


def adapter_sources(pairs: tuple[str, ...]) -> dict[str, str]:
    """``("cars=DIR", ..)`` as a dict in the same order.

    Raises:
        UserError: not of that form, or a task given twice.
    """
    sources: dict[str, str] = {}
    for pair in pairs:
        task, equals, source = pair.partition("=")
        if not (equals and task and source):
            raise UserError(f"--adapter {pair!r}: expected TASK=DIR, like cars=adapters/cars")
        if task in sources:
            raise UserError(f"--adapter: the task {task!r} is given twice; give each its own name")
        sources[task] = source
    return sources


def parse_prune(text: str) -> Module:
    """A module given on the command line: ``0:dtd``, or ``0:q_proj:dtd`` for one projection.

    In place of the layer's number, the path of a group of modules: ``decoder.block.3:dtd``.

    Raises:
        UserError: not of that form.
    """
    parts = text.split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise UserError(f"--prune {text!r}: expected LAYER:TASK or LAYER:PROJECTION:TASK, like 0:dtd")
    layer = int(parts[0]) if parts[0].isascii() and parts[0].isdecimal() else parts[0]
    return (layer, parts[1]) if len(parts) == 2 else (layer, parts[1], parts[2])


def _mask(
    args: Options, loaded: LoadedAdapters
) -> tuple[masks.MaskSpec, Keep, float, Mapping[str, Any] | None]:
    """Modules, mask or weights, merge coefficient, and the merge that the mask was found for."""
    if args.mask is not None:
        if args.prune:
            raise UserError("give --prune or --mask, not both")
        saved = mask_file.load(args.mask, loaded.stack)
        if not args.allow_other_adapters:
            remedy = "give that adapter, or --allow-other-adapters to prune these all the same"
            saved.refuse_others(args.mask, loaded, remedy)
        scale = args.scale if args.scale is not None else saved.scale
        return saved.spec, saved.keep, 1.0 if scale is None else scale, saved.merge
    modules = [parse_prune(text) for text in args.prune]
    finer = any(len(module) == 3 for module in modules)
    if finer and not all(len(module) == 3 for module in modules):
        raise UserError("--prune: give LAYER:TASK everywhere or LAYER:PROJECTION:TASK everywhere")
    spec = masks.MaskSpec.of(loaded.stack, "projection" if finer else "layer", max_pruned=1.0)
    return spec, spec.keep_from_pruned(modules), 1.0 if args.scale is None else args.scale, None
