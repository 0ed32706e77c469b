"""One contract for every merge method in every space."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enmp_jax import merges
from enmp_jax.deltas import member_axes
from enmp_jax.lora import LoraStack, stack_adapters
from enmp_jax.merges.hyperparameters import hyperparameters

LAYERS, OUT, IN = 2, 10, 14
RANKS = (3, 2, 3)  # mixed: task 1 is padded
TASKS = ("cars", "dtd", "rte")
HYPER = {"density": 0.4, "drop_rate": 0.3, "rank_fraction": 0.1, "gamma": 0.05, "compressed_rank": 3}
PAIRS = [(m, s) for m in merges.METHODS for s in merges.SPACES if (m, s) not in merges.REFUSED]
KEEPS = np.array([[[1, 1, 1], [1, 1, 1]], [[1, 0, 1], [0, 0, 0]], [[0, 1, 0], [1, 1, 0]]], np.float32)


def adapters(seed: int = 0, scale: float = 1.0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        task: {
            f"enc.{layer}.attn.{p}": (rng.normal(size=(r, IN)), scale * rng.normal(size=(OUT, r)))
            for layer in range(LAYERS)
            for p in ("q_proj",)
        }
        for task, r in zip(TASKS, RANKS)
    }


def hyper(method: str) -> dict:
    return {k: v for k, v in HYPER.items() if k in hyperparameters(merges.METHODS[method])}


@functools.cache
def built(method: str, space: str, isotropize: bool = False) -> tuple:
    merge = merges.make(method, space, isotropize, **hyper(method))
    return merge, jax.jit(merge.merge), jax.jit(lambda i, k, s: merges.merge_population(merge, i, k, s))


def run(method: str, space: str, stack: LoraStack, keep, scale: float = 1.0) -> np.ndarray:
    merge, jitted, _ = built(method, space)
    (delta,) = jitted(merge.prepare(stack), jnp.asarray(keep, jnp.float32), jnp.float32(scale)).values()
    return np.asarray(delta.materialise())


def close(x, y, tolerance: float = 2e-4) -> None:
    assert np.isfinite(x).all() and np.isfinite(y).all()
    assert np.linalg.norm(x - y) <= tolerance * max(np.linalg.norm(y), 1e-3)


@pytest.mark.parametrize(("method", "space"), PAIRS)
def test_contract(method: str, space: str) -> None:
    stack = stack_adapters(adapters())
    merge, jitted, population = built(method, space)
    ingredients = merge.prepare(stack)
    whole = run(method, space, stack, KEEPS[0])
    assert np.linalg.norm(whole) > 0

    # members of a population are the masks one by one; another mask or scale compiles nothing
    together = population(ingredients, jnp.asarray(KEEPS), jnp.array([1.0, 0.5, 2.0]))
    (delta,) = together.values()
    many = np.asarray(jax.vmap(lambda d: d.materialise(), (member_axes(delta),))(delta))
    for i, (keep, scale) in enumerate(zip(KEEPS, (1.0, 0.5, 2.0))):
        close(many[i], run(method, space, stack, keep, scale))
    assert jitted._cache_size() == 1

    # a layer with nothing left adds nothing
    assert not many[1][1].any()

    # pruned is the same as absent; the other layer keeps what it had
    absent = adapters()
    del absent["dtd"]["enc.0.attn.q_proj"]
    keep = np.array([[1, 0, 1], [1, 1, 1]])
    masked = run(method, space, stack, keep)
    close(run(method, space, stack_adapters(absent), KEEPS[0]), masked)
    close(masked[1], whole[1])

    # the order of tasks does not matter, and all deltas times alpha give alpha times the merge
    close(run(method, space, stack.select([2, 0, 1]), KEEPS[0]), whole)
    close(run(method, space, stack_adapters(adapters(scale=2.0)), KEEPS[0]), 2 * whole)

    # gradients with respect to a relaxed mask are finite, at the corners too
    def size(keep, ingredients) -> jax.Array:
        (delta,) = merge.merge(ingredients, keep, 1.0).values()
        return jnp.sum(delta.materialise() ** 2)

    gradient = jax.jit(jax.grad(size))
    for keep in (*KEEPS, np.full((LAYERS, 3), 0.6, np.float32)):
        assert np.isfinite(gradient(jnp.asarray(keep), ingredients)).all()

    degenerate_adapters_give_finite_deltas(method, space)  # here, to share what is compiled


def degenerate_adapters_give_finite_deltas(method: str, space: str) -> None:
    """Zero, duplicate, opposite and rank-deficient adapters, and a single task (KEEPS[2])."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(3, IN)), rng.normal(size=(OUT, 3))
    deficient = np.stack([a[0], a[0], a[1]])
    for factors in (
        [(0 * a, b), (a, b), (a, b)],
        [(a, b), (a, -b), (deficient, b)],
        [(0 * a, 0 * b)] * 3,
    ):
        stack = stack_adapters(
            {t: {f"enc.{i}.attn.q_proj": f for i in range(LAYERS)} for t, f in zip(TASKS, factors)}
        )
        for keep in (KEEPS[0], KEEPS[2]):
            assert np.isfinite(run(method, space, stack, keep)).all()


def test_a_single_task_is_itself() -> None:
    task = {"cars": adapters()["cars"]}
    stack = stack_adapters(task)
    expected = np.stack([b @ a for a, b in task["cars"].values()])
    for method in ("sum", "mean", "tsv", "lego"):
        close(run(method, "full", stack, np.ones((LAYERS, 1))), expected, 1e-5)


@pytest.mark.parametrize("method", ["sum", "mean", "tsv", "iso", "iso_cts"])
def test_spaces_that_coincide(method: str) -> None:
    stack = stack_adapters(adapters())
    for keep in KEEPS:
        close(run(method, "core", stack, keep), run(method, "full", stack, keep), 1e-5)


def test_projection_masks_and_task_weights() -> None:
    stack = stack_adapters(adapters())
    keep = np.array([[1, 0, 1], [1, 1, 0]], np.float32)
    close(run("ties", "full", stack, keep[:, None]), run("ties", "full", stack, keep), 1e-6)
    merge = merges.make("sum", task_weights=(1.0, 0.5, -2.0))
    (delta,) = merge.merge(merge.prepare(stack), jnp.ones((LAYERS, 3)), 1.0).values()
    close(np.asarray(delta.materialise()), run("sum", "full", stack, np.tile([1, 0.5, -2.0], (2, 1))), 1e-6)


def test_full_space_ties_in_blocks_is_ties(monkeypatch) -> None:
    """Row blocks that do not divide the rows change nothing."""
    stack = stack_adapters(adapters())
    expected = run("ties", "full", stack, KEEPS[0])
    monkeypatch.setattr("enmp_jax.merges.entrywise._BLOCK", 3 * IN * 3)
    merge = merges.make("ties", density=0.4)
    (delta,) = merge.merge(merge.prepare(stack), jnp.asarray(KEEPS[0]), 1.0).values()
    np.testing.assert_array_equal(np.asarray(delta.materialise()), expected)


def test_dare_drops_its_share_and_repeats() -> None:
    stack = stack_adapters({"cars": {"enc.0.q_proj": (np.ones((1, 400)), np.ones((300, 1)))}})
    weights = []
    for seed in (0, 0, 1):
        merge = merges.make("dare", drop_rate=0.75, seed=seed)
        (delta,) = merge.merge(merge.prepare(stack), jnp.ones((1, 1)), 1.0).values()
        weights.append(np.asarray(delta.materialise()))
    assert set(np.unique(weights[0])) == {0.0, 4.0}
    assert abs((weights[0] > 0).mean() - 0.25) < 0.01  # standard deviation 0.00125
    np.testing.assert_array_equal(weights[0], weights[1])
    assert (weights[0] != weights[2]).mean() > 0.3


def test_breadcrumbs_keeps_the_middle() -> None:
    row = np.arange(1.0, 101.0)[None]
    stack = stack_adapters({"cars": {"enc.0.q_proj": (row, np.ones((1, 1)))}})
    merge = merges.make("breadcrumbs", density=0.2, gamma=0.1)
    (delta,) = merge.merge(merge.prepare(stack), jnp.ones((1, 1)), 1.0).values()
    expected = np.where((row > 70) & (row <= 90), row, 0)
    np.testing.assert_array_equal(np.asarray(delta.materialise())[0], expected)


def test_lego_averages_what_is_alike() -> None:
    """Two tasks with the same two units, two clusters: the units once, norms kept."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, IN)), rng.normal(size=(OUT, 2))
    stack = stack_adapters({"x": {"enc.0.q_proj": (a, b)}, "y": {"enc.0.q_proj": (a[::-1], b[:, ::-1])}})
    merge = merges.make("lego", clusters=2)
    (delta,) = merge.merge(merge.prepare(stack), jnp.ones((1, 2)), 1.0).values()
    close(np.asarray(delta.materialise())[0], b @ a, 1e-5)


def test_iso_cts_is_isotropic() -> None:
    stack = stack_adapters(adapters())
    s = np.linalg.svd(run("iso_cts", "full", stack, KEEPS[0])[0], compute_uv=False)
    assert s[0] > 0 and ((s < 1e-4 * s[0]) | (np.abs(s - s[0]) < 1e-4 * s[0])).all()
