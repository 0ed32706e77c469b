"""Scores and losses of every task, as ``scores.json`` and ``enmp evaluate --json`` have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.generation import Model, generated_scores
from enmp_jax.evaluation.loaded_run import Split
from enmp_jax.evaluation.scoring import Counts, by_task


def metrics(evaluator: Evaluator, split: Split) -> dict[str, str]:
    """Task -> what its scores are: ``accuracy``, ``agreement`` with its expert where there are no labels, or
    of a completion ``likelihood``: exp(-loss), with the loss in nats per token of the answers."""
    loaded = evaluator.loaded
    chosen = "accuracy" if loaded.labelled(split) else "agreement"
    names = ["likelihood" if kind == "completion" else chosen for kind in loaded.kinds]
    return dict(zip(loaded.tasks, names, strict=True))


def task_scores(
    evaluator: Evaluator, split: Split, models: Mapping[str, int], counts: Counts
) -> dict[str, Any]:
    """``metric``, the scores of every model under its name, and ``loss`` of the experts and every model.

    Args:
        evaluator: of the run.
        split: what was scored.
        models: name -> row of ``counts``.
        counts: of several models.
    """
    tasks, scoring = evaluator.loaded.tasks, evaluator.scoring(split)
    scores, losses = np.asarray(scoring.scores(counts)), np.asarray(scoring.loss(counts))
    found = {name: by_task(tasks, scores[row]) for name, row in models.items()}
    loss = {"reference": by_task(tasks, evaluator.expert_losses(split))}
    loss |= {name: by_task(tasks, losses[row]) for name, row in models.items()}
    return {"metric": metrics(evaluator, split), **found, "loss": loss}


def generated(evaluator: Evaluator, split: Split, models: Mapping[str, Model]) -> dict[str, Any]:
    """``generated``: task -> metric -> model -> value, if some task asks for metrics."""
    found = generated_scores(evaluator, split, models)
    return {"generated": found} if found else {}


def one_model(counts: Counts) -> Counts:
    """Counts of one model as those of several."""
    return jax.tree.map(lambda x: np.asarray(x)[None], counts)
