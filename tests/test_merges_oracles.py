"""Every method in every space against the papers in plain numpy, float64, whatever the shapes and ranks."""

import jax
import jax.numpy as jnp
import merge_oracles
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enmp_jax import merges
from enmp_jax.deltas import member_axes
from enmp_jax.lora import LoraStack, stack_adapters
from enmp_jax.merges.base import _keys
from enmp_jax.merges.dare import random_drop, random_rows
from enmp_jax.merges.hyperparameters import hyperparameters

HYPER = {
    "density": 0.4,
    "drop_rate": 0.3,
    "rank_fraction": 0.1,
    "coefficient": 0.3,
    "gamma": 0.05,
    "common_fraction": 0.6,
    "clusters": 2,
    "epsilon": 0.2,
    "compressed_rank": 2,
    "orthogonal_steps": 4,
    "proximity": 0.3,
}
TOLERANCE = 1e-9
NAME = "enc.{}.q_proj"


def random_stack(ranks: list[int], out: int, inner: int, layers: int = 1, seed: int = 0) -> LoraStack:
    rng = np.random.default_rng(seed)
    adapters = {
        f"t{i}": {
            NAME.format(layer): (rng.normal(size=(r, inner)), rng.normal(size=(out, r)))
            for layer in range(layers)
        }
        for i, r in enumerate(ranks)
    }
    return stack_adapters(adapters, dtype=jnp.float64)


def hyper(method: str) -> dict:
    return {k: v for k, v in HYPER.items() if k in hyperparameters(merges.METHODS[method])}


def ours(stack: LoraStack, pairs: list[tuple[str, bool]], method: str, keeps: np.ndarray) -> list[np.ndarray]:
    """[member, layer, out, in] for each (space, isotropize)."""

    @jax.jit
    def every(stack, keeps):
        found = []
        for space, isotropize in pairs:
            merge = merges.make(method, space, isotropize, **hyper(method))
            scales = jnp.ones(keeps.shape[0])
            (delta,) = merges.merge_population(merge, merge.prepare(stack), keeps, scales).values()
            found.append(jax.vmap(lambda d: d.materialise(), (member_axes(delta),))(delta))
        return found

    return [np.asarray(x) for x in every(stack, jnp.asarray(keeps, jnp.float64))]


@jax.jit
def drawn(keys, ones):
    return random_drop(HYPER["drop_rate"])(ones, keys, 0), random_rows(ones.shape, keys, 0)


def oracle(
    stack: LoraStack, keep: np.ndarray, layer: int, method: str, space: str, isotropize: bool
) -> np.ndarray:
    pair = stack.pairs[NAME]
    kept = [i for i in range(stack.n_tasks) if keep[layer, i] and pair.rank[layer][i]]
    tasks = [(pair.a[layer, i, : (r := pair.rank[layer][i])], pair.b[layer, i, :, :r]) for i in kept]
    if not tasks:
        return np.zeros(pair.shape)

    def drops(shape: tuple[int, int], uniform: bool = False) -> np.ndarray:
        # rows have keys of their own, and a shorter row is the beginning of a longer one
        dropped, bits = drawn(_keys(0, stack, NAME)[layer], jnp.ones((stack.n_tasks, 14, 14)))
        whole = np.asarray(bits) / 2**32 if uniform else np.asarray(dropped) > 0
        return whole[kept, : shape[0], : shape[1]]

    return merge_oracles.merged(tasks, method, space, isotropize, drops, **hyper(method))


def check(stack: LoraStack, pairs: list[tuple[str, bool]], method: str, keeps: np.ndarray) -> None:
    for (space, isotropize), whole in zip(pairs, ours(stack, pairs, method, keeps)):
        for keep, member in zip(keeps, whole):
            for layer, delta in enumerate(member):
                expected = oracle(stack, keep, layer, method, space, isotropize)
                error = np.linalg.norm(delta - expected)
                assert error <= TOLERANCE * np.linalg.norm(expected), (method, space, isotropize, keep, error)


def spaces_of(method: str) -> list[str]:
    return [space for space in merges.SPACES if (method, space) not in merges.REFUSED]


@pytest.mark.parametrize("method", merges.METHODS)
def test_masks_and_mixed_ranks(method: str) -> None:
    keeps = np.array([[[1, 1, 1], [1, 1, 1]], [[1, 0, 1], [0, 0, 0]], [[0, 1, 0], [1, 1, 0]]])
    with jax.enable_x64(True):
        stack = random_stack([3, 2, 3], 10, 14, layers=2)
        pairs = [(space, False) for space in spaces_of(method)]
        if method in ("ties", "tsv"):
            pairs.append((spaces_of(method)[-1], True))
        check(stack, pairs, method, keeps)


@pytest.mark.parametrize("method", merges.METHODS)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shapes_and_ranks(method: str, data: st.DataObject) -> None:
    out, inner = data.draw(st.integers(3, 9)), data.draw(st.integers(3, 9))
    ranks = data.draw(st.lists(st.integers(2, 3), min_size=1, max_size=4))
    space = data.draw(st.sampled_from(spaces_of(method)))
    keeps = np.array([[[data.draw(st.booleans()) for _ in ranks]], [[True] * len(ranks)]])
    with jax.enable_x64(True):
        check(random_stack(ranks, out, inner, seed=len(ranks)), [(space, False)], method, keeps)
