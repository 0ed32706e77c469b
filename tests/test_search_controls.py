"""Controls: random, leave-one-out, greedy and first-order pruning, against brute force."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_masks import make_stack

from enmp_jax.masks import MaskSpec
from enmp_jax.search import controls

GONE = [(1, "q_proj", "dtd"), (1, "v_proj", "dtd")]
SPEC = MaskSpec.of(make_stack(missing=GONE), max_pruned=0.5)
RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=SPEC.shape)
PAIRS = RNG.normal(size=(12, 12)) * 0.2


class Score:
    """Fitness with pairwise interactions; counts the masks that it scored."""

    def __init__(self, interactions=True):
        self.pairs = PAIRS * interactions
        self.calls = 0

    def __call__(self, keep):
        assert keep.dtype == bool
        assert keep.shape[1:] == SPEC.shape
        assert keep[:, ~SPEC.present()].all()
        self.calls += len(keep)
        pruned = ~keep.reshape(len(keep), -1)
        return pruned @ WEIGHTS.reshape(-1) + np.einsum("pi,ij,pj->p", pruned, self.pairs, pruned)


def test_random_masks_prune_exactly_the_count_and_only_existing_modules():
    keep = controls.random_masks(jax.random.key(0), SPEC, 4, 500)
    assert keep[:, ~SPEC.present()].all()
    assert np.all((~keep).sum(axis=(1, 2)) == 4)
    share = (~keep).mean(axis=0)[SPEC.present()]
    assert share.min() > 0.28  # uniform: 4 of 11 is 0.364, standard deviation 0.022
    assert share.max() < 0.45
    assert np.array_equal(keep, controls.random_masks(jax.random.key(0), SPEC, 4, 500))
    assert controls.random_masks(jax.random.key(0), SPEC, 0, 3).all()
    with pytest.raises(ValueError, match="12 of 11"):
        controls.random_masks(jax.random.key(0), SPEC, 12, 1)


def test_random_pruning():
    sampled = controls.random_pruning(Score(), jax.random.key(1), SPEC, 3, 50)
    np.testing.assert_allclose(sampled.fitness, Score()(sampled.keep))
    assert sampled.mean == pytest.approx(np.mean(sampled.fitness))
    assert sampled.std == pytest.approx(np.std(sampled.fitness, ddof=1))
    assert sampled.rank(sampled.fitness.max()) == 1
    assert sampled.rank(-np.inf) == 50


def test_leave_one_out_is_the_effect_of_each_module():
    score = Score()
    effects, plain = controls.leave_one_out(score, SPEC)
    assert score.calls == SPEC.n_modules + 1
    assert plain == 0.0
    assert np.array_equal(np.isnan(effects), ~SPEC.present())
    expected = WEIGHTS + np.diag(PAIRS).reshape(SPEC.shape)
    np.testing.assert_allclose(effects[SPEC.present()], expected[SPEC.present()])


def test_first_order_is_leave_one_out_where_the_loss_is_linear():
    linear = lambda keep: -jnp.sum((1 - keep) * WEIGHTS)  # noqa: E731
    effects = controls.first_order(linear, SPEC)
    exact, _ = controls.leave_one_out(Score(interactions=False), SPEC)
    np.testing.assert_allclose(effects, exact, rtol=1e-6)
    at = SPEC.keep_from_pruned([(0, "cars")])
    assert controls.first_order(linear, SPEC, at)[0, 0] == 0.0


def test_prune_largest():
    effects, _ = controls.leave_one_out(Score(interactions=False), SPEC)
    positive = int((effects > 0).sum())
    keep = controls.prune_largest(effects, SPEC, 3)
    assert positive > 3
    assert set(effects[~keep]) == set(np.sort(effects[SPEC.present()])[-3:])
    assert int((~controls.prune_largest(effects, SPEC, 12)).sum()) == positive
    assert np.flatnonzero(~controls.prune_largest(np.ones((4, 3)), SPEC, 2)).tolist() == [0, 1]


def greedy_by_hand(limit):
    keep, score = SPEC.all_kept(), Score()
    path = [score(keep[None])[0]]
    for _ in range(limit):
        options = []
        for index in zip(*np.nonzero(keep & SPEC.present()), strict=True):
            trial = keep.copy()
            trial[index] = False
            options.append((score(trial[None])[0], trial))
        value, trial = max(options, key=lambda option: option[0])
        if value <= path[-1]:
            break
        keep, path = trial, [*path, value]
    return keep, path


def test_greedy_removal_is_exact_with_a_large_budget():
    found = controls.greedy_removal(Score(), SPEC, budget=1000)
    keep, path = greedy_by_hand(SPEC.max_count)
    assert len(path) > 3
    assert np.array_equal(found.keep, keep)
    np.testing.assert_allclose(found.path, path)
    assert found.fitness == pytest.approx(Score()(found.keep[None])[0])
    assert found.finished
    assert sorted(found.order) == np.flatnonzero(~found.keep).tolist()
    brute = max(
        Score()(SPEC.keep_from_pruned([]).reshape(1, *SPEC.shape) & mask[None])[0]
        for count in range(SPEC.max_count + 1)
        for chosen in itertools.combinations(SPEC.slots, count)
        for mask in [np.isin(np.arange(12), chosen, invert=True).reshape(SPEC.shape)]
    )
    assert found.fitness <= brute + 1e-12


@pytest.mark.parametrize("budget", [1, 5, 12, 13, 30])
def test_greedy_removal_keeps_to_its_budget(budget):
    score = Score()
    found = controls.greedy_removal(score, SPEC, budget)
    assert score.calls == found.evaluations <= budget
    assert found.fitness == max(found.path)
    if budget < 30:
        assert not found.finished
    if budget == 1:
        assert found.keep.all()


def test_greedy_removal_stops_when_nothing_helps():
    spec = dataclasses.replace(SPEC, max_pruned=1.0)
    keep, path = greedy_by_hand(spec.max_count)
    assert len(path) - 1 < spec.max_count
    found = controls.greedy_removal(Score(), spec, budget=1000)
    assert np.array_equal(found.keep, keep)
    assert found.finished
    np.testing.assert_allclose(found.path, path)


def test_narrow_greedy_is_cheaper_and_uses_what_is_known():
    score = Score(interactions=False)
    effects, _ = controls.leave_one_out(score, SPEC)
    score.calls = 0
    narrow = controls.greedy_removal(score, SPEC, 1000, width=1, first=effects)
    wide = controls.greedy_removal(Score(interactions=False), SPEC, 1000)
    assert np.array_equal(narrow.keep, wide.keep)
    assert score.calls <= 1 + SPEC.max_count + 1 < wide.evaluations
    for budget, width in ((0, None), (5, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            controls.greedy_removal(Score(), SPEC, budget, width)
