"""What the controls of a finished search share: its evaluator, its two splits, and how a row is scored."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.example_scores import ExampleScores, PerExample
from enmp_jax.evaluation.population import EvalInputs
from enmp_jax.evaluation.scoring import Scoring
from enmp_jax.io.progress import Reporter
from enmp_jax.masks import Keep
from enmp_jax.runs.finalists import Finalist
from enmp_jax.search import controls


class Scored(NamedTuple):
    """A row's models on the test split.

    Attributes:
        examples: scores of every example under each model.
        baseline: those of the row's own plain merge; None: the run's.
        details: more of the row, for JSON.
    """

    examples: Float[np.ndarray, "model example"]
    baseline: PerExample | None = None
    details: Mapping[str, Any] = {}


@dataclasses.dataclass
class Bench:
    """A finished search, and what its controls share.

    Attributes:
        evaluator: of the run.
        found: the mask or weights that the search found.
        plain_scale: merge coefficient of the plain merge.
        masks_paid: masks that one seed of the search paid for (its example-evaluations, in whole splits).
        folder: where the searches of ``sensitivity`` keep what an interrupted one goes on with.
        masks: how many random masks.
        seeds: how many seeds of what depends on one.
        generations: of the searches of ``sensitivity``; None: those of the run.
        reporter: progress.
    """

    evaluator: Evaluator
    found: Finalist
    plain_scale: float
    masks_paid: int
    folder: Path
    masks: int
    seeds: int
    generations: int | None
    reporter: Reporter

    @functools.cached_property
    def test(self) -> ExampleScores:
        """The test split."""
        return ExampleScores(self.evaluator, "test")

    @functools.cached_property
    def inputs(self) -> EvalInputs:
        """Of the search split."""
        return self.evaluator.inputs("search")

    @functools.cached_property
    def scoring(self) -> Scoring:
        """Of the search split."""
        return self.evaluator.scoring("search")

    @property
    def count(self) -> int:
        """Modules that a control prunes: as many as the search did, or may have where it pruned none."""
        spec = self.evaluator.loaded.mask_spec
        return spec.n_pruned(self.found.keep != 0) or spec.max_count

    @property
    def plain(self) -> Keep:
        """The plain merge's mask."""
        return self.evaluator.loaded.mask_spec.all_kept()

    def fitness(self, keep: Shaped[np.ndarray, "member *module"]) -> Float[np.ndarray, " member"]:
        """Of masks at the found scale, on the search split."""
        found = self.evaluator.fitness_of(self.inputs, self.scoring, keep, self.found.scale)
        return np.where(np.isnan(found), -np.inf, found)

    def score(self, keep: Shaped[np.ndarray, "member *module"], **details: Any) -> Scored:
        """Masks at the found scale, on the test split."""
        return Scored(self.test.of_masks(keep, self.found.scale), details=details)

    @functools.cached_property
    def first_order(self) -> tuple[controls.Effects, str]:
        """Effects to first order, and of which fitness: the run's, or a margin where that has no gradient."""
        evaluator, loaded = self.evaluator, self.evaluator.loaded
        if not evaluator.kind.has_gradient:
            smooth = "margin" if loaded.labelled("search") else "expert_margin"
            search = dataclasses.replace(loaded.run.search, fitness=smooth)
            evaluator = evaluator.under(dataclasses.replace(loaded.run, search=search))
        fitness = jax.jit(evaluator.relaxed_fitness())
        inputs, scoring = evaluator.spread(evaluator.inputs("search")), evaluator.scoring("search")
        scale = jnp.float32(self.found.scale)
        spec = loaded.mask_spec
        effects = controls.first_order(lambda keep: -fitness(keep, inputs, scoring, scale), spec)
        return effects, evaluator.kind.name
