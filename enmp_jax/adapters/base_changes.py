"""What a merge adds to which tensor of a base model, in the way that the base keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from enmp_jax.adapters.base_names import backbone_of, match
from enmp_jax.adapters.checks import Parts
from enmp_jax.adapters.lora_factors import one_layer
from enmp_jax.adapters.peft_import import LoadedAdapters
from enmp_jax.adapters.stored import Storage, Stored, is_expert, tensor_name
from enmp_jax.deltas import Deltas
from enmp_jax.errors import UserError
from enmp_jax.io.reading import FLOATS
from enmp_jax.io.shards import Change, Entry, FullUpdate, LowRankUpdate, StackedUpdate

Update = LowRankUpdate | FullUpdate
_TRANSPOSED_EXPERTS = ("gpt_oss", "llama4", "llama4_text")  # [expert, in, out]
_FUSED = (".experts.gate_up_proj", ".experts.down_proj")


def planned_changes(
    config: Mapping[str, Any], entries: Mapping[str, Entry], loaded: LoadedAdapters, deltas: Deltas
) -> dict[str, Change]:
    """Name of the base's tensor -> what a merge adds to it.

    Args:
        config: ``config.json`` of the base.
        entries: its tensors.
        loaded: the adapters.
        deltas: of the merge.

    Raises:
        UserError: the base does not have the adapted modules, or in other shapes.
    """
    backbone = backbone_of(config)
    adapted = [
        path
        for name, paths in loaded.names.items()
        for path, ranks in zip(paths, loaded.stack.pairs[name].rank, strict=True)
        if any(ranks)
    ]
    stored = loaded.stored
    _refuse_tied(config, entries, adapted, stored)
    fused = any(name.endswith(_FUSED) for name in entries)
    names = {
        key: name
        for path in adapted
        for key, name in (
            [(path, tensor_name(path, stored))]
            if fused or not is_expert(path, stored)
            else [(f"{path}/{name}", name) for name in _divided(path)]
        )
    }
    where = match(entries, names, backbone and backbone.canonical)
    transposed = _transposed(loaded) if backbone is None else backbone.config.block.transposed
    return _changes(jax.device_get(deltas), loaded, where, entries, _Layout(config, transposed))


class _Layout(NamedTuple):
    """What a base's configuration says of how it keeps its weights."""

    config: Mapping[str, Any]
    transposed: bool

    def oriented(self, change: Update, shape: tuple[int, ...], kind: str) -> Update:
        """A change of the base's tensor, of one that is for its matrix [out, in]."""
        if kind == "embedding":
            return change.T
        if kind == "experts":
            flipped = self.config.get("model_type") in _TRANSPOSED_EXPERTS
        else:
            flipped = self.transposed and kind in ("linear", "transposed")
        if len(shape) == 2 and shape in (change.shape, change.T.shape) and shape[0] != shape[1]:
            flipped = shape != change.shape  # the shape decides, where it can
        return change.T if flipped else change


def _refuse_tied(
    config: Mapping[str, Any], entries: Mapping[str, Entry], adapted: Sequence[str], stored: Storage
) -> None:
    """Refuse to change a weight that embeddings and output share: the adapters change one of them.

    Raises:
        UserError: they do.
    """
    has_output = any(name.endswith("lm_head.weight") for name in entries)
    tied = config.get("tie_word_embeddings")
    architectures = config.get("architectures") or ()
    generates = any("LM" in str(name) or "Generation" in str(name) for name in architectures)
    if tied is False or not (generates if architectures else tied) or (has_output and tied is None):
        return
    for path in adapted:
        embedding = path in stored and stored[path].kind == "embedding"
        if embedding or path.rpartition(".")[2] == "lm_head":
            raise UserError(
                "the base model shares one weight between its embeddings and lm_head, and the adapters "
                f"change {path} alone: use --format peft or adapters, or a base that does not tie them"
            )


def _transposed(loaded: LoadedAdapters) -> bool:
    """Whether the base keeps its weights as [in, out], as the adapters say.

    Raises:
        UserError: they do not agree.
    """
    said = {adapter.settings.fan_in_fan_out for adapter in loaded.adapters.values()}
    if len(said) > 1:
        raise UserError("some adapters have fan_in_fan_out and some have not: their bases differ")
    return said.pop()


def _changes(
    deltas: Deltas,
    loaded: LoadedAdapters,
    where: Mapping[str, str],
    entries: Mapping[str, Entry],
    layout: _Layout,
) -> dict[str, Change]:
    """Tensor name -> what is added to it; zero deltas are left out."""
    changes: dict[str, Change] = {}
    experts: dict[str, dict[int, Update]] = {}
    for template, delta in deltas.items():
        present = loaded.stack.pairs[template].present.any(axis=1)
        for layer in np.flatnonzero(present).tolist():
            path, whole = loaded.names[template][layer], one_layer(delta, layer)
            for key, parts in _pieces(path, whole, where).items():
                name = where[key]
                kept = loaded.stored.get(path) if key == path else None
                change = _change(name, entries[name], parts, kept, layout)
                if change is None:
                    continue
                if kept is not None and kept.kind == "experts" and len(entries[name].shape) == 3:
                    experts.setdefault(name, {})[int(path.rpartition(".")[2])] = change
                else:
                    changes[name] = change
    return changes | {name: StackedUpdate(found, entries[name].shape) for name, found in experts.items()}


def _change(name: str, entry: Entry, parts: Parts, kept: Stored | None, layout: _Layout) -> Update | None:
    """What is added to one tensor, or one expert's part of it; None: nothing."""
    if entry.dtype not in FLOATS:
        raise UserError(f"{name} of the base model has type {entry.dtype}: quantised weights cannot change")
    shape = entry.shape
    if kept is not None and kept.kind == "experts" and len(shape) == 3 and shape[0] == kept.shape[0]:
        shape = shape[1:]
    elif kept is not None and kept.kind == "convolution" and shape == kept.shape:
        shape = kept.matrix
    change = FullUpdate(*parts) if len(parts) == 1 else LowRankUpdate(*parts)
    change = layout.oriented(change, shape, "linear" if kept is None else kept.kind)
    if shape != change.shape:
        raise UserError(
            f"{name} is {'x'.join(map(str, entry.shape))} in the base model, but the adapters were "
            f"trained on {'x'.join(map(str, change.shape))}: it is another base"
        )
    if not all(np.isfinite(part).all() for part in parts):
        raise UserError(f"the merged delta of {name} has NaN or Inf in it")
    return change if all(part.any() for part in parts) else None


def _divided(path: str) -> list[str]:
    """The tensors of an expert, of which transformers makes a part of one parameter when it loads them."""
    module, parameter, expert = path.rsplit(".", 2)
    names = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else (parameter,)
    return [f"{module}.{expert}.{name}.weight" for name in names]


def _pieces(path: str, whole: Parts, where: Mapping[str, str]) -> dict[str, Parts]:
    """A module's delta by the keys of its tensors in ``where``, rows divided evenly."""
    if path in where:
        return {path: whole}
    names = _divided(path)
    blocks = np.array_split(whole[0], len(names))
    return {f"{path}/{name}": (block, *whole[1:]) for name, block in zip(names, blocks, strict=True)}
