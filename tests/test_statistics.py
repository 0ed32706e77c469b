"""Bootstrap and Holm, against scipy and worked examples."""

import numpy as np
import pytest
from scipy import stats

from enmp_jax.search import statistics
from enmp_jax.search.statistics import Sample, holm, paired_bootstrap


def one_task(n):
    return Sample(np.zeros(n, int), np.ones(1))


def answers(n=400, seed=0, better=0.08):
    random = np.random.default_rng(seed)
    before = (random.random(n) < 0.6).astype(float)
    after = np.where(random.random(n) < 0.2, random.random(n) < 0.6 + 5 * better, before)
    return before, after.astype(float)


def test_the_interval_is_scipys():
    before, after = answers()
    found = paired_bootstrap(after, before, one_task(400))
    known = stats.bootstrap(
        (after, before), lambda x, y, axis: (x - y).mean(axis), paired=True, method="percentile",
        n_resamples=10_000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert found.difference == pytest.approx((after - before).mean())
    # both are random: an end of the interval has a standard error of about 0.0005 with 10,000 resamples
    assert found.low == pytest.approx(known.low, abs=0.003)
    assert found.high == pytest.approx(known.high, abs=0.003)


@pytest.mark.parametrize("better", [0.0, 0.03, 0.06])
def test_the_p_value_is_near_that_of_a_paired_t_test(better):
    before, after = answers(2000, 3, better)
    found = paired_bootstrap(after, before, one_task(2000))
    known = stats.ttest_rel(after, before).pvalue
    assert found.p == pytest.approx(known, abs=0.02)
    assert (found.p < 0.05) == (not found.low <= 0 <= found.high)


def test_tasks_are_resampled_apart_and_weighted():
    """One task without any difference and a sure one: nothing is left to chance, whatever the sizes."""
    difference, task = np.r_[np.zeros(30), np.ones(7)], np.r_[np.zeros(30, int), np.ones(7, int)]
    found = paired_bootstrap(difference, 0 * difference, Sample(task, np.array([0.5, 0.5 / 0.8])))
    assert found[:3] == pytest.approx((0.625, 0.625, 0.625))
    mixed = np.r_[np.tile([1.0, -1.0], 15), np.ones(7)]
    found = paired_bootstrap(mixed, 0 * mixed, Sample(task, np.array([0.5, 0.5])))
    # 0.5 +- 1.96 * 0.5 / sqrt(30)
    assert (found.low, found.high) == pytest.approx((0.5 - 0.179, 0.5 + 0.179), abs=0.02)


def test_no_difference_is_no_evidence():
    assert paired_bootstrap(np.zeros(50), np.zeros(50), one_task(50)) == (0.0, 0.0, 0.0, 1.0)


def completions(n=60, seed=0, better=0.15):
    """Tokens of answers, and their log-likelihoods under two models."""
    random = np.random.default_rng(seed)
    tokens = random.integers(1, 9, n)
    before = -tokens * random.uniform(0.3, 1.2, n)
    return tokens, before + tokens * random.normal(better, 0.2, n), before


def test_likelihoods_of_completions_have_scipys_interval(monkeypatch):
    """exp(sum of log-likelihoods / sum of tokens): a ratio, not a mean of what single answers gain."""
    tokens, after, before = completions()
    likely = np.array([True])
    sample = Sample(np.zeros(60, int), np.ones(1), tokens.astype(float), likely)

    def difference(x, y, n, axis):
        return np.exp(x.sum(axis) / n.sum(axis)) - np.exp(y.sum(axis) / n.sum(axis))

    known = stats.bootstrap(
        (after, before, tokens), difference, paired=True, method="percentile", n_resamples=10_000,
        rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    found = paired_bootstrap(after, before, sample)
    assert found.difference == pytest.approx(difference(after, before, tokens, 0))
    assert sample.scores(after) - sample.scores(before) == pytest.approx([found.difference])
    # the interval is .05 wide, and an end of it random by about .0005
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=0.003)
    monkeypatch.setattr(statistics, "DRAWS", 60 * 7)  # seven resamples at a time
    assert paired_bootstrap(after, before, sample) == pytest.approx(found)


def test_models_are_averaged_by_their_scores():
    """Two seeds of a model: the mean of two accuracies, and of two likelihoods, under the same resamples."""
    tokens, one, before = completions(40)
    models = one, one + 0.1 * tokens
    right = np.random.default_rng(0).random((3, 30)) < 0.5
    task = np.repeat([0, 1], [30, 40])
    values = np.concatenate([right.astype(float), [*models, before]], axis=1)
    sample = Sample(task, np.array([0.5, 0.5]), np.r_[np.ones(30), tokens], np.array([False, True]))
    both = paired_bootstrap(values[:2], values[2], sample)
    scores = sample.scores(values)
    assert scores.shape == (3, 2)
    assert both.difference == pytest.approx((scores[:2].mean(0) - scores[2]).sum() / 2)
    assert both.difference == pytest.approx(sample.mean(values[:2]).mean() - sample.mean(values[2]))
    # a model against itself and another: half of the difference to the other, resample by resample
    single = paired_bootstrap(values[0], values[2], sample)
    mixed = paired_bootstrap(values[[0, 2]], values[2], sample)
    assert mixed[:3] == pytest.approx([x / 2 for x in single[:3]], abs=0.004)


def test_holm_on_a_worked_example():
    """Holm's step-down: 4 * .005, 3 * .01, then .06 (2 * .03), which .04 may not fall below."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2]) == [0.2] and holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_holm_rejects_no_more_than_an_uncorrected_test_and_no_less_than_bonferroni():
    p = np.random.default_rng(0).random(30) ** 3
    adjusted = np.array(holm(p.tolist()))
    assert (adjusted >= p).all() and (adjusted <= np.minimum(1, 30 * p)).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()
    # scipy has Benjamini and Hochberg's, which controls less and rejects more
    assert (adjusted >= stats.false_discovery_control(p) - 1e-12).all()
