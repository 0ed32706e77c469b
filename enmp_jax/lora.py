"""All LoRA adapters of a merge as one pytree, stacked over layers and tasks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from enmp_jax.errors import UserError, shown

_MAX_LAYERS = 4096
_MOST_PADDED = 2**26
_LAYER_INDEX = re.compile(r"(?<=\.)(?<!\.experts\.)(\d+)(?=\.|$)")


@flax.struct.dataclass
class LoraPair:
    """The adapters of one projection in every layer: ``delta[l, i] = b[l, i] @ a[l, i]``.

    Ranks differ between tasks and modules: rows of ``a`` and columns of ``b`` beyond ``rank[l, i]``
    are zero. ``rank[l, i] == 0`` where task i has no LoRA on this projection of layer l.
    """

    a: Float[Array, "layer task rank in"]
    b: Float[Array, "layer task out rank"]  # alpha / r (rsLoRA: alpha / sqrt(r)) folded in
    rank: tuple[tuple[int, ...], ...] = flax.struct.field(pytree_node=False)  # [layer][task]

    @property
    def present(self) -> Bool[np.ndarray, "layer task"]:
        """Where a task really has a LoRA."""
        return np.asarray(self.rank) > 0

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the adapted weight."""
        return self.b.shape[-2], self.a.shape[-1]


@flax.struct.dataclass
class LoraStack:
    """Every adapter of a merge. ``pairs`` maps a name template to its stacked factors.

    A template is a module path with ``{}`` for the layer index, e.g.
    ``vision_model.encoder.layers.{}.self_attn.q_proj``; templates are sorted, and that order is
    the projection axis of ``[layer, projection, task]`` masks.
    """

    pairs: dict[str, LoraPair]
    tasks: tuple[str, ...] = flax.struct.field(pytree_node=False)

    @property
    def n_layers(self) -> int:
        """Number of layers, those without any adapter included."""
        return next(iter(self.pairs.values())).a.shape[0]

    @property
    def n_tasks(self) -> int:
        """Number of adapters."""
        return len(self.tasks)

    @property
    def projections(self) -> tuple[str, ...]:
        """Name templates in mask order."""
        return tuple(sorted(self.pairs))

    def present(self) -> Bool[np.ndarray, "layer projection task"]:
        """Which modules exist: only these can be pruned."""
        return np.stack([self.pairs[name].present for name in self.projections], axis=1)

    def astype(self, dtype: jax.typing.DTypeLike) -> LoraStack:
        """The same stack in another floating point type."""
        return jax.tree.map(lambda x: x.astype(dtype), self)

    def select(self, tasks: Sequence[int]) -> LoraStack:
        """The stack of some tasks only, in the given order."""
        index = np.asarray(tasks)
        pairs = {
            name: LoraPair(
                p.a[:, index], p.b[:, index], tuple(tuple(row[i] for i in tasks) for row in p.rank)
            )
            for name, p in self.pairs.items()
        }
        return LoraStack(pairs, tuple(self.tasks[i] for i in tasks))

    def rename(self, names: Mapping[str, str]) -> LoraStack:
        """The stack under other name templates (the backbone's own)."""
        return LoraStack({names[name]: pair for name, pair in self.pairs.items()}, self.tasks)


def split_layer(path: str) -> tuple[str, int]:
    """Split a module path into its template and layer index.

    ``encoder.layers.3.self_attn.q_proj`` -> (``encoder.layers.{}.self_attn.q_proj``, 3). The number of an
    expert stays: each expert of a mixture is a projection of its layer.

    Raises:
        UserError: the path has no layer index, or several.
    """
    found = _LAYER_INDEX.findall(path)
    if len(found) != 1:
        count = "no layer index" if not found else f"{len(found)} indices"
        raise UserError(f"module {shown(path, 200)} has {count}: only LoRA on numbered layers can be merged")
    if len(found[0]) > 10:
        raise UserError(f"module {shown(path, 200)} has a layer index that is none")
    return _LAYER_INDEX.sub("{}", path, count=1), int(found[0])


def stack_adapters(
    adapters: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]],
    n_layers: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> LoraStack:
    """Stack adapters given as ``{task: {module path: (A [r, in], B [out, r])}}``.

    B holds alpha / r already. Modules that some task lacks are filled with rank-0 zeros.

    Args:
        adapters: one entry per task, in merge order.
        n_layers: layers of the base model, when known; else one more than the largest index.
        dtype: type of the stacked factors.

    Raises:
        UserError: no modules, or a module's shape differs between tasks.
    """
    modules: dict[str, dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]] = {}
    shapes: dict[str, tuple[tuple[int, int], str]] = {}
    for i, (task, adapter) in enumerate(adapters.items()):
        if not adapter:
            raise UserError(f"adapter {task!r} has no LoRA modules")
        for path, (a, b) in adapter.items():
            template, layer = split_layer(path)
            shape = (b.shape[0], a.shape[1])
            known, owner = shapes.setdefault(template, (shape, task))
            if known != shape:
                raise UserError(
                    f"{path} is {shape[0]}x{shape[1]} in adapter {task!r} but {known[0]}x{known[1]} in "
                    f"{owner!r}: the adapters were trained on different bases"
                )
            modules.setdefault(template, {})[layer, i] = (a, b)
    if not modules:
        raise UserError("no LoRA modules in any adapter")
    largest = max(layer for entries in modules.values() for layer, _ in entries)
    if n_layers is not None and largest >= n_layers:
        raise UserError(f"an adapter has layer {largest}, but the base model has {n_layers} layers")
    if n_layers is None and largest >= _MAX_LAYERS:
        raise UserError(f"an adapter has layer {largest}: more than {_MAX_LAYERS} layers are not stacked")
    depth, width = n_layers or largest + 1, len(adapters)
    _check_padding(modules, depth * width)

    pairs = {}
    for template in sorted(modules):
        entries = modules[template]
        (out, inner), _ = shapes[template]
        rank = max(a.shape[0] for a, _ in entries.values())
        stacked_a = np.zeros((depth, width, rank, inner), np.dtype(dtype))
        stacked_b = np.zeros((depth, width, out, rank), np.dtype(dtype))
        ranks = np.zeros((depth, width), int)
        for (layer, i), (a, b) in entries.items():
            stacked_a[layer, i, : a.shape[0]] = a
            stacked_b[layer, i, :, : b.shape[1]] = b
            ranks[layer, i] = a.shape[0]
        pairs[template] = LoraPair(
            jnp.asarray(stacked_a), jnp.asarray(stacked_b), tuple(tuple(int(r) for r in row) for row in ranks)
        )
    return LoraStack(pairs, tuple(adapters))


def _check_padding(
    modules: Mapping[str, Mapping[tuple[int, int], tuple[np.ndarray, np.ndarray]]], places: int
) -> None:
    """A small file whose ranks or layers lie far apart would fill the memory with zeros.

    Raises:
        UserError: it would.
    """
    given = padded = 0
    for entries in modules.values():
        sizes = [a.size + b.size for a, b in entries.values()]
        given, padded = given + sum(sizes), padded + places * max(sizes)
    if padded > _MOST_PADDED and padded > 100 * given:
        raise UserError(
            f"the adapters hold {given} numbers, which need room for {padded} when stacked: their layers or "
            "ranks lie too far apart"
        )
