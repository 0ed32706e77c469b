"""All LoRA adapters of a merge as one pytree, stacked over layers and tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from enmp_jax.errors import UserError, shown
from enmp_jax.module_paths import Group, Layout, join_layer, lay_out, split_layer

_MOST_PADDED = 2**26


@flax.struct.dataclass
class LoraPair:
    """The adapters of one projection in every layer: ``delta[l, i] = b[l, i] @ a[l, i]``.

    Ranks differ between tasks and modules: rows of ``a`` and columns of ``b`` beyond ``rank[l, i]``
    are zero. ``rank[l, i] == 0`` where task i has no LoRA on this projection of layer l. ``rows`` are the
    layers' rows in a mask, where not all layers have the projection; None: all, in order.
    """

    a: Float[Array, "layer task rank in"]
    b: Float[Array, "layer task out rank"]  # alpha / r (rsLoRA: alpha / sqrt(r)) folded in
    rank: tuple[tuple[int, ...], ...] = flax.struct.field(pytree_node=False)  # [layer][task]
    rows: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)

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
    the projection axis of ``[layer, projection, task]`` masks. ``groups`` are what the rows of a mask stand
    for, where they are not the layers of one stack (see ``module_paths``); None: layers from 0.
    """

    pairs: dict[str, LoraPair]
    tasks: tuple[str, ...] = flax.struct.field(pytree_node=False)
    groups: tuple[Group, ...] | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def n_layers(self) -> int:
        """Number of layers (rows of a mask), those without any adapter included."""
        if self.groups is not None:
            return len(self.groups)
        return next(iter(self.pairs.values())).a.shape[0]

    def rows(self, name: str) -> Sequence[int]:
        """The row in a mask of each layer of a projection."""
        rows = self.pairs[name].rows
        return range(self.n_layers) if rows is None else rows

    def groups_of(self, name: str) -> list[Group]:
        """The group of each layer of a projection."""
        return [row if self.groups is None else self.groups[row] for row in self.rows(name)]

    def paths(self, name: str) -> list[str]:
        """The module path of each layer of a projection."""
        return [join_layer(name, group) for group in self.groups_of(name)]

    @property
    def n_tasks(self) -> int:
        """Number of adapters."""
        return len(self.tasks)

    @property
    def projections(self) -> tuple[str, ...]:
        """Name templates in mask order."""
        return tuple(sorted(self.pairs))

    def places(self) -> dict[str, tuple[int, int]]:
        """Module path -> its row and its projection in a mask."""
        return {
            path: (row, j)
            for j, name in enumerate(self.projections)
            for path, row in zip(self.paths(name), self.rows(name), strict=True)
        }

    def present(self) -> Bool[np.ndarray, "layer projection task"]:
        """Which modules exist: only these can be pruned."""
        found = np.zeros((self.n_layers, len(self.pairs), self.n_tasks), bool)
        for j, name in enumerate(self.projections):
            found[list(self.rows(name)), j] = self.pairs[name].present
        return found

    def astype(self, dtype: jax.typing.DTypeLike) -> LoraStack:
        """The same stack in another floating point type."""
        return jax.tree.map(lambda x: x.astype(dtype), self)

    def select(self, tasks: Sequence[int]) -> LoraStack:
        """The stack of some tasks only, in the given order."""
        index = np.asarray(tasks)
        pairs = {
            name: dataclasses.replace(
                p,
                a=p.a[:, index],
                b=p.b[:, index],
                rank=tuple(tuple(row[i] for i in tasks) for row in p.rank),
            )
            for name, p in self.pairs.items()
        }
        return dataclasses.replace(self, pairs=pairs, tasks=tuple(self.tasks[i] for i in tasks))

    def rename(self, names: Mapping[str, str]) -> LoraStack:
        """The stack under other name templates (the backbone's own)."""
        return dataclasses.replace(self, pairs={names[name]: pair for name, pair in self.pairs.items()})


def stack_adapters(
    adapters: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]],
    n_layers: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> LoraStack:
    """Stack adapters given as ``{task: {module path: (A [r, in], B [out, r])}}``.

    B holds alpha / r already. Modules that some task lacks are filled with rank-0 zeros.

    Args:
        adapters: one entry per task, in merge order.
        n_layers: layers of the base model, where there is a backbone for it: every projection is stacked
            over all of them. None: over those that have it.
        dtype: type of the stacked factors.

    Raises:
        UserError: no modules, a module's shape differs between tasks, or a layer that the base lacks.
    """
    shapes: dict[str, tuple[int, int]] = {}
    owner: dict[str, str] = {}
    for task, adapter in adapters.items():
        if not adapter:
            raise UserError(f"adapter {task!r} has no LoRA modules")
        for path, (a, b) in adapter.items():
            shape = (b.shape[0], a.shape[1])
            known = shapes.setdefault(path, shape)
            if known != shape:
                raise UserError(
                    f"{path} is {shape[0]}x{shape[1]} in adapter {task!r} but {known[0]}x{known[1]} in "
                    f"{owner[path]!r}: the adapters were trained on different bases"
                )
            owner.setdefault(path, task)
    if not shapes:
        raise UserError("no LoRA modules in any adapter")
    layout = lay_out(shapes) if n_layers is None else _fixed(shapes, n_layers)
    modules: dict[str, dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]] = {}
    for i, adapter in enumerate(adapters.values()):
        for path, factors in adapter.items():
            name, row = layout.places[path]
            modules.setdefault(name, {})[row, i] = factors
    every = tuple(range(len(layout.groups)))
    rows = {
        name: every if n_layers is not None else tuple(sorted({row for row, _ in entries}))
        for name, entries in modules.items()
    }
    width = len(adapters)
    _check_padding(modules, {name: len(own) * width for name, own in rows.items()})

    pairs = {}
    for name in sorted(modules):
        entries = modules[name]
        a, b = next(iter(entries.values()))
        place = {row: k for k, row in enumerate(rows[name])}
        rank = max(a.shape[0] for a, _ in entries.values())
        stacked_a = np.zeros((len(place), width, rank, a.shape[1]), np.dtype(dtype))
        stacked_b = np.zeros((len(place), width, b.shape[0], rank), np.dtype(dtype))
        ranks = np.zeros((len(place), width), int)
        for (row, i), (a, b) in entries.items():
            stacked_a[place[row], i, : a.shape[0]] = a
            stacked_b[place[row], i, :, : b.shape[1]] = b
            ranks[place[row], i] = a.shape[0]
        pairs[name] = LoraPair(
            jnp.asarray(stacked_a),
            jnp.asarray(stacked_b),
            tuple(tuple(int(r) for r in row) for row in ranks),
            None if rows[name] == every else rows[name],
        )
    plain = layout.groups == every and any(pair.rows is None for pair in pairs.values())
    return LoraStack(pairs, tuple(adapters), None if plain else layout.groups)


def _fixed(shapes: Mapping[str, tuple[int, int]], n_layers: int) -> Layout:
    """The layout of a backbone with one stack of layers.

    Raises:
        UserError: a module in none of them, or of another shape than in other layers.
    """
    places: dict[str, tuple[str, int]] = {}
    known: dict[str, tuple[int, int]] = {}
    for path, shape in shapes.items():
        template, layer = split_layer(path)
        if layer is None:
            raise UserError(f"module {shown(path, 200)} is in none of the numbered layers of the base model")
        if layer >= n_layers:
            raise UserError(f"an adapter has layer {layer}, but the base model has {n_layers} layers")
        if known.setdefault(template, shape) != shape:
            raise UserError(f"{template} has different shapes in different layers: they cannot be stacked")
        places[path] = template, layer
    return Layout(tuple(range(n_layers)), places)


def _check_padding(
    modules: Mapping[str, Mapping[tuple[int, int], tuple[np.ndarray, np.ndarray]]], places: Mapping[str, int]
) -> None:
    """A small file whose ranks or layers lie far apart would fill the memory with zeros.

    Raises:
        UserError: it would.
    """
    given = padded = 0
    for name, entries in modules.items():
        sizes = [a.size + b.size for a, b in entries.values()]
        given, padded = given + sum(sizes), padded + places[name] * max(sizes)
    if padded > _MOST_PADDED and padded > 100 * given:
        raise UserError(
            f"the adapters hold {given} numbers, which need room for {padded} when stacked: their layers or "
            "ranks lie too far apart"
        )
