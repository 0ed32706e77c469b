"""Polar factors and isotropic matrices in float32 against a float64 SVD; decompositions side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enmp_jax.merges.batching import one_by_one_differentiable
from enmp_jax.merges.linalg import polar_by_products, polar_if_easy, qr, svd
from enmp_jax.merges.spectral import isotropic, isotropic_product, polar
from enmp_jax.merges.thresholds import threshold_of_largest

SIDE = 24


def matrix_of(singular: np.ndarray, rows: int = SIDE) -> np.ndarray:
    rng = np.random.default_rng(len(singular))
    u = np.linalg.qr(rng.normal(size=(rows, SIDE)))[0]
    v = np.linalg.qr(rng.normal(size=(SIDE, SIDE)))[0]
    singular = np.concatenate([singular, np.zeros(SIDE - len(singular))])
    return ((u * singular) @ v.T).astype(np.float32)


def exact(matrix: np.ndarray, cut: float) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return u[:, s > cut] @ vt[s > cut]


# name -> singular values, cut, tolerance (relative error of the polar factor)
SPECTRA = {
    "well conditioned": (np.linspace(0.5, 1.5, SIDE), 5e-5, 2e-6),
    "rank deficient": (np.linspace(0.2, 1, 9), 5e-5, 3e-6),
    "condition 1000": (np.geomspace(1, 1e-3, SIDE), 5e-5, 1e-5),
    "gap around the cut": (np.r_[np.linspace(0.1, 1, 9), np.full(10, 1e-5)], 5e-5, 3e-6),
    "one direction": (np.ones(1), 5e-5, 2e-6),
    "large": (50 * np.linspace(0.5, 1.5, SIDE), 5e-5, 2e-6),
    "small": (np.linspace(1e-3, 2e-3, SIDE), 5e-5, 2e-6),
    "all below the cut": (np.full(SIDE, 1e-5), 5e-5, 0.0),
}
polar_on_cpu = jax.jit(lambda x, cut: polar(x, cut))  # noqa: PLW0108
POLAR = {"svd": polar_on_cpu, "products": jax.jit(polar_by_products)}


@pytest.mark.parametrize("way", POLAR)
@pytest.mark.parametrize("name", SPECTRA)
def test_polar_factors_under_a_cut(way: str, name: str) -> None:
    singular, cut, tolerance = SPECTRA[name]
    matrix = matrix_of(singular)
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(POLAR[way](jnp.asarray(matrix), cut), np.float64)
    expected = exact(matrix, cut)
    assert np.linalg.norm(ours - expected) <= tolerance * np.linalg.norm(expected) + 1e-6


@pytest.mark.parametrize("way", POLAR)
def test_pruned_directions_stay_exactly_zero(way: str) -> None:
    matrix = matrix_of(np.linspace(0.5, 1.5, SIDE))
    matrix[:, 3:9] = 0
    ours = np.asarray(POLAR[way](jnp.asarray(matrix), 5e-5))
    np.testing.assert_allclose(ours, exact(matrix, 5e-5), atol=2e-6)
    assert np.abs(ours[:, 3:9]).max() < (1e-6 if way == "svd" else 1e-30)
    assert not np.asarray(POLAR[way](jnp.zeros((SIDE, SIDE)), 5e-5)).any()


EASY = {
    "well conditioned": (np.linspace(0.5, 1.5, SIDE), True),
    "rank deficient": (np.linspace(0.5, 1, 9), True),
    "rounding below": (np.r_[np.linspace(0.5, 1, 9), np.full(4, 1e-8)], True),
    "zero": (np.zeros(1), True),
    "one direction": (np.ones(1), True),
    "huge": (1e12 * np.linspace(0.5, 1.5, SIDE), True),
    "condition 1000": (np.geomspace(1, 1e-3, SIDE), False),
    "one small": (np.r_[np.linspace(0.5, 1, 9), 1e-4], False),
}


@pytest.mark.parametrize("rows", [SIDE, 2 * SIDE])
@pytest.mark.parametrize("name", EASY)
def test_polar_factors_by_few_products(name: str, rows: int) -> None:
    """It says yes only when it is right, and no where the SVD is needed."""
    singular, expected = EASY[name]
    matrix = matrix_of(singular, rows)
    factor, easy = jax.jit(polar_if_easy)(jnp.asarray(matrix))
    assert bool(easy) == expected
    wanted = exact(matrix, 1e-6 * max(singular[0], 1e-30))
    if easy:
        np.testing.assert_allclose(factor, wanted, atol=2e-6)
    # float32 knows the direction of a singular value of 1e-4 to about 1e-3
    np.testing.assert_allclose(jax.jit(polar)(jnp.asarray(matrix)), wanted, atol=2e-6 if easy else 5e-4)


def test_few_products_turn_no_sign_round() -> None:
    """All columns alike: the largest singular value is as far above the typical one as can be."""
    matrix = np.full((SIDE, SIDE), 1.0, np.float32) + matrix_of(np.full(SIDE, 3.0))
    factor, easy = polar_if_easy(jnp.asarray(matrix))
    assert not easy or np.abs(np.asarray(factor) - exact(matrix, 0)).max() < 2e-6
    np.testing.assert_allclose(polar(jnp.asarray(matrix)), exact(matrix, 0), atol=5e-6)


@pytest.mark.parametrize("kind", ["independent", "pruned", "dependent", "nothing"])
def test_isotropic_products(kind: str) -> None:
    """The shortcut for independent columns gives what the decomposition of the product gives."""
    u, v = matrix_of(np.linspace(0.5, 1.5, SIDE), 30), matrix_of(np.linspace(0.7, 1, SIDE), 40)
    s = np.linspace(0.5, 2, SIDE).astype(np.float32)
    s[4] = 1e-5  # below the cut of isotropic
    if kind == "pruned":
        s[8:16], u[:, 8:16], v[:, 8:16] = 0, 0, 0
    if kind == "dependent":
        u[:, :3], v[:, 5] = u[:, 3:6], v[:, 6]
    if kind == "nothing":
        s, u, v = 0 * s, 0 * u, 0 * v
    product = (exact(u, 1e-6) * s) @ exact(v, 1e-6).T
    size = np.linalg.svd(product, compute_uv=False)
    expected = exact(product, 5e-5) * (size[size > 5e-5].mean() if kind != "nothing" else 0)
    ours = jax.jit(isotropic_product)(*map(jnp.asarray, (u, s, v)))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_isotropic_matrices() -> None:
    singular = np.r_[np.linspace(0.1, 1, 9), np.full(10, 1e-5)]
    matrix = matrix_of(singular)
    expected = exact(matrix, 5e-5) * singular[:9].mean()
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(isotropic(jnp.asarray(matrix)), expected, atol=2e-6)


def test_batches_side_by_side_are_the_matrices_one_by_one() -> None:
    """Batched LAPACK calls next to each other hung on two cores; nested vmaps must come out right, too."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 4, 40, SIDE)), jnp.float32)
    nested = jax.vmap(jax.vmap(lambda m: (svd(m)[1], qr(m)[0])))

    @jax.jit
    def side_by_side(x):
        return nested(x[0]), nested(x[1])

    for i, (s, q) in enumerate(side_by_side(x)):
        np.testing.assert_allclose(s, np.linalg.svd(np.asarray(x[i]), compute_uv=False), rtol=1e-5)
        gram = np.swapaxes(q, -1, -2) @ np.asarray(q)
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(SIDE), gram.shape), atol=1e-6)


@pytest.mark.parametrize("batch", ["none", "first", "both"])
def test_derivatives_pass_through_loops_over_members(batch: str) -> None:
    """Values, gradients and jvps are those of the plain function, whatever is batched."""

    def plain(x, y):
        return {"a": jnp.sin(x) @ y, "b": (x * y.T).sum()}

    looped = one_by_one_differentiable(plain)
    rng = np.random.default_rng(0)
    x, y = (
        jnp.asarray(rng.normal(size=(3, 4, 5)[batch == "none" :]), jnp.float32),
        rng.normal(size=(3, 5, 4)),
    )
    y = jnp.asarray(y if batch == "both" else y[0], jnp.float32)
    axes = {"none": None, "first": (0, None), "both": (0, 0)}[batch]

    def total(function):
        mapped = jax.vmap(function, axes) if axes else function
        return lambda x, y: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(mapped(x, y)))

    for transform in (jax.grad, lambda f: jax.grad(f, argnums=1), lambda f: f):
        ours, theirs = (jax.jit(transform(total(f)))(x, y) for f in (looped, plain))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_no_batched_lapack_call_on_cpus() -> None:
    """What cannot hang: every decomposition in the compiled program is of a single matrix."""
    x = jnp.zeros((5, SIDE, SIDE))
    text = jax.jit(jax.vmap(lambda m: (svd(m), qr(m)))).lower(x).compile().as_text()
    calls = [line for line in text.splitlines() if "custom-call(" in line and "lapack" in line]
    assert calls
    assert not [line for line in calls if f"f32[5,{SIDE},{SIDE}]" in line]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_thresholds_by_counting(dtype: type) -> None:
    x = np.abs(np.random.default_rng(0).normal(size=(30, 20))).astype(dtype)
    x[3] = 0
    x[4] = x[5]
    ordered = np.sort(x.ravel())[::-1]
    with jax.enable_x64(dtype == np.float64):
        find = jax.jit(threshold_of_largest)
        for count in (1, 2, 77, 300, 579, 580):
            threshold = float(find(jnp.asarray(x), count))
            assert (x > threshold).sum() == (x >= ordered[count - 1]).sum()
        assert float(find(jnp.asarray(x), 581)) == -1  # there are only 580 positive entries
        assert float(find(jnp.zeros((4, 4), dtype), 2)) == -1
