"""Each strategy: contract, ties, NaN, progress on a toy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enmp_jax.errors import UserError
from enmp_jax.search.loop import make_step, run
from enmp_jax.search.strategies import STRATEGIES, build

SIZE = 24
MEAN = np.full(SIZE, -1.0, np.float32)
TARGET = np.asarray(jax.random.bernoulli(jax.random.key(5), 0.4, (SIZE,)))


STEPS = {}  # compiled once for all tests


class Scores(NamedTuple):
    fitness: jax.Array


def evaluate(genomes, memory, mode):
    """Bits (genes above 0) that agree with the target; ``mode`` adds one of the troubles below."""
    good = jnp.sum((genomes > 0) == TARGET, axis=-1).astype(jnp.float32)
    some = jnp.arange(len(genomes)) % 3 == 0
    fitness = jnp.select(
        [mode == SOME_NAN, mode == SOME_WORST, mode == ALL_NAN, mode == CONSTANT],
        [jnp.where(some, jnp.nan, good), jnp.where(some, -jnp.inf, good), good * jnp.nan, good * 0],
        good,
    )
    return Scores(fitness), memory


NO_TROUBLE, SOME_NAN, SOME_WORST, ALL_NAN, CONSTANT = range(5)


@pytest.fixture(scope="module", params=STRATEGIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def strategy(name):
    return build(name, SIZE, 8, 1.0)


def search(strategy, seed, generations, mode=NO_TROUBLE):
    if strategy not in STEPS:
        STEPS[strategy] = make_step(strategy, evaluate, 60)
    return run(STEPS[strategy], jax.random.key(seed), MEAN, generations, operands=(jnp.asarray(mode),))


def test_one_generation_keeps_types(strategy):
    """A state goes through a generation with the same structure, shapes, types and no weak type."""
    state = jax.eval_shape(strategy.init, jax.random.key(0), jnp.asarray(MEAN))

    def generation(state):
        genomes, state = strategy.ask(jax.random.key(1), state)
        assert genomes.shape == (8, SIZE)
        assert genomes.dtype == jnp.float32
        return strategy.tell(jax.random.key(2), genomes, genomes[:, 0], state)

    after = jax.eval_shape(generation, state)
    assert jax.tree.structure(state) == jax.tree.structure(after)
    for old, new in zip(*map(jax.tree.leaves, (state, after)), strict=True):
        assert (old.shape, old.dtype, old.weak_type) == (new.shape, new.dtype, new.weak_type)
        assert not new.weak_type


def test_improves_on_a_toy(name, strategy):
    """In 40 x 8 evaluations every strategy but random search learns most of the 24 bits."""
    finals = [search(strategy, seed, 40).scores.fitness[-10:].mean() for seed in range(5)]
    assert SIZE - TARGET.sum() == 13  # where the search starts: nothing set
    if name == "random":
        assert np.mean(finals) < 14
    else:
        assert np.mean(finals) > 19


@pytest.mark.parametrize("name", ["cma_es", "sep_cma_es", "snes"], indirect=True, scope="module")
def test_tied_fitness_does_not_collapse(strategy):
    """Constant fitness is a random walk: the step size stays of the order of sigma0 = 1."""
    spread = search(strategy, 0, 60, CONSTANT).genomes.std(axis=1).mean(axis=1)
    assert 0.5 < spread[-1] < 2.5


def test_nan_counts_as_worst(strategy):
    failed = search(strategy, 0, 12, SOME_NAN)
    worst = search(strategy, 0, 12, SOME_WORST)
    assert np.isnan(failed.scores.fitness).sum() == 36
    np.testing.assert_array_equal(failed.genomes, worst.genomes)
    lost = search(strategy, 0, 12, ALL_NAN)
    assert np.isnan(lost.scores.fitness).all()
    for result in (failed, lost):
        assert np.isfinite(result.genomes).all()


@pytest.mark.parametrize("name", ["cma_es", "de", "random"])
def test_first_generation_is_drawn_around_the_mean(name):
    strategy = build(name, 200, 16, 0.5)
    genomes = jax.jit(lambda key: strategy.ask(key, strategy.init(key, jnp.full(200, -1.0)))[0])(
        jax.random.key(0)
    )
    assert genomes.mean() == pytest.approx(-1.0, abs=0.03)
    assert genomes.std() == pytest.approx(0.5, abs=0.03)


def test_bit_flip_flips_at_least_one_bit_and_about_one():
    strategy = build("bit_flip", 97, 64, 0.5, threshold=0.2, free=1)
    state = strategy.init(jax.random.key(0), jnp.asarray([-1.0] * 96 + [3.0]))
    genomes, _ = jax.jit(strategy.ask)(jax.random.key(1), state)
    flipped = np.asarray(genomes[:, :96] > 0.2).sum(axis=1)
    assert flipped.min() == 1
    assert 1.0 < flipped.mean() < 2.0
    # the free gene is a number: it moves by sigma0, never by reflection
    assert np.asarray(genomes[:, 96]).mean() == pytest.approx(3.0, abs=0.25)
    assert np.asarray(genomes[:, 96]).std() == pytest.approx(0.5, abs=0.15)
    # comma selection: the best member is the next parent, even when worse than the old one
    fitness = -jnp.arange(64.0)
    assert np.array_equal(strategy.tell(jax.random.key(2), genomes, fitness, state).genome, genomes[0])


def test_cma_es_samples_its_covariance():
    """The symmetric root draws N(mean, std^2 C), checked on a covariance that is not diagonal."""
    strategy = build("cma_es", 3, 20_000, 0.5)
    state = jax.jit(strategy.init)(jax.random.key(0), jnp.asarray([1.0, 2.0, 3.0]))
    covariance = jnp.asarray([[2.0, 0.8, 0.0], [0.8, 1.0, -0.3], [0.0, -0.3, 0.5]])
    genomes, _ = jax.jit(strategy.ask)(jax.random.key(1), state.replace(C=covariance))
    np.testing.assert_allclose(np.cov(np.asarray(genomes).T), 0.25 * covariance, atol=0.02)
    np.testing.assert_allclose(genomes.mean(axis=0), [1.0, 2.0, 3.0], atol=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cma-es", 4, 8, 0.5), "did you mean 'cma_es'"),
        (("gradient", 4, 8, 0.5), "known: cma_es"),
        (("cma_es", 4, 1, 0.5), "cma_es needs at least 2"),
        (("de", 4, 3, 0.5), "de needs at least 4"),
        (("bit_flip", 4, 0, 0.5), "population is 0"),
        (("snes", 4, 8, 0.0), "sigma0"),
        (("snes", 4, 8, float("nan")), "sigma0"),
        (("snes", 0, 8, 0.5), "no module to search"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(UserError, match=message):
        build(*arguments)


@pytest.mark.parametrize(("name", "population"), [("cma_es", 2), ("snes", 2), ("de", 4)])
def test_smallest_populations(name, population):
    result = search(build(name, SIZE, population, 1.0), 0, 6)
    assert np.isfinite(result.genomes).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.state) if x.ndim)
