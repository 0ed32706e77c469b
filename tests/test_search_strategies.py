"""Each strategy: contract, ties, NaN, progress on a toy, warm start, several at once, resume."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from enmp_jax.errors import UserError
from enmp_jax.masks import MaskSpec
from enmp_jax.search.loop import Resume, Watch, make_step, run
from enmp_jax.search.strategies import STRATEGIES, Space, build, several, start_mean

SIZE = 24
MEAN = np.full(SIZE, -1.0, np.float32)
TARGET = np.asarray(jax.random.bernoulli(jax.random.key(5), 0.4, (SIZE,)))
COUNT = int(TARGET.sum())


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
    return build(name, SIZE, 8, 1.0, max_count=COUNT)


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
        (("swap", 4, 8, 0.5), "4 of 4 modules"),
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


def test_swap_keeps_its_count_and_its_elite():
    strategy = build("swap", 41, 400, 0.5, threshold=0.3, free=1, max_count=7)
    state = strategy.init(jax.random.key(0), jnp.full(41, 2.0))
    other = strategy.init(jax.random.key(1), jnp.full(41, 2.0))
    parent = np.asarray(state.genome[:40] > 0.3)
    assert parent.sum() == 7
    assert not np.array_equal(parent, np.asarray(other.genome[:40] > 0.3))
    genomes, _ = jax.jit(strategy.ask)(jax.random.key(2), state)
    np.testing.assert_array_equal(genomes[0], state.genome)  # its own fitness must be known
    pruned = np.asarray(genomes[1:, :40] > 0.3)
    assert (pruned.sum(axis=1) == 7).all()
    exchanged = (pruned & ~parent).sum(axis=1)
    share = np.bincount(exchanged, minlength=4) / len(exchanged)
    np.testing.assert_allclose(share, [0, 5 / 9, 3 / 9, 1 / 9], atol=0.08)
    assert (pruned != parent).any(axis=0).all()  # every module takes part
    assert np.asarray(genomes[1:, 40]).std() == pytest.approx(0.5, abs=0.05)

    tell = jax.jit(strategy.tell)
    fitness = jnp.zeros(400).at[0].set(1.0)
    scored = tell(jax.random.key(3), genomes, fitness, state)
    np.testing.assert_array_equal(scored.genome, state.genome)
    again, _ = jax.jit(strategy.ask)(jax.random.key(4), scored)
    assert (np.asarray(again[0]) != np.asarray(scored.genome)).any()  # the elite is not scored twice
    kept = tell(jax.random.key(3), again, jnp.full(400, 0.5), scored)
    np.testing.assert_array_equal(kept.genome, scored.genome)
    equal = tell(jax.random.key(3), again, jnp.full(400, 0.5).at[9].set(1.0), scored)
    np.testing.assert_array_equal(equal.genome, again[9])


@pytest.mark.parametrize("count", [1, 23])
def test_swap_at_the_smallest_and_largest_count(count):
    result = search(build("swap", SIZE, 8, 1.0, max_count=count), 0, 10)
    assert ((result.genomes > 0).sum(axis=-1) == count).all()


EFFECTS = np.linspace(-2.0, 1.0, SIZE)[np.random.default_rng(0).permutation(SIZE)]


@pytest.mark.parametrize("name", ["cma_es", "sep_cma_es", "snes", "de", "random"])
def test_warm_start_of_distributions(name):
    strategy = build(name, SIZE + 1, 2000, 0.5, free=1, effects=EFFECTS)
    genomes, _ = jax.jit(lambda key: strategy.ask(key, strategy.init(key, jnp.full(SIZE + 1, -1.0))))(
        jax.random.key(0)
    )
    shift = 0.5 * (EFFECTS - EFFECTS.mean()) / EFFECTS.std()
    np.testing.assert_allclose(genomes.mean(axis=0), [*(-1.0 + shift), -1.0], atol=0.06)


@pytest.mark.parametrize(
    "effects", [np.full(4, 3.0), np.full(4, np.nan), np.asarray([0.0, 2.0, np.nan, np.inf])]
)
def test_effects_that_say_nothing_shift_nothing(effects):
    state = build("random", 4, 8, 0.5, effects=effects).init(jax.random.key(0), jnp.full(4, -1.0))
    known = np.isfinite(effects) & (effects != 3.0)
    np.testing.assert_allclose(state.mean, np.where(known, -1.0 + 0.5 * (effects - 1.0), -1.0))


@pytest.mark.parametrize(
    ("name", "max_count", "effects", "expected"),
    [
        ("bit_flip", 8, EFFECTS, np.argsort(-EFFECTS)[:4]),
        ("bit_flip", 24, EFFECTS, np.flatnonzero(EFFECTS > 0)),
        ("bit_flip", 1, EFFECTS, np.argsort(-EFFECTS)[:1]),
        ("bit_flip", 0, EFFECTS, []),
        ("bit_flip", 8, -np.abs(EFFECTS) - 1, []),
        ("swap", 8, EFFECTS, np.argsort(-EFFECTS)[:8]),
    ],
)
def test_warm_start_of_masks(name, max_count, effects, expected):
    strategy = build(name, SIZE + 1, 8, 0.5, threshold=0.2, free=1, max_count=max_count, effects=effects)
    genome = strategy.init(jax.random.key(0), jnp.full(SIZE + 1, 0.7)).genome
    assert np.flatnonzero(genome[:SIZE] > 0.2).tolist() == sorted(expected)
    assert genome[SIZE] == pytest.approx(0.7)


def test_effects_must_fit():
    with pytest.raises(ValueError, match="24 bits"):
        build("snes", SIZE, 8, 0.5, effects=EFFECTS[1:])


@pytest.mark.parametrize(("bits", "limit"), [(18, 0.2), (96, 1 / 3), (24, 1.0)])
def test_auto_start_prunes_half_of_what_may_be_pruned(bits, limit):
    spec = MaskSpec(1, ("p",), tuple(map(str, range(bits))), tuple(range(bits)), max_pruned=limit)
    space = Space(bits, 4000, 0.7, 0.25, 0, spec.max_count)
    mean = start_mean(space, "auto")
    genomes = space.gaussian(jax.random.key(0), jnp.full(bits, mean))
    above = np.asarray(genomes > 0.25).sum(axis=1).mean()
    assert above == pytest.approx(spec.max_count / 2, rel=0.05)
    assert start_mean(space, -1) == -1.0
    assert np.isfinite(start_mean(space._replace(max_count=0), "auto"))


@pytest.mark.parametrize("name", ["cma_es", "sep_cma_es", "snes", "random"])
def test_with_an_automatic_start_sigma_changes_no_mask(name):
    """As the reference of run files says of sigma0: the start moves along with it."""

    def agreement(sigma0, x0):
        space = Space(SIZE, 8, sigma0, 0.0, 0, COUNT, None)
        strategy = build(name, SIZE, 8, sigma0, max_count=COUNT)
        mean = np.full(SIZE, start_mean(space, x0), np.float32)
        step = make_step(strategy, evaluate, 60)
        found = run(step, jax.random.key(0), mean, 12, operands=(jnp.asarray(NO_TROUBLE),))
        return np.asarray(found.scores.fitness)

    np.testing.assert_array_equal(agreement(0.25, "auto"), agreement(1.0, "auto"))
    assert (agreement(0.25, -0.5) != agreement(1.0, -0.5)).any()


@pytest.mark.parametrize("name", ["cma_es", "snes", "bit_flip", "greedy"], indirect=True, scope="module")
def test_several_searches_at_once_are_the_separate_ones(name, strategy):
    keys = jax.random.split(jax.random.key(4), 3)
    together = several(strategy, 3)
    assert together.population == 24

    @jax.jit
    def generation(strategy_keys, state):
        genomes, state = together.ask(strategy_keys, state)
        fitness = evaluate(genomes, (), 0)[0].fitness
        return genomes, together.tell(strategy_keys, genomes, fitness, state)

    @jax.jit
    def alone(key, state):
        genomes, state = strategy.ask(key, state)
        return genomes, strategy.tell(key, genomes, evaluate(genomes, (), 0)[0].fitness, state)

    state = jax.jit(together.init)(keys, jnp.asarray(MEAN))
    states = [jax.jit(strategy.init)(key, jnp.asarray(MEAN)) for key in keys]
    for number in range(6):
        now = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        genomes, state = generation(now, state)
        for i in range(3):
            rows, states[i] = alone(now[i], states[i])
            if name == "cma_es":
                np.testing.assert_allclose(genomes[8 * i : 8 * i + 8], rows, atol=1e-4)
            else:
                np.testing.assert_array_equal(genomes[8 * i : 8 * i + 8], rows)


@pytest.mark.parametrize("name", ["swap", "greedy"], indirect=True, scope="module")
def test_resumes_to_the_identical_trajectory(strategy, tmp_path):
    whole = search(strategy, 1, 30)
    saved = tmp_path / "state"

    def save(done, state):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(saved, state)

    step, mode = STEPS[strategy], (jnp.asarray(NO_TROUBLE),)
    key = jax.random.key(1)
    run(step, key, MEAN, 3, operands=mode, watch=Watch(on_dispatch=save))  # greedy: within its sweep
    like = jax.eval_shape(strategy.init, key, jnp.asarray(MEAN))
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(saved, like)
    rest = run(step, key, MEAN, 30, operands=mode, resume=Resume(3, state))
    np.testing.assert_array_equal(whole.genomes[3:], rest.genomes)
    jax.tree.map(np.testing.assert_array_equal, whole.state, rest.state)
