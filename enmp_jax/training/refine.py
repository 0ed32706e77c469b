"""Refining: one LoRA for all tasks, trained from a merged model on the data of a search.

A merge is a far better start than the base model, and the experts' own answers on unlabelled inputs are
better teachers than labels on few examples (benchmarks/results/search.md). From the base alone this is
the joint LoRA that sceptics of merging ask about (arXiv 2602.12323).

Cross-fitted, it is two of them: one follows the search split and is judged by the selection split, the other
the reverse, and their mean has seen all the data while no look has judged by data that were followed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from enmp_jax.config.sections import RefineConfig
from enmp_jax.deltas import Deltas, add_deltas
from enmp_jax.errors import UserError
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.population import EvalInputs, count_all
from enmp_jax.evaluation.scoring import Scoring
from enmp_jax.io.checkpoints import Checkpoints
from enmp_jax.training.experts import expert_deltas, init_factors
from enmp_jax.training.loop import EarlyStopping, OnProgress, Schedule, train


class Refined(NamedTuple):
    """A refined merge.

    Attributes:
        deltas: those of the start and of the LoRA, added up.
        step: steps of the LoRA, the best on the selection split; 0: nothing was better than the start.
        fitness: on the selection split, of the start and after every check; cross-fitted: the mean of what
            both judges see.
    """

    deltas: Deltas
    step: int
    fitness: list[float]


class _Data(NamedTuple):
    inputs: EvalInputs
    scoring: Scoring
    start: Deltas


def refine(
    evaluator: Evaluator,
    start: Deltas,
    config: RefineConfig,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    checkpoints: Checkpoints | None = None,
) -> Refined:
    """Train a LoRA of rank ``config.rank`` on the modules that the adapters have, full batches at a time.

    Maximises the evaluator's fitness on the search split; the selection split says when to stop. With
    ``config.cross_fit`` a second LoRA does so with the splits exchanged, both stop together where the mean of
    what their judges say is best, and half of each is added: as one LoRA, of twice the rank. The judges see
    the half that is added: what a whole LoRA has learnt by heart costs more than its half does in the mean.

    Args:
        evaluator: of a run whose fitness has a gradient.
        start: deltas of the merged model; empty: from the base.
        config: see ``RefineConfig``.
        seed: of the LoRA's start.
        on_progress: see ``training.loop.train``.
        checkpoints: see ``training.loop.train``.

    Raises:
        UserError: a fitness without a gradient.
    """
    loaded, kind, objective = evaluator.loaded, evaluator.kind, evaluator.loaded.run.search.objective
    if not kind.has_gradient:
        raise UserError(f"refine.fitness {kind.name} has no gradient: take expert_kl, probability or margin")
    n_tasks, backbone = len(loaded.tasks), loaded.backbone

    def fitness(factors: Any, data: _Data, remat: bool) -> Float[Array, ""]:
        deltas = add_deltas(data.start, expert_deltas(factors, 1.0))
        counts = count_all(backbone, data.inputs, deltas, n_tasks, kind, remat)
        return data.scoring.fitness(counts, kind, objective)

    def loss(factors: Any, data: list[_Data], key: Array) -> Float[Array, ""]:
        # a sum: every fold has the gradient that it would have alone
        return -jnp.stack([fitness(_fold(factors, i), own, remat=True) for i, own in enumerate(data)]).sum()

    def data(split: Any) -> _Data:
        return _Data(evaluator.spread(evaluator.inputs(split)), evaluator.scoring(split), start)

    splits = [data("search"), data("selection")]
    folds = 1 + config.cross_fit
    followed, judging, looks = splits[:folds], splits[::-1][:folds], []
    value = jax.jit(lambda factors, data: fitness(factors, data, remat=False))

    def score(step: int, factors: Any) -> float:
        judged = {name: (a, b / folds) for name, (a, b) in factors.items()}
        looks.append(float(np.mean([value(_fold(judged, i), own) for i, own in enumerate(judging)])))
        return looks[-1]

    def told(step: int, total: float) -> None:
        if on_progress:
            on_progress(step, total / folds)

    key = jax.random.key(seed)
    trained = train(
        loss, init_factors(backbone, sorted(loaded.stack.pairs), config.rank, folds, key), followed,
        Schedule(config.steps, config.learning_rate, weight_decay=0.0), jax.random.fold_in(key, 1),
        independent=True, steps_per_dispatch=config.check_every, on_progress=told, checkpoints=checkpoints,
        early_stopping=EarlyStopping(score, config.check_every, config.patience),
    )  # fmt: skip
    if trained.step == 0:
        return Refined(start, 0, looks)
    added = expert_deltas(jax.tree.map(np.asarray, _side_by_side(trained.weights)), 1.0 / folds)
    return Refined(add_deltas(start, added), trained.step, looks)


def _fold(factors: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], factors)


def _side_by_side(factors: Any) -> Any:
    """The factors of the sum of all folds' LoRAs: their ranks one after the other.

    A is [fold, layer, rank, in], B [fold, layer, out, rank]; the results have no fold axis.
    """
    return {
        name: (jnp.concatenate(list(a), axis=-2), jnp.concatenate(list(b), axis=-1))
        for name, (a, b) in factors.items()
    }
