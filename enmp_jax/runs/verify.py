"""``enmp verify``: adapters and exports against what they claim, read from the disk as anybody would."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import yaml

from enmp_jax import merges, models
from enmp_jax.adapters import single_file
from enmp_jax.adapters.checkpoint_checks import check_checkpoint, types
from enmp_jax.adapters.checks import (
    Check,
    Parts,
    check_added_lora,
    check_deltas,
    check_names,
    check_not_zero,
    check_vllm,
    parts_of,
)
from enmp_jax.adapters.gguf_export import FILE, read_gguf
from enmp_jax.adapters.lora_factors import delta_parts
from enmp_jax.adapters.peft_export import export_peft, kept_modules
from enmp_jax.adapters.peft_files import CONFIG, WEIGHTS
from enmp_jax.adapters.peft_import import Adapter, LoadedAdapters, load_adapters, read_adapter
from enmp_jax.adapters.peft_reload import check_peft, check_transformers
from enmp_jax.adapters.recipe import RECIPE, Recipe, mask_of, sha256
from enmp_jax.adapters.stored import Storage, tensors
from enmp_jax.adapters.task_vector_export import check_task_vectors
from enmp_jax.deltas import Deltas
from enmp_jax.errors import UserError, one_line, reason
from enmp_jax.io.hub import hub_id, locate
from enmp_jax.io.reading import open_tensors
from enmp_jax.merges.base import merge_stack
from enmp_jax.models import checkpoint
from enmp_jax.module_paths import join_layer, split_layer
from enmp_jax.runs.directory import finished
from enmp_jax.runs.verify_outputs import check_outputs

_STEPS = {"F64": 2e-4, "F32": 2e-4, "F16": 0.05, "BF16": 0.3}
"""How far rounding weights to a type may move outputs, as a share of what the merge changes in them."""


class Report(NamedTuple):
    """The checks of one directory, and what it was taken for."""

    source: str
    what: str
    checks: list[Check]


class _Sources(NamedTuple):
    """Where the adapters and the base of an export are."""

    adapters: Mapping[str, str]
    base: str | None


def verify(source: str, adapters: Mapping[str, str], base: str | None = None) -> list[Report]:
    """Check an adapter, an export, or everything that a run directory holds.

    Args:
        source: directory, or the hub id of an adapter.
        adapters: task -> where an export's adapters are, where they are not found by themselves.
        base: base model of an export, likewise.

    Raises:
        UserError: nothing to verify there, or adapters or a base that cannot be found or are others.
    """
    if single_file.is_one(source):
        return [_adapter(source, base)]
    path = locate(source, [CONFIG, WEIGHTS, *single_file.NAMES]).directory
    if (path / CONFIG).exists() and not (path / RECIPE).exists():
        return [_adapter(source, base)]
    if (path / RECIPE).exists():
        return [_export(path, _Sources(adapters, base))]
    if (path / "mask.json").exists() and (path / "config.yaml").exists():
        found = sorted(child for child in path.iterdir() if (child / RECIPE).exists())
        if found:
            return [_export(child, _Sources(adapters, base)) for child in found]
    if (path / WEIGHTS).exists() or single_file.find(path) is not None:
        return [_adapter(source, base)]
    raise UserError(
        f"{one_line(source)} is no adapter, no export ({RECIPE} is missing) and no run directory with exports"
    )


def _adapter(source: str, base: str | None) -> Report:
    """(a) An adapter alone, through the whole import and export, comes back with its own weights."""
    adapter, reads = _read(source, base)
    if adapter is None:
        return Report(source, "adapter", [reads])
    own = parts_of(adapter.modules)
    checks = [reads, check_not_zero(own), *check_peft(adapter, own, 0.0)]
    loaded = load_adapters({"adapter": source}, base=base)
    merge = merges.make("sum")
    deltas = merge_stack(merge, loaded.stack, jnp.ones((loaded.stack.n_layers, 1), bool), 1.0)
    with tempfile.TemporaryDirectory(prefix="enmp-") as temporary:
        try:
            export_peft(Path(temporary) / "out", loaded, deltas, Recipe())
            back = read_adapter(Path(temporary) / "out")
        except UserError as error:
            back, why = None, str(error)
            checks.append(Check("import and export", False, why))
    if back is not None:
        checks += check_deltas(parts_of(back.modules), own, 0.0, "import and export")
    return Report(source, "adapter", [*checks, *check_vllm(adapter)])


def _export(directory: Path, sources: _Sources) -> Report:
    """(b) An export against the merge that its recipe claims."""
    data = _recipe(directory)
    kind = data["format"]
    if "task_vectors" in data:
        return _task_vectors(directory, data, sources)
    try:
        run = finished(directory.parent)[0]
        at_home = {task.name: run.path(task.adapter) for task in run.tasks}
        home = run.path(run.base.model)
    except UserError:
        at_home, home = {}, None
    base = sources.base or home
    found = _find_adapters(directory, data["tasks"], sources.adapters, at_home)
    backbone = None
    if home is not None:
        backbone = models.build(checkpoint.read_config(checkpoint.find(home)))
    loaded = load_adapters(
        found,
        backbone and backbone.canonical,
        n_layers=backbone and backbone.n_layers,
        modules=backbone and backbone.modules,
        allow_base_mismatch=True,
        base=base,
    )
    _same_adapters(loaded, data["tasks"])
    recipe = Recipe(data["merge"], data["pruned"], weights=data.get("weights") or ())
    _, keep = mask_of(loaded, recipe)
    what = f"{kind} export"
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in recipe.merge.items()}
    scale = given.pop("scale", None)
    method = merges.make(**given)

    def deltas() -> Deltas:
        return merge_stack(method, loaded.stack, jnp.asarray(keep), 1.0 if scale is None else scale)

    if kind == "adapters":
        return Report(str(directory), what, _pruned(directory, loaded, keep))
    if kind == "checkpoint":
        base = base or (loaded.base_model if hub_id(loaded.base_model) else None)
        if base is None:
            raise UserError(f"{directory} is verified against its base model: give --base-model DIR")
        merged = deltas()
        try:
            checks = check_checkpoint(directory, loaded, merged, base)
        except UserError as error:
            hint = "" if sources.base else "; if the base is another one, give --base-model DIR"
            raise UserError(f"{error}{hint}") from None
        rounding = max(_STEPS[name] for name in types(directory))
        checks += check_outputs(base, delta_parts(merged, loaded.names), directory, rounding)
        return Report(str(directory), what, [*checks, *check_transformers(directory)])
    wanted = delta_parts(deltas(), loaded.names)
    if data.get("refined"):
        return Report(str(directory), what, _refined(directory, data, wanted))
    if kind == "gguf":
        return Report(str(directory), what, _gguf(directory, data, wanted, base))
    if kind == "delta":
        return Report(str(directory), what, _delta(directory, wanted, loaded.stored))
    return Report(str(directory), what, _merged(directory, wanted, data.get("error") or 0.0, sources.base))


def _task_vectors(directory: Path, data: Mapping[str, Any], sources: _Sources) -> Report:
    missing = [str(e["name"]) for e in data["task_vectors"] if str(e["name"]) not in sources.adapters]
    if missing or sources.base is None:
        wanted = "--base-model DIR" if sources.base is None else f"--adapter {missing[0]}=DIR"
        raise UserError(f"{directory} is verified against the models that were merged: give {wanted}")
    models = {str(e["name"]): sources.adapters[str(e["name"])] for e in data["task_vectors"]}
    checks = check_task_vectors(directory, data, sources.base, models)
    return Report(str(directory), "checkpoint of whole models", [*checks, *check_transformers(directory)])


def _merged(directory: Path, wanted: dict[str, Parts], error: float, base: str | None) -> list[Check]:
    adapter, reads = _read(directory)
    if adapter is None:
        return [reads]
    modules, tolerance = parts_of(adapter.modules), error * 1.001
    # a relative error of the weights may weigh more in the outputs
    outputs = check_outputs(base, wanted, modules, 1e-4 + 10 * error) if base else []
    return [
        reads,
        *check_deltas(modules, wanted, tolerance),
        check_not_zero(modules),
        *outputs,
        *check_peft(adapter, modules, 0.0),
        *check_vllm(adapter),
    ]


def _gguf(
    directory: Path, data: Mapping[str, Any], wanted: Mapping[str, Parts], base: str | None
) -> list[Check]:
    """llama.cpp's names and order of rows are those of the base model: nothing is compared without it."""
    if base is None:
        return [Check("gguf", True, "not compared without the base model (--base-model DIR)", counts=False)]
    config = checkpoint.read_config(checkpoint.find(base))
    canonical = models.build(config).canonical
    found = parts_of(read_gguf(directory / FILE, config))
    meant = {}
    for path, parts in wanted.items():
        template, layer = split_layer(path)
        name = canonical(template)
        meant[path if name is None or layer is None else join_layer(name, layer)] = parts
    rounding = {"float16": 1e-3, "bfloat16": 1e-2}.get(str((data.get("options") or {}).get("dtype")), 0.0)
    error = (data.get("error") or 0.0) * 1.001
    return [*check_deltas(found, meant, error + rounding), check_not_zero(found)]


def _refined(directory: Path, data: Mapping[str, Any], merged: Mapping[str, Parts]) -> list[Check]:
    """A merge and a LoRA trained from it, whose weights no recipe makes again: its rank is known."""
    adapter, reads = _read(directory)
    if adapter is None:
        return [reads]
    modules, rank = parts_of(adapter.modules), data["refined"].get("rank")
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"{directory / RECIPE} is damaged: refined has no rank")
    if data["refined"].get("cross_fit") is True:
        rank *= 2  # half of each of two LoRAs
    return [
        reads,
        *check_added_lora(modules, merged, rank, (data.get("error") or 0.0) * 1.001),
        check_not_zero(modules),
        *check_peft(adapter, modules, 0.0),
        *check_vllm(adapter),
    ]


def _pruned(directory: Path, loaded: LoadedAdapters, keep: np.ndarray) -> list[Check]:
    checks = []
    for i, (task, original) in enumerate(loaded.adapters.items()):
        adapter, reads = _read(directory / task)
        checks.append(reads._replace(name=f"{task}: reads"))
        if adapter is not None:
            wanted = parts_of(kept_modules(original, loaded, task, keep[..., i]))
            found = parts_of(adapter.modules)
            own = [*check_deltas(found, wanted, 0.0), *check_peft(adapter, found, 0.0)]
            checks += [check._replace(name=f"{task}: {check.name}") for check in own]
    return checks


def _delta(directory: Path, wanted: Mapping[str, Parts], stored: Storage) -> list[Check]:
    def matrix(tensor: np.ndarray) -> Parts:
        return (tensor.astype(np.float32).reshape(len(tensor), -1),)

    with open_tensors(directory / "delta.safetensors") as handle:
        names = list(handle.keys())
        found = {key: matrix(handle.get_tensor(key)) for key in names}
    whole = ((path, parts[0] if len(parts) == 1 else parts[0] @ parts[1]) for path, parts in wanted.items())
    meant = {single_file.flat(name): matrix(tensor) for name, tensor in tensors(whole, stored).items()}
    checks = [check_names("tensors", found, meant), *check_deltas(found, meant, 0.0)]
    return [*checks, check_not_zero(found)]


def _read(source: str | Path, base: str | None = None) -> tuple[Adapter | None, Check]:
    try:
        adapter = read_adapter(source, base)
    except UserError as error:
        return None, Check("reads", False, str(error))
    return adapter, Check("reads", True, f"{len(adapter.modules)} modules")


def _recipe(directory: Path) -> dict[str, Any]:
    path = directory / RECIPE
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    kinds = ("adapters", "peft", "checkpoint", "delta", "gguf")
    if not isinstance(data, dict) or data.get("format") not in kinds:
        raise UserError(f"{path} is no recipe that can be verified: format must be one of {', '.join(kinds)}")
    needed = {
        "merge": dict,
        **({"task_vectors": list} if "task_vectors" in data else {"tasks": list, "pruned": list}),
    }
    for key, kind in needed.items():
        if not isinstance(data.get(key), kind):
            raise UserError(f"{path} is damaged: {key} is missing")
    return data


def _find_adapters(
    directory: Path, tasks: list[Any], given: Mapping[str, str], at_home: Mapping[str, str]
) -> dict[str, str]:
    """Task -> directory or hub id: as given, as the run has it, by its name here, or from the hub."""
    found: dict[str, str] = {}
    for entry in tasks:
        task, name = str(entry["name"]), str(entry["adapter"])
        places = [Path(name), directory.parent / name]
        local = next((str(place) for place in places if _is_adapter(place)), None)
        source = given.get(task) or at_home.get(task) or local or (name if hub_id(name) else None)
        if source is None:
            raise UserError(f"where is the adapter {one_line(name)} of task {task!r}? --adapter {task}=DIR")
        found[task] = source
    return found


def _is_adapter(place: Path) -> bool:
    return single_file.is_one(place) or (place / CONFIG).exists() or single_file.find(place) is not None


def _same_adapters(loaded: LoadedAdapters, tasks: list[Any]) -> None:
    for entry in tasks:
        task = str(entry["name"])
        if sha256(loaded.adapters[task]) != entry.get("sha256"):
            raise UserError(
                f"{one_line(loaded.adapters[task].source)} is not the adapter of task {task!r} that was "
                f"merged (its hash differs): --adapter {task}=DIR"
            )
