"""The loop: one compilation, the same run from the same seed, resume, archive, memo."""

import functools
import gc
import logging
import subprocess
import sys
import weakref
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from enmp_jax.search.loop import Resume, Watch, make_step
from enmp_jax.search.loop import run as run_step
from enmp_jax.search.memo import Memo
from enmp_jax.search.strategies import build

SIZE = 12
MEAN = np.full(SIZE, -1.0, np.float32)


class Scores(NamedTuple):
    fitness: jax.Array
    extra: jax.Array


def evaluate(genomes, memory=()):
    return Scores(-jnp.sum((genomes - 0.3) ** 2, axis=-1), genomes[:, :2] * 2), memory


def run(strategy, score, key, mean, generations, generations_per_dispatch=1, **options):
    step = make_step(strategy, score, generations_per_dispatch)
    return run_step(step, key, mean, generations, **options)


@functools.cache
def strategy_of(name):
    return build(name, SIZE, 6, 0.5)  # one instance: compiled once for all tests


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, (a.genomes, a.scores), (b.genomes, b.scores))
    jax.tree.map(np.testing.assert_array_equal, a.state, b.state)


@pytest.mark.parametrize("name", ["cma_es", "snes", "de"])
def test_seed_and_dispatch(name):
    """Same seed, same run, bit for bit, however many generations a dispatch does; other seed, other run."""
    strategy = strategy_of(name)
    one = run(strategy, evaluate, jax.random.key(3), MEAN, 10)
    assert_same(one, run(strategy, evaluate, jax.random.key(3), MEAN, 10))
    # the last dispatch of 4 does 2
    assert_same(one, run(strategy, evaluate, jax.random.key(3), MEAN, 10, generations_per_dispatch=4))
    other = run(strategy, evaluate, jax.random.key(4), MEAN, 10)
    assert not np.array_equal(one.genomes, other.genomes)
    assert one.genomes.shape == (10, 6, SIZE)
    assert one.scores.extra.shape == (10, 6, 2)
    np.testing.assert_allclose(one.scores.fitness, evaluate(one.genomes)[0].fitness, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 4])
def test_compiles_once(size, caplog):
    traced = []

    def counted(genomes, memory):
        traced.append(genomes.shape)
        return evaluate(genomes, memory)

    strategy = build("cma_es", SIZE, 6, 0.5)
    with jax.log_compiles(), caplog.at_level(logging.DEBUG):
        run(strategy, counted, jax.random.key(0), MEAN, 10, generations_per_dispatch=size)
    assert traced == [(6, SIZE)]
    compiled = [r for r in caplog.messages if r.startswith("Finished XLA compilation of jit(advance)")]
    assert len(compiled) == 1


@pytest.mark.parametrize("name", ["cma_es", "snes", "de"])
def test_resumes_to_the_identical_trajectory(name, tmp_path):
    strategy = strategy_of(name)
    whole = run(strategy, evaluate, jax.random.key(1), MEAN, 9)
    manager = ocp.CheckpointManager(tmp_path)

    def save(done, state):
        if done == 4:
            manager.save(done, args=ocp.args.StandardSave(state))
            manager.wait_until_finished()

    first = run(strategy, evaluate, jax.random.key(1), MEAN, 4, watch=Watch(on_dispatch=save))
    like = jax.eval_shape(strategy.init, jax.random.key(0), jnp.asarray(MEAN))
    state = manager.restore(4, args=ocp.args.StandardRestore(like))
    manager.close()
    rest = run(strategy, evaluate, jax.random.key(1), MEAN, 9, resume=Resume(4, state))
    assert rest.generations == 9
    assert rest.start == 4
    np.testing.assert_array_equal(whole.genomes, np.concatenate([first.genomes, rest.genomes]))
    np.testing.assert_array_equal(whole.scores.fitness[4:], rest.scores.fitness)
    jax.tree.map(np.testing.assert_array_equal, whole.state, rest.state)
    # the given state was copied before its buffers were donated
    again = run(strategy, evaluate, jax.random.key(1), MEAN, 9, resume=Resume(4, state))
    assert_same(rest, again)


def test_searches_share_a_step(caplog):
    """Two searches, one compilation; a step keeps nothing alive that its caller has let go."""
    step = make_step(strategy_of("snes"), evaluate, 4)
    with jax.log_compiles(), caplog.at_level(logging.DEBUG):
        first, second = (run_step(step, jax.random.key(seed), MEAN, 6) for seed in (1, 2))
    assert sum("Finished XLA compilation of jit(advance)" in m for m in caplog.messages) <= 1
    assert not np.array_equal(first.genomes, second.genomes)

    class Heavy:
        """Stands for a base model that an evaluation closes over."""

    heavy = Heavy()
    gone = weakref.ref(heavy)
    step = make_step(strategy_of("snes"), lambda genomes, memory, heavy=heavy: evaluate(genomes, memory))
    del step, heavy
    gc.collect()
    assert gone() is None


def test_resume_at_the_end_does_nothing():
    strategy = strategy_of("snes")
    done = run(strategy, evaluate, jax.random.key(1), MEAN, 3)
    nothing = run(strategy, evaluate, jax.random.key(1), MEAN, 3, resume=Resume(3, done.state))
    assert nothing.genomes.shape == (0, 6, SIZE)
    assert nothing.scores.extra.shape == (0, 6, 2)
    jax.tree.map(np.testing.assert_array_equal, done.state, nothing.state)
    with pytest.raises(ValueError, match=r"generations 3\.\.2"):
        run(strategy, evaluate, jax.random.key(1), MEAN, 2, resume=Resume(3, done.state))


def test_operands_reach_the_evaluation():
    strategy = strategy_of("snes")
    shift = lambda genomes, memory, at: (Scores(-jnp.sum((genomes - at) ** 2, -1), genomes[:, :2]), memory)  # noqa: E731
    near = run(strategy, shift, jax.random.key(1), MEAN, 40, operands=(jnp.full(SIZE, -2.0),))
    assert near.genomes[-1].mean() == pytest.approx(-2.0, abs=0.2)
    same = run(strategy, shift, jax.random.key(1), MEAN, 1, operands=(jnp.full(SIZE, 5.0),))
    np.testing.assert_array_equal(same.genomes, near.genomes[:1])
    assert (same.scores.fitness < near.scores.fitness[0]).all()


def test_callbacks_see_every_generation_in_order():
    seen, dispatches = [], []
    result = run(
        strategy_of("snes"), evaluate, jax.random.key(0), MEAN, 7, generations_per_dispatch=4,
        watch=Watch(
            on_generation=lambda generation, genomes, scores: seen.append((generation, genomes, scores)),
            on_dispatch=lambda done, state: dispatches.append(done),
        ),
    )  # fmt: skip
    assert [generation for generation, *_ in seen] == list(range(7))
    assert dispatches == [4, 7]
    for generation, genomes, scores in seen:
        np.testing.assert_array_equal(genomes, result.genomes[generation])
        np.testing.assert_array_equal(scores.extra, result.scores.extra[generation])


SHARDED = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
import logging, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from enmp_jax.search.loop import make_step, run
from enmp_jax.search.strategies import build
import collections
Scores = collections.namedtuple("Scores", "fitness")
mesh = jax.make_mesh((4,), ("population",), axis_types=(AxisType.Auto,))
replicated = NamedSharding(mesh, P())
target = jax.device_put(jnp.full(12, 0.25), replicated)
def evaluate(genomes, memory, target):
    score = lambda g: -jnp.sum((g - target) ** 2, -1)
    members = P("population")
    fitness = jax.shard_map(score, mesh=mesh, in_specs=members, out_specs=members)(genomes)
    return Scores(jax.lax.with_sharding_constraint(fitness, replicated)), memory
compiled = []
class Handler(logging.Handler):
    def emit(self, record):
        compiled.append(record.getMessage())
logging.getLogger("jax").addHandler(Handler())
for name in ("cma_es",):
    with jax.log_compiles():
        result = run(make_step(build(name, 12, 8, 0.5), evaluate, 2, replicated), jax.random.key(0),
                     np.full(12, -1, np.float32), 6, operands=(target,))
    single = run(make_step(build(name, 12, 8, 0.5), lambda g, m: (Scores(-jnp.sum((g - 0.25) ** 2, -1)), m)),
                 jax.random.key(0), np.full(12, -1, np.float32), 6)
    np.testing.assert_allclose(result.genomes, single.genomes, atol=1e-5)
assert sum(m.startswith("Finished XLA compilation of jit(advance)") for m in compiled) == 1, compiled
print("fine")
"""


def test_on_a_mesh_of_four_devices():
    """Sharded evaluation: one compilation per search, and the members of one device."""
    command = [sys.executable, "-c", SHARDED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "fine", done.stderr[-2000:]


def test_memo_counts_distinct_masks_and_picks_finalists():
    memo = Memo()
    masks = np.ones((5, 2, 2), bool)
    masks[1, 0, 0] = masks[2, 0, 0] = False  # the same mask twice
    masks[3, 1] = False
    masks[4, 0] = False
    memo.add(masks, np.array([0.5, 0.7, 0.9, 0.8, 0.8]))
    assert (memo.evaluated, len(memo)) == (5, 4)
    best = memo.finalists(8)
    # 0.7 and 0.9 of one mask are two looks at one value; ties: fewer pruned, then the earlier
    assert [c.fitness for c in best] == pytest.approx([0.8, 0.8, 0.8, 0.5])
    assert [int((~c.keep).sum()) for c in best] == [1, 2, 2, 0]
    assert [c.order for c in best] == [1, 3, 4, 0]
    assert best[0].evaluations == 2
    assert len(memo.finalists(2)) == 2


def test_memo_tells_scales_apart_and_drops_nan():
    memo = Memo()
    masks = np.ones((4, 2, 2), bool)
    memo.add(masks, np.array([0.1, np.nan, 0.3, 0.2]), scale=np.array([0.5, 0.7, 0.9, 0.9]))
    assert len(memo) == 3
    assert [(c.scale, c.fitness) for c in memo.finalists(5)] == [(0.9, pytest.approx(0.25)), (0.5, 0.1)]
    memo.add(masks[:1], np.array([0.6]), scale=np.array([0.7]))
    assert memo.finalists(1)[0].fitness == 0.6
