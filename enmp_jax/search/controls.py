"""What a found mask must be compared with: random, leave-one-out, greedy and first-order pruning.

Pure functions over ``score_masks(keep [member, ...]) -> fitness [member]`` (higher is better, any
number of masks), so that every run, split and merge method can use them. An *effect* is the gain
in fitness when one module is pruned: positive for a negative module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped

from enmp_jax.masks import Keep, MaskSpec

ScoreMasks = Callable[[Bool[np.ndarray, "member ..."]], Float[np.ndarray, " member"]]
Effects = Float[np.ndarray, "*module"]  # NaN where no module exists


class Sampled(NamedTuple):
    """Random masks and how they scored."""

    keep: Bool[np.ndarray, "member ..."]
    fitness: Float[np.ndarray, " member"]

    @property
    def mean(self) -> float:
        """Mean fitness."""
        return float(np.mean(self.fitness))

    @property
    def std(self) -> float:
        """Sample standard deviation of the fitness (NaN for a single mask)."""
        return float(np.std(self.fitness, ddof=1)) if len(self.fitness) > 1 else float("nan")

    def rank(self, fitness: float) -> int:
        """How many of the random masks are at least as good as ``fitness``."""
        return int(np.sum(self.fitness >= fitness))


def random_masks(key: PRNGKeyArray, spec: MaskSpec, count: int, masks: int) -> Bool[np.ndarray, "member ..."]:
    """Uniformly random masks that prune exactly ``count`` of the existing modules.

    Raises:
        ValueError: ``count`` is not in 0..number of modules.
    """
    if not 0 <= count <= spec.n_modules:
        raise ValueError(f"cannot prune {count} of {spec.n_modules} modules")
    order = np.argsort(np.asarray(jax.random.uniform(key, (masks, spec.n_modules))), axis=1)
    keep = np.ones((masks, int(np.prod(spec.shape))), bool)
    chosen = np.asarray(spec.slots, int)[order[:, :count]]
    np.put_along_axis(keep, chosen, False, axis=1)
    return keep.reshape(masks, *spec.shape)


def shuffled(key: PRNGKeyArray, spec: MaskSpec, keep: Keep, masks: int) -> Shaped[np.ndarray, "member ..."]:
    """A mask's or weights' values on the existing modules in random orders: as many are pruned, elsewhere."""
    slots = np.asarray(spec.slots, int)
    order = np.argsort(np.asarray(jax.random.uniform(key, (masks, spec.n_modules))), axis=1)
    flat = np.repeat(np.asarray(keep).reshape(1, -1), masks, axis=0)
    flat[:, slots] = flat[0, slots][order]
    return flat.reshape(masks, *spec.shape)


def random_pruning(
    score_masks: ScoreMasks, key: PRNGKeyArray, spec: MaskSpec, count: int, masks: int
) -> Sampled:
    """Score ``masks`` random masks with the same number of pruned modules as the found one."""
    keep = random_masks(key, spec, count, masks)
    return Sampled(keep, np.asarray(score_masks(keep), float))


def leave_one_out(score_masks: ScoreMasks, spec: MaskSpec) -> tuple[Effects, float]:
    """The effect of pruning each module alone, and the fitness of the plain merge.

    Costs one mask per existing module, and one.
    """
    keep = np.concatenate([spec.all_kept()[None], _without_one(spec.all_kept(), np.asarray(spec.slots))])
    fitness = np.asarray(score_masks(keep), float)
    return _effects(spec, fitness[1:] - fitness[0]), float(fitness[0])


def first_order(
    loss: Callable[[Float[Array, "*module"]], Float[Array, ""]],
    spec: MaskSpec,
    keep: Bool[np.ndarray, "*module"] | None = None,
) -> Effects:
    """Effects to first order, from one backward pass through a relaxed mask.

    Pruning module m moves ``keep[m]`` from 1 to 0, which changes a loss by ``-dL/dkeep[m]``; fitness
    being minus the loss, the effect is the gradient itself. Modules not kept have effect 0.

    Args:
        loss: differentiable in a float mask (mean negative log-likelihood on the search split).
        spec: which modules exist.
        keep: where to linearise; default: the plain merge.
    """
    at = spec.all_kept() if keep is None else np.asarray(keep, bool)
    gradient = np.asarray(jax.grad(loss)(jnp.asarray(at, jnp.float32)), float)
    return _effects(spec, (gradient * at).reshape(-1)[list(spec.slots)])


def prune_largest(effects: Effects, spec: MaskSpec, count: int) -> Bool[np.ndarray, "*module"]:
    """The mask that prunes the ``count`` modules of largest effect, only positive ones.

    Equal effects: the earlier module first.
    """
    flat = np.where(np.isnan(effects), -np.inf, effects).reshape(-1)
    order = np.argsort(-flat, kind="stable")[:count]
    keep = spec.all_kept().reshape(-1)
    keep[order[flat[order] > 0]] = False
    return keep.reshape(spec.shape)


class Greedy(NamedTuple):
    """A greedy removal.

    Attributes:
        keep: the mask reached.
        fitness: its fitness.
        path: fitness after 0, 1, .. removals.
        order: flat index (in ``spec.shape``) of each removed module.
        evaluations: masks scored.
        finished: False when the budget ran out before no removal helped.
    """

    keep: Bool[np.ndarray, "*module"]
    fitness: float
    path: tuple[float, ...]
    order: tuple[int, ...]
    evaluations: int
    finished: bool


def greedy_removal(
    score_masks: ScoreMasks,
    spec: MaskSpec,
    budget: int,
    width: int | None = None,
    first: Effects | None = None,
) -> Greedy:
    """Prune, one after another, the module whose removal helps most, while it helps.

    Stops at ``spec.max_count`` removals, when nothing helps, or when ``budget`` masks were scored. A
    last round that the budget cuts short still removes the best that it saw.

    Args:
        score_masks: scores any number of masks.
        spec: which modules exist, and how many may go.
        budget: most masks to score, the plain merge included.
        width: candidates scored per round, those of largest last known effect first; default: all.
            Narrow rounds are the lazy greedy algorithm: cheap, and exact when effects shrink.
        first: effects known beforehand (leave-one-out or first-order), for the order of candidates.

    Raises:
        ValueError: a budget below 1 or a width below 1.
    """
    if budget < 1 or (width is not None and width < 1):
        raise ValueError("greedy removal needs a budget and a width of at least 1")
    slots = np.asarray(spec.slots, int)
    known = (
        np.full(len(slots), np.inf) if first is None else np.nan_to_num(first.reshape(-1)[slots], nan=-np.inf)
    )
    keep = spec.all_kept()
    path = [float(np.asarray(score_masks(keep[None]))[0])]
    removed: list[int] = []
    spent, alive, finished = 1, np.ones(len(slots), bool), True
    while len(removed) < spec.max_count:
        candidates = np.flatnonzero(alive)
        candidates = candidates[np.argsort(-known[candidates], kind="stable")][:width]
        allowed = budget - spent
        if allowed <= 0:
            finished = False
            break
        cut = len(candidates) > allowed
        candidates = candidates[:allowed]
        fitness = np.asarray(score_masks(_without_one(keep, slots[candidates])), float)
        spent += len(candidates)
        gains = np.where(np.isnan(fitness), -np.inf, fitness - path[-1])
        known[candidates] = gains
        best = int(np.argmax(gains))
        if not gains[best] > 0:
            finished = not cut
            break
        chosen = candidates[best]
        alive[chosen] = False
        keep = _without_one(keep, slots[[chosen]])[0]
        removed.append(int(slots[chosen]))
        path.append(float(fitness[best]))
    return Greedy(keep, path[-1], tuple(path), tuple(removed), spent, finished)


def _without_one(keep: Bool[np.ndarray, "*module"], flat: np.ndarray) -> Bool[np.ndarray, "member ..."]:
    masks = np.repeat(keep.reshape(1, -1), len(flat), axis=0)
    masks[np.arange(len(flat)), flat] = False
    return masks.reshape(len(flat), *keep.shape)


def _effects(spec: MaskSpec, values: np.ndarray) -> Effects:
    effects = np.full(int(np.prod(spec.shape)), np.nan)
    effects[list(spec.slots)] = values
    return effects.reshape(spec.shape)
