"""Deltas apply and materialise alike, whatever the shapes and ranks."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from enmp_jax import merges
from enmp_jax.deltas import Dense, LowRank, member_axes, n_bytes, scale_delta
from enmp_jax.lora import stack_adapters


def test_apply_is_a_product_with_the_whole() -> None:
    rng = np.random.default_rng(0)
    left, core, right = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 3), (3, 2), (2, 4)))
    x = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    wide = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    for delta in (LowRank(left, core, right), LowRank(left, wide, None), Dense(left @ wide)):
        np.testing.assert_allclose(delta.apply(x), x @ delta.materialise().T, rtol=2e-5, atol=1e-5)
        np.testing.assert_allclose(
            scale_delta(delta, 2.0).materialise(), 2 * delta.materialise(), rtol=1e-6, atol=1e-6
        )
    assert LowRank(left, core, right).max_rank == 2
    assert n_bytes(LowRank(left, wide, None)) == 4 * (15 + 12)


def test_members_share_the_outer_factors() -> None:
    delta = LowRank(jnp.ones((5, 3)), jnp.ones((7, 3, 2)), jnp.ones((2, 4)))
    whole = jax.vmap(lambda d: d.materialise(), in_axes=(member_axes(delta),))(delta)
    assert whole.shape == (7, 5, 4)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 6), st.integers(1, 6), st.data())
def test_sum_of_any_shapes_and_ranks(ranks: list[int], out: int, inner: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(0)
    factors = {f"t{i}": (rng.normal(size=(r, inner)), rng.normal(size=(out, r))) for i, r in enumerate(ranks)}
    keep = np.array([data.draw(st.booleans()) for _ in ranks], float)
    stack = stack_adapters({t: {"x.0.q": f} for t, f in factors.items()})
    merge = merges.make("sum")
    (delta,) = merge.merge(merge.prepare(stack), jnp.asarray(keep[None]), 1.0).values()
    expected = sum(k * b @ a for k, (a, b) in zip(keep, factors.values()))
    np.testing.assert_allclose(delta.materialise()[0], expected, rtol=1e-5, atol=1e-5)
