"""The best of a merge method's settings on the search split: scale, and first hyperparameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from enmp_jax import merges
from enmp_jax.config.run_file import RunConfig
from enmp_jax.config.sections import MergeConfig
from enmp_jax.devices.mesh import replicate
from enmp_jax.errors import UserError
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.population import EvalInputs
from enmp_jax.merges.hyperparameters import hyperparameters
from enmp_jax.runs.search import choose_scale

GRIDS: dict[str, tuple[float, ...]] = {
    "density": (0.1, 0.2, 0.4),
    "drop_rate": (0.5, 0.9),
    "rank_fraction": (0.04, 0.16),
    "common_fraction": (0.5, 0.8),
}
"""What the first hyperparameter of a method is tuned over, by its name, beside its default."""


def candidates(run: RunConfig, method: str, space: str) -> list[MergeConfig]:
    """A method in a space with each value of its first hyperparameter, the default or the run's own first."""
    merge, known = run.merge, hyperparameters(merges.ALL[method])
    own = merge.method.replace("-", "_") == method
    given = dict(merge.hyperparameters) if own else {}
    first = next(iter(known), None)
    values = [given.get(first, known[first].default), *GRIDS.get(first, ())] if first else [None]
    return [
        dataclasses.replace(
            merge,
            method=method,
            space=space,
            isotropize=own and merge.isotropize,
            statistics=merge.statistics if own else None,
            scale="auto" if merge.scale_grid else merge.scale,
            hyperparameters=given if value is None or first is None else given | {first: value},
        )
        for value in dict.fromkeys(values)
    ]  # type: ignore[arg-type]


class Tuned(NamedTuple):
    """A merge with all that was chosen for it on the search split.

    Attributes:
        evaluator: under this merge.
        inputs: of the search split, with the adapters as the method prepared them.
        scale: merge coefficient.
        fitness: on the search split.
    """

    evaluator: Evaluator
    inputs: EvalInputs
    scale: float
    fitness: float


class NoMerge(UserError):
    """A method merges these adapters with none of its settings."""


def tune(evaluator: Evaluator, inputs: EvalInputs, among: Sequence[MergeConfig]) -> Tuned:
    """The best of some merges on the search split, each at the best of its scales.

    Args:
        evaluator: of the run.
        inputs: of the search split.
        among: the merges; of equal ones the earlier wins, and those that are refused are passed over.

    Raises:
        NoMerge: all are refused, or none has a finite fitness.
    """
    scoring, run, best, failed = evaluator.scoring("search"), evaluator.loaded.run, None, None
    for merge in among:
        try:
            under = evaluator.under(dataclasses.replace(run, merge=merge))
            own = with_ingredients(under, inputs)
            scale, grid = choose_scale(under, own, scoring)
        except UserError as error:
            failed = error
            continue
        if best is None or grid[scale] > best.fitness:
            best = Tuned(under, own, scale, grid[scale])
    if best is None:
        raise NoMerge(str(failed)) from failed
    return best


def with_ingredients(evaluator: Evaluator, inputs: EvalInputs) -> EvalInputs:
    """Inputs of a split with the adapters as an evaluator's method prepared them."""
    return inputs._replace(ingredients=replicate(evaluator.ingredients, evaluator.mesh))
