"""What single merge methods promise beyond the contract and the oracles."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from enmp_jax import merges
from enmp_jax.errors import UserError
from enmp_jax.lora import stack_adapters

IN, OUT = 14, 10


def factors(seed, rank=3):
    random = np.random.default_rng(seed)
    return random.normal(size=(rank, IN)), random.normal(size=(OUT, rank))


def merged(adapters, method, keep=None, **given):
    """[layer, out, in] of one projection."""
    stack = stack_adapters(adapters)
    keep = np.ones((stack.n_layers, stack.n_tasks)) if keep is None else keep
    merge = merges.make(method, **given)
    (delta,) = merge.merge(merge.prepare(stack), jnp.asarray(keep), 1.0).values()
    return np.asarray(delta.materialise())


def close(x, y, tolerance=1e-5):
    assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)


def test_lego_gives_a_module_of_lower_rank_back_whole():
    """Ranks 3 and 6 in two layers of one projection, as a rank_pattern has it: each its own clusters."""
    small, large = factors(0, 3), factors(1, 6)
    found = merged({"a": {"enc.0.q": small, "enc.1.q": large}}, "lego")
    close(found[0], small[1] @ small[0])
    close(found[1], large[1] @ large[0])
    # a pruned task's rank does not count either
    found = merged({"a": {"enc.0.q": small}, "b": {"enc.0.q": large}}, "lego", np.array([[1, 0]]))
    close(found[0], small[1] @ small[0])
    # asked for six clusters, it keeps to them
    close(merged({"a": {"enc.0.q": small}}, "lego", clusters=6)[0], small[1] @ small[0])


def test_the_karcher_mean_of_two_is_their_slerp_midpoint():
    (a, b), (c, d) = factors(0), factors(1)
    x, y = b @ a, d @ c
    y, d = y * np.linalg.norm(x) / np.linalg.norm(y), d * np.linalg.norm(x) / np.linalg.norm(y)
    angle = np.arccos(np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y))
    expected = (x + y) * np.sin(angle / 2) / np.sin(angle)
    close(merged({"x": {"enc.0.q": (a, b)}, "y": {"enc.0.q": (c, d)}}, "karcher")[0], expected)


@pytest.mark.parametrize("method", ["karcher", "pico", "sce", "compress", "do_merging"])
def test_a_single_task_is_itself(method):
    given = {"compress": {"compressed_rank": 3}, "sce": {"density": 1.0}}.get(method, {})
    a, b = factors(0)
    close(merged({"x": {"enc.0.q": (a, b)}}, method, **given)[0], b @ a)


def test_pico_damps_what_all_share_and_keeps_the_mean_size():
    """One output direction used by all three tasks, and one of each task's own."""
    random = np.random.default_rng(0)
    shared, *own = np.linalg.qr(random.normal(size=(OUT, 4)))[0].T
    adapters, deltas = {}, []
    for i, direction in enumerate(own):
        a, b = random.normal(size=(2, IN)), np.stack([shared, direction], axis=1)
        adapters[f"t{i}"] = {"enc.0.q": (a, b)}
        deltas.append(b @ a)
    plain, calibrated = merged(adapters, "mean")[0], merged(adapters, "pico")[0]
    np.testing.assert_allclose(
        np.linalg.norm(calibrated), np.mean([np.linalg.norm(d) for d in deltas]), rtol=1e-5
    )
    # shares 3/6 and 1/6 of the energy: factors 1 / (1 + 2 / 2) and 1 / (1 + 2 / 6)
    ratio = [np.linalg.norm(u @ calibrated) / np.linalg.norm(u @ plain) for u in (shared, *own)]
    np.testing.assert_allclose(np.asarray(ratio[1:]) / ratio[0], 0.75 / 0.5, rtol=1e-4)


def test_do_merging_lets_no_task_drown_another():
    """Columns get the mean of the tasks' lengths, and both directions count alike, whatever the lengths."""
    (a, b), (c, d) = factors(0), factors(1)
    x, y = b @ a, d @ c
    tasks = {"x": {"enc.0.q": (a, b)}, "y": {"enc.0.q": (c, 100 * d)}}
    found = merged(tasks, "do_merging", orthogonal_steps=0)[0]
    lengths = (np.linalg.norm(x, axis=0) + 100 * np.linalg.norm(y, axis=0)) / 2
    close(found, lengths * (x / np.linalg.norm(x, axis=0) + y / np.linalg.norm(y, axis=0)))


def test_the_descent_of_do_merging_makes_factors_orthogonal_and_proximity_holds_them():
    """Of two tasks with equal rows of A, what is left in common; columns of B are orthogonal already."""
    shared = np.eye(IN)[0]
    tasks = {
        "x": {"enc.0.q": (np.stack([shared, np.eye(IN)[1]]), np.eye(OUT)[:, :2])},
        "y": {"enc.0.q": (np.stack([shared, np.eye(IN)[2]]), np.eye(OUT)[:, 2:4])},
    }
    size = [
        np.linalg.norm(merged(tasks, "do_merging", orthogonal_steps=steps, proximity=proximity)[0][:, 0])
        for steps, proximity in ((0, 0), (20, 0), (500, 0), (500, 10))
    ]
    np.testing.assert_allclose(size[0], np.sqrt(2), rtol=1e-6)  # two columns of length one
    assert size[2] < 0.5 * size[1] < 0.9 * 0.5 * size[0]  # shorter and shorter
    assert size[3] > 0.9 * size[0]


def test_compress_has_its_rank_and_leaves_low_ranks_alone():
    adapters = {f"t{i}": {"enc.0.q": factors(i)} for i in range(3)}
    s = np.linalg.svd(merged(adapters, "compress", compressed_rank=4)[0], compute_uv=False)
    assert s[3] > 0.1 and (s[4:] < 1e-5 * s[0]).all()
    close(merged(adapters, "compress", compressed_rank=9)[0], merged(adapters, "sum")[0])


def test_della_drops_small_entries_more_often_and_keeps_their_mean():
    row = np.linspace(1.0, 2.0, 400)[None]
    adapters = {"t": {"enc.0.q": (row, np.ones((2000, 1)))}}
    found = merged(adapters, "della", drop_rate=0.5, epsilon=0.3)[0]
    dropped = (found == 0).mean(axis=0)
    expected = 0.8 - 0.6 * np.arange(400) / 399
    assert np.abs(dropped - expected).max() < 0.06  # standard deviation 0.011, 400 draws
    np.testing.assert_allclose(found.mean(axis=0).mean(), row.mean(), rtol=0.01)
    np.testing.assert_array_equal(merged(adapters, "della", drop_rate=0.5, epsilon=0.3)[0], found)
    with pytest.raises(UserError, match="drop_rate - epsilon"):
        merges.make("della", drop_rate=0.1, epsilon=0.2)
    with pytest.raises(UserError, match="below 1"):
        merges.make("della", drop_rate=0.9, epsilon=0.1)


@pytest.mark.parametrize(("method", "space"), [("sum", "full"), ("ties", "full"), ("tsv", "knots")])
def test_layer_scaling_is_linear_from_the_first_layer_to_the_last(method, space):
    adapters = {f"t{i}": {f"enc.{layer}.q": factors(5 * i + layer) for layer in range(3)} for i in range(2)}
    plain = merged(adapters, method, space=space)
    scaled = merged(adapters, method, space=space, layer_scaling=(0.2, 1.0))
    np.testing.assert_allclose(scaled, plain * np.array([0.2, 0.6, 1.0])[:, None, None], rtol=1e-5, atol=1e-6)


def test_layer_scaling_by_one_factor_a_layer():
    adapters = {f"t{i}": {f"enc.{layer}.q": factors(5 * i + layer) for layer in range(3)} for i in range(2)}
    scaled = merged(adapters, "ties", layer_scaling=[0.2, 2.0, 0.5])
    expected = merged(adapters, "ties") * np.array([0.2, 2.0, 0.5])[:, None, None]
    np.testing.assert_allclose(scaled, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="one for each of the 3 layers, not 4"):
        merged(adapters, "ties", layer_scaling=[1, 1, 1, 1])


@pytest.mark.parametrize("bad", [(1.0,), (0.1, float("nan")), "ab", 0.5, (True, 1)])
def test_layer_scaling_that_is_no_pair_of_numbers(bad):
    with pytest.raises(UserError, match="layer_scaling must be two numbers"):
        merges.make("sum", layer_scaling=bad)
