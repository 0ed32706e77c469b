"""The packaged vision suite: its files fit each other, and its data where they are."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from enmp_jax import models
from enmp_jax.config import run_file
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.loaded_run import load, load_run_adapters

DATA = os.environ.get("TFDS_DATA_DIR", str(Path(__file__).parents[2] / "shared" / "data" / "tfds"))


@pytest.fixture(scope="module")
def run():
    return run_file.load(run_file.SUITES / "vision-small.yaml")


def test_adapters_and_heads_fit_the_base(run):
    backbone, _ = models.load(run.path(run.base.model))
    adapters = load_run_adapters(run, backbone)
    assert adapters.stack.tasks == ("mnist", "fashion", "cifar", "gtsrb", "arabic", "kannada", "signs")
    assert len(adapters.stack.pairs) == len(backbone.modules)
    for pair in adapters.stack.pairs.values():
        assert pair.present.all() and np.asarray(pair.b).any(axis=(2, 3)).all()


@pytest.mark.skipif(not Path(DATA).is_dir(), reason="no TFDS data directory")
def test_its_experts_know_more_than_the_base(run, monkeypatch):
    """The first thing that makes a suite fit for use, on a few examples."""
    monkeypatch.setenv("TFDS_DATA_DIR", DATA)
    evaluation = dataclasses.replace(run.evaluation, search_examples=40, batch_size=140)
    evaluator = Evaluator(load(dataclasses.replace(run, evaluation=evaluation), ("search",)))
    sizes = evaluator.loaded.sizes("search")
    expert = evaluator.expert_scores("search")
    base = np.asarray(evaluator.score_base("search").correct) / sizes
    assert (expert > base).all()
    assert (base / expert).mean() < 0.6
