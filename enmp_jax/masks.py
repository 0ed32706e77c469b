"""Keep masks: which modules are merged. Genomes to masks, masks to names and back.

A module is (layer, task), all projections of one task in one layer as in the paper, or, with
granularity ``projection``, (layer, projection, task). ``keep`` is True where a module is merged.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from enmp_jax.errors import UserError, suggestion
from enmp_jax.lora import LoraStack

Granularity = Literal["layer", "projection"]
Module = tuple[int, str] | tuple[int, str, str]  # (layer, task) or (layer, projection, task)

MAX_SCALE = 3.0
"""Largest merge coefficient that a scale gene can express."""


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
    """

    n_layers: int
    projections: tuple[str, ...]
    tasks: tuple[str, ...]
    slots: tuple[int, ...]
    granularity: Granularity = "layer"
    max_pruned: float = 0.2
    threshold: float = 0.0
    search_scale: bool = False

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

    def n_pruned(self, keep: Bool[np.ndarray, "*module"]) -> int:
        """Number of existing modules that a mask prunes."""
        return int(np.sum(~np.asarray(keep, bool) & self.present()))

    def pruned_modules(self, keep: Bool[np.ndarray, "*module"]) -> list[Module]:
        """The pruned modules by name, in mask order: (layer, task) or (layer, projection, task)."""
        found: list[Module] = []
        for layer, *middle, task in np.argwhere(~np.asarray(keep, bool) & self.present()):
            names = [self.projections[j] for j in middle]
            found.append((int(layer), *names, self.tasks[task]))
        return found

    def keep_from_pruned(self, pruned: Iterable[Sequence[Any]]) -> Bool[np.ndarray, "*module"]:
        """The mask that prunes the named modules; inverse of ``pruned_modules``.

        A projection may be given by the end of its name (``q_proj``) where that is unique.

        Raises:
            UserError: unknown task or projection, layer out of range, module that does not exist.
        """
        keep, present = self.all_kept(), self.present()
        for module in pruned:
            index = self._index(module)
            if not present[index]:
                raise UserError(f"{_show(module)} cannot be pruned: that adapter has no LoRA there")
            keep[index] = False
        return keep

    def _index(self, module: Sequence[Any]) -> tuple[int, ...]:
        words = ["layer", "projection", "task"] if self.granularity == "projection" else ["layer", "task"]
        if isinstance(module, str) or len(module) != len(words):
            raise UserError(f"{module!r} does not name a module: give {', '.join(words)}")
        layer, *middle, task = module
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < self.n_layers:
            raise UserError(f"{_show(module)}: layer {layer!r} is not in 0..{self.n_layers - 1}")
        index = [layer]
        for name in middle:
            found = [j for j, p in enumerate(self.projections) if p == name or p.endswith(f".{name}")]
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

    def to_json(self, keep: Bool[np.ndarray, "*module"], scale: float | None) -> dict[str, Any]:
        """The content of ``mask.json``: modules by name, never by flat index."""
        finer = {"projections": list(self.projections)} if self.granularity == "projection" else {}
        return {
            "granularity": self.granularity,
            "pruned": [list(module) for module in self.pruned_modules(keep)],
            "scale": None if scale is None else float(scale),
            "tasks": list(self.tasks),
            "layers": self.n_layers,
            **finer,
        }


def decode_scale(gene: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Merge coefficient of a scale gene: ``3 sigmoid(gene)``, as the reference has it."""
    return MAX_SCALE * jax.nn.sigmoid(gene)


def encode_scale(scale: float) -> float:
    """The gene of a merge coefficient (clipped a little inside 0..3, where genes are finite)."""
    share = min(max(float(scale) / MAX_SCALE, 1e-3), 1 - 1e-3)
    return math.log(share / (1 - share))


def _show(module: Sequence[Any]) -> str:
    return "module " + ":".join(map(str, module))
