"""Keep masks: which modules are merged, and with what weight. Genomes to masks, masks to names and back.

A module is (layer, task), all projections of one task in one layer as in the paper, or, with
granularity ``projection``, (layer, projection, task). ``keep`` is True where a module is merged; of floats,
it is the weight that multiplies the module: 1 merged as it is, 0 pruned.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from enmp_jax.errors import UserError, suggestion
from enmp_jax.lora import LoraStack
from enmp_jax.module_paths import Group

Granularity = Literal["layer", "projection"]
Module = tuple[Group, str] | tuple[Group, str, str]  # (layer, task) or (layer, projection, task)
Keep = Bool[np.ndarray, "*module"] | Float[np.ndarray, "*module"]

MAX_SCALE = 3.0
"""Largest merge coefficient that a scale gene can express."""
MAX_WEIGHT = 100.0
"""Weights above it are taken for mistakes."""


@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """What a genome means: one gene per existing module, then one for the scale if it is searched.

    Hashable and without arrays, so that its methods are jitted once.

    Attributes:
        n_layers: layers of the base model.
        projections: name templates in mask order (see ``LoraStack``).
        tasks: task names in mask order.
        slots: flat indices (row-major in ``shape``) of the modules that exist, one gene each.
        granularity: the unit of pruning.
        max_pruned: largest share of the existing modules that may be pruned, 0..1.
        threshold: genes strictly above it may be pruned.
        search_scale: whether the last gene is the merge coefficient.
        groups: what the rows of a mask stand for, where they are not layers from 0 (see ``LoraStack``).

    Examples:
        >>> from importlib.resources import files
        >>> import enmp_jax as enmp
        >>> demo = files("enmp_jax") / "suites/demo/adapters"
        >>> loaded = enmp.load_adapters({"digit": demo / "digit", "even": demo / "even"})
        >>> spec = enmp.MaskSpec.of(loaded.stack)
        >>> keep = spec.keep_from_pruned([(0, "even"), (5, "digit")])
        >>> keep.shape, spec.pruned_modules(keep)
        ((6, 2), [(0, 'even'), (5, 'digit')])
    """

    n_layers: int
    projections: tuple[str, ...]
    tasks: tuple[str, ...]
    slots: tuple[int, ...]
    granularity: Granularity = "layer"
    max_pruned: float = 0.2
    threshold: float = 0.0
    search_scale: bool = False
    groups: tuple[Group, ...] = ()

    @classmethod
    def of(
        cls,
        stack: LoraStack,
        granularity: Granularity = "layer",
        max_pruned: float = 0.2,
        threshold: float = 0.0,
        search_scale: bool = False,
    ) -> MaskSpec:
        """The spec of a stack's modules.

        Raises:
            UserError: ``max_pruned`` outside 0..1.
        """
        if not 0 <= max_pruned <= 1:
            raise UserError(f"max_pruned is {max_pruned}: it must lie in 0..1")
        present = stack.present()
        if granularity == "layer":
            present = present.any(axis=1)
        slots = tuple(int(i) for i in np.flatnonzero(present))
        return cls(
            stack.n_layers, stack.projections, stack.tasks, slots,
            granularity, max_pruned, threshold, search_scale,
            _named_groups(stack),
        )  # fmt: skip

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a keep mask: (layer, task) or (layer, projection, task)."""
        if self.granularity == "layer":
            return self.n_layers, len(self.tasks)
        return self.n_layers, len(self.projections), len(self.tasks)

    @property
    def n_modules(self) -> int:
        """Number of modules that exist."""
        return len(self.slots)

    @property
    def genome_size(self) -> int:
        """Number of genes."""
        return self.n_modules + self.search_scale

    @property
    def max_count(self) -> int:
        """Most modules that a mask may prune (truncated, as the reference does)."""
        return int(self.max_pruned * self.n_modules)

    def present(self) -> Bool[np.ndarray, "*module"]:
        """Which modules exist, in ``shape``."""
        flat = np.zeros(math.prod(self.shape), bool)
        flat[list(self.slots)] = True
        return flat.reshape(self.shape)

    def all_kept(self) -> Bool[np.ndarray, "*module"]:
        """The mask of the plain merge."""
        return np.ones(self.shape, bool)

    def decode(self, genome: Float[Array, " gene"]) -> Bool[Array, "*module"]:
        """The keep mask of a genome (paper, section 4.2): of the ``max_count`` largest genes, those
        strictly above ``threshold`` are pruned. Equal genes: the earlier module first.

        Modules that do not exist have no gene and stay True. One genome; vmap for a population.
        """
        keep = jnp.ones(math.prod(self.shape), bool)
        if self.max_count:
            values, order = jax.lax.top_k(genome[: self.n_modules], self.max_count)
            keep = keep.at[jnp.asarray(self.slots)[order]].set(~(values > self.threshold))
        return keep.reshape(self.shape)

    def decode_scale(self, genome: Float[Array, " gene"], fixed: float | Array) -> Float[Array, ""]:
        """The merge coefficient of a genome: its last gene decoded, or ``fixed`` if it is not searched."""
        return decode_scale(genome[-1]) if self.search_scale else jnp.asarray(fixed, genome.dtype)

    def start(self, x0: float, scale: float = 1.0) -> Float[np.ndarray, " gene"]:
        """The genome that a search starts from: ``x0`` per module and, if searched, ``scale``'s gene."""
        genome = np.full(self.genome_size, x0, np.float32)
        if self.search_scale:
            genome[-1] = encode_scale(scale)
        return genome

    def encode(self, keep: Bool[np.ndarray, "*module"]) -> Float[np.ndarray, " module"]:
        """Genes that decode to ``keep`` (as long as it prunes at most ``max_count`` modules)."""
        pruned = ~np.asarray(keep).reshape(-1)[list(self.slots)]
        return np.where(pruned, self.threshold + 1.0, self.threshold - 1.0).astype(np.float32)

    def n_pruned(self, keep: Keep) -> int:
        """Number of existing modules that a mask prunes."""
        return int(np.sum(~np.asarray(keep, bool) & self.present()))

    def pruned_modules(self, keep: Keep) -> list[Module]:
        """The pruned modules by name, in mask order: (layer, task) or (layer, projection, task)."""
        return [self._name(index) for index in _where(~np.asarray(keep, bool) & self.present())]

    def weighted_modules(self, keep: Float[np.ndarray, "*module"]) -> list[tuple[Any, ...]]:
        """The modules whose weight is not 1, pruned ones among them: (..., weight), in mask order."""
        weights = np.asarray(keep, np.float32)
        # by way of the shortest text that names the same float32: 0.3, not 0.30000001192092896
        return [
            (*self._name(index), float(str(weights[index])))
            for index in _where((weights != 1) & self.present())
        ]

    def named(self, values: Float[np.ndarray, "*module"]) -> list[list[Any]]:
        """A value for every existing module by name: [*module, value], None for NaN; in mask order."""
        return [
            [*self._name(index), None if np.isnan(values[index]) else float(f"{values[index]:.6g}")]
            for index in _where(self.present())
        ]

    def keep_from_pruned(self, pruned: Iterable[Sequence[Any]]) -> Bool[np.ndarray, "*module"]:
        """The mask that prunes the named modules; inverse of ``pruned_modules``.

        A projection may be given by the end of its name (``q_proj``) where that is unique.

        Raises:
            UserError: unknown task or projection, layer out of range, module that does not exist or is
                given twice.
        """
        keep = self.all_kept()
        for _, index in self._indices(pruned, "pruned"):
            keep[index] = False
        return keep

    def keep_from_weights(
        self, weights: Iterable[Sequence[Any]], pruned: Iterable[Sequence[Any]] = ()
    ) -> Float[np.ndarray, "*module"]:
        """The weights that ``weighted_modules`` lists, 1 elsewhere; ``pruned`` modules have weight 0.

        Raises:
            UserError: what ``keep_from_pruned`` says, a weight that is no number in 0..``MAX_WEIGHT``, or
                one that is not 0 for a pruned module.
        """
        entries = [tuple(entry) for entry in weights]
        left_out = ~self.keep_from_pruned(pruned)
        keep = np.where(left_out, 0, 1).astype(np.float32)
        found = self._indices([entry[:-1] for entry in entries], "weighted")
        for (module, index), (*_, weight) in zip(found, entries, strict=True):
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise UserError(f"{_show(module)}: the weight must be a number, not {weight!r}")
            if not 0 <= weight <= MAX_WEIGHT:
                raise UserError(f"{_show(module)}: the weight is {weight}: it must lie in 0..{MAX_WEIGHT:g}")
            if weight and left_out[index]:
                raise UserError(f"{_show(module)} is pruned and has the weight {weight}: take one out")
            keep[index] = weight
        return keep

    def _name(self, index: tuple[int, ...]) -> Module:
        task = self.tasks[index[-1]]
        group = self.groups[index[0]] if self.groups else index[0]
        return (group, task) if len(index) == 2 else (group, self.projections[index[1]], task)

    def _indices(
        self, modules: Iterable[Sequence[Any]], what: str
    ) -> list[tuple[Sequence[Any], tuple[int, ...]]]:
        """Each module with its place in a mask."""
        present, found = self.present(), {}
        for module in modules:
            index = self._index(module)
            if not present[index]:
                raise UserError(f"{_show(module)} cannot be {what}: that adapter has no LoRA there")
            if index in found:
                raise UserError(f"{_show(module)} is {what} twice")
            found[index] = module
        return [(module, index) for index, module in found.items()]

    def _index(self, module: Sequence[Any]) -> tuple[int, ...]:
        words = ["layer", "projection", "task"] if self.granularity == "projection" else ["layer", "task"]
        if isinstance(module, str) or len(module) != len(words):
            raise UserError(f"{module!r} does not name a module: give {', '.join(words)}")
        layer, *middle, task = module
        index = [self._row(module, layer)]
        for name in middle:
            found = [j for j, p in enumerate(self.projections) if _is_named(p, name)]
            if len(found) > 1 and self.groups:  # a name may be there in several shapes: those of this group
                here = self.present()[index[0]].any(axis=-1)
                found = [j for j in found if here[j]]
            if len(found) != 1:
                fitting = [self.projections[j] for j in found] or self.projections
                raise UserError(
                    f"{_show(module)}: {name!r} fits {len(found)} of the projections: {', '.join(fitting)}"
                )
            index.append(found[0])
        if task not in self.tasks:
            hint = suggestion(task, self.tasks, "the tasks are")
            raise UserError(f"{_show(module)}: unknown task {task!r}; {hint}")
        return (*index, self.tasks.index(task))

    def _row(self, module: Sequence[Any], layer: Any) -> int:
        """The row of a mask that a layer number or the path of a group means."""
        if not self.groups:
            if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < self.n_layers:
                raise UserError(f"{_show(module)}: layer {layer!r} is not in 0..{self.n_layers - 1}")
            return layer
        found = [i for i, group in enumerate(self.groups) if type(group) is type(layer) and group == layer]
        if not found and isinstance(layer, str):
            ends = [i for i, group in enumerate(self.groups) if str(group).endswith(f".{layer}")]
            found = ends if len(ends) == 1 else []
        if not found:
            hint = suggestion(str(layer), [str(group) for group in self.groups], "the groups are")
            raise UserError(f"{_show(module)}: there is no group of modules {layer!r}; {hint}")
        return found[0]

    def to_json(
        self,
        keep: Keep,
        scale: float | None,
        merge: Mapping[str, Any] | None = None,
        adapters: Mapping[str, str] | None = None,
        spelling: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """The content of ``mask.json``: modules by name, never by flat index.

        Args:
            keep: a mask, or weights, which add the key ``weights``.
            scale: the merge coefficient, if it is known.
            merge: what the mask was found for, as ``merges.make`` takes it: ``method``, ``space``,
                ``isotropize`` and hyperparameters. A ``scale`` in it and what is None are left out.
            adapters: task -> hash of the adapter that it was found for.
            spelling: projection -> its name in the adapters' files, where a backbone has another.
        """
        keep = np.asarray(keep)
        keep = keep if keep.dtype == bool else keep.astype(np.float32)
        finer: dict[str, Any] = {}
        if self.granularity == "projection":
            finer = {"projections": list(self.projections)} | (
                {"spelling": dict(spelling)} if spelling else {}
            )
        return {
            "granularity": self.granularity,
            "pruned": [list(module) for module in self.pruned_modules(keep)],
            "scale": None if scale is None else float(scale),
            "tasks": list(self.tasks),
            "layers": self.n_layers,
            **({"groups": list(self.groups)} if self.groups else {}),
            **finer,
            **({} if keep.dtype == bool else {"weights": [list(x) for x in self.weighted_modules(keep)]}),
            **({} if merge is None else {"merge": _given(merge)}),
            **({} if adapters is None else {"adapters": dict(adapters)}),
        }


def decode_scale(gene: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Merge coefficient of a scale gene: ``3 sigmoid(gene)``, as the reference has it."""
    return MAX_SCALE * jax.nn.sigmoid(gene)


def encode_scale(scale: float) -> float:
    """The gene of a merge coefficient (clipped a little inside 0..3, where genes are finite)."""
    share = min(max(float(scale) / MAX_SCALE, 1e-3), 1 - 1e-3)
    return math.log(share / (1 - share))


def _named_groups(stack: LoraStack) -> tuple[Group, ...]:
    groups = stack.groups or ()
    return () if groups == tuple(range(stack.n_layers)) else groups


def _is_named(projection: str, name: str) -> bool:
    """Whether a projection is meant by its name or the end of it, with or without the shape."""
    return any(x == name or x.endswith(f".{name}") for x in (projection, projection.partition("@")[0]))


def _where(chosen: Bool[np.ndarray, "*module"]) -> list[tuple[int, ...]]:
    return [tuple(index) for index in np.argwhere(chosen).tolist()]


def _given(merge: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in merge.items() if key != "scale" and value is not None}


def _show(module: Sequence[Any]) -> str:
    return "module " + ":".join(map(str, module))
