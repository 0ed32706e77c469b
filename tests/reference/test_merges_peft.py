"""Merges against PEFT's ``add_weighted_adapter`` where it is right: ``cat``, ``*_svd``, no rsLoRA."""

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch

from enmp_jax import merges
from enmp_jax.lora import stack_adapters
from enmp_jax.merges.base import _keys
from enmp_jax.merges.dare import random_drop

pytestmark = pytest.mark.reference

OUT, IN, RANKS, ALPHA = 12, 16, (3, 2, 4), 5
TEMPLATE = "layers.{}.q_proj"


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(IN, OUT, bias=False)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(), Layer()])


@pytest.fixture
def both():
    """Three PEFT adapters, and the same as a stack."""
    torch.manual_seed(0)
    model, adapters = Model(), {}
    for i, r in enumerate(RANKS):
        config = peft.LoraConfig(r=r, lora_alpha=ALPHA, target_modules=["q_proj"], init_lora_weights=False)
        if i == 0:
            model = peft.get_peft_model(model, config, adapter_name="t0")
        else:
            model.add_adapter(f"t{i}", config)
        adapters[f"t{i}"] = {
            TEMPLATE.format(layer): (
                module.q_proj.lora_A[f"t{i}"].weight.detach().numpy(),
                module.q_proj.lora_B[f"t{i}"].weight.detach().numpy() * ALPHA / r,
            )
            for layer, module in enumerate(model.base_model.model.layers)
        }
    return model, stack_adapters(adapters)


def theirs(model, weights, combination, **options) -> np.ndarray:
    names = [f"t{i}" for i in range(len(RANKS))]
    if combination != "cat":
        options["svd_rank"] = min(OUT, IN)  # full rank: nothing is cut off
    model.add_weighted_adapter(names, weights, "merged", combination_type=combination, **options)
    layers = model.base_model.model.layers
    return np.stack([x.q_proj.get_delta_weight("merged").detach().numpy() for x in layers])


def ours(stack, method, **hyper) -> np.ndarray:
    merge = merges.make(method, **hyper)
    (delta,) = merge.merge(merge.prepare(stack), jnp.ones((2, len(RANKS))), 1.0).values()
    return np.asarray(delta.materialise())


def close(x: np.ndarray, y: np.ndarray) -> None:
    assert np.linalg.norm(y) > 0.1
    assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y)


def test_cat_is_the_weighted_sum(both) -> None:
    model, stack = both
    weights = (0.5, 1.5, 2.0)
    close(ours(stack, "sum", task_weights=weights), theirs(model, list(weights), "cat"))


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_ties_svd(both, density: float) -> None:
    """PEFT keeps ``int(density * d)`` entries, we and the ENMP reference one more."""
    model, stack = both
    kept = int(density * OUT * IN)
    expected = theirs(model, [1.0] * len(RANKS), "ties_svd", density=density)
    close(ours(stack, "ties", density=(kept - 0.5) / (OUT * IN)), expected)


@pytest.mark.parametrize(
    ("combination", "method"), [("dare_linear_svd", "dare"), ("dare_ties_svd", "dare_ties")]
)
def test_dare_svd_with_the_same_draws(both, combination: str, method: str, monkeypatch) -> None:
    model, stack = both
    drop = random_drop(0.4)
    keys = _keys(0, stack, TEMPLATE)
    ones = jnp.ones((len(RANKS), OUT, IN))
    draws = iter(
        torch.from_numpy(np.asarray(drawn > 0, np.float32))
        for layer in range(2)
        for drawn in drop(ones, keys[layer], 0)
    )
    monkeypatch.setattr(torch, "bernoulli", lambda *_, **__: next(draws))
    expected = theirs(model, [1.0] * len(RANKS), combination, density=0.6)
    hyper = {"density": 1.0} if method == "dare_ties" else {}
    close(ours(stack, method, drop_rate=0.4, **hyper), expected)
