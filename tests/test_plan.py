# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
"""The cost model against what XLA says, and what follows from it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_problem import TASKS, VIT, make_inputs

from enmp_jax import models
from enmp_jax.cli.main import main
from enmp_jax.devices.flops import count_flops
from enmp_jax.evaluation import budget
from enmp_jax.evaluation.population import make_evaluate
from enmp_jax.runs.plan import make_plan


def test_flops_of_loops_and_products_are_counted_by_hand():
    def f(x, w):
        def body(h, _):
            return jnp.tanh(h @ w), None

        h, _ = jax.lax.scan(body, x, None, length=7)
        return jax.lax.cond(h[0, 0] > 0, lambda a: a @ w @ w, lambda a: a, h)

    x, w = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((5, 5), jnp.float32)
    assert count_flops(f, x, w) == (7 + 2) * 2 * 3 * 5 * 5
    image, kernel = (
        jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32),
        jax.ShapeDtypeStruct((4, 4, 3, 6), jnp.float32),
    )

    def patches(a, k):
        return jax.lax.conv_general_dilated(a, k, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert count_flops(patches, image, kernel) == 2 * (2 * 2 * 2 * 6) * (4 * 4 * 3)
    many = jax.ShapeDtypeStruct((4, 3, 5), jnp.float32)
    assert count_flops(jax.jit(jax.vmap(f, in_axes=(0, None))), many, w) == 4 * (7 + 2) * 2 * 3 * 5 * 5


def test_flops_of_a_backbone_are_those_of_its_weights():
    """All layers in full but the last, which computes queries, output and MLP for one token."""
    backbone = models.build(VIT)
    params = jax.eval_shape(backbone.init, jax.random.key(0))
    inputs = {"image": jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.uint8)}
    width, hidden, tokens, patches = 16, 32, 5, 4
    full = 2 * tokens * (4 * width**2 + 2 * width * hidden) + 2 * 2 * tokens**2 * width
    last = 2 * tokens * 2 * width**2 + 2 * (2 * width**2 + 2 * width * hidden) + 2 * 2 * tokens * width
    embedding = 2 * patches * 16 * width
    assert count_flops(backbone.features, params, inputs) == full + last + embedding


@pytest.mark.parametrize("method", ["mean", "ties"])
def test_memory_of_a_member_is_what_xla_reserves(method):
    """Temporaries of 5 members less those of 1, per member: predicted, rather too many than too few."""
    config = VIT | {"hidden_size": 64, "intermediate_size": 256, "image_size": 32, "num_attention_heads": 4}
    backbone, merge, _, inputs = make_inputs(method, config=config, size=32)

    def temp(n):
        keep, scale = jnp.ones((n, 2, len(TASKS)), bool), jnp.ones(n)
        compiled = jax.jit(make_evaluate(backbone, merge, len(TASKS))).lower(inputs, keep, scale).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    measured = (temp(5) - temp(1)) / 4
    own, dense = budget.delta_bytes(merge, inputs.ingredients, (2, len(TASKS)))
    assert dense == (method == "ties")
    predicted = own + budget.largest_activations(backbone, inputs.batches)
    assert measured * 0.7 < predicted < measured * 3, (measured, predicted)


def test_chunks_fit_the_memory():
    gib = 2**30
    assert budget.choose_member_chunk(16, 0, 1, gib, "gpu") == 4  # a quarter: known masks go by chunks
    assert budget.choose_member_chunk(64, gib // 2, gib // 2, 10 * gib, "gpu") == 10
    assert budget.choose_member_chunk(64, 0, gib, gib // 2, "gpu") == 1  # never none
    assert budget.choose_member_chunk(64, 0, 1, gib, "cpu") == 4
    assert budget.choose_member_chunk(2, 0, 1, gib, "cpu") == 2
    assert budget.choose_member_chunk(64, 0, budget.CACHED // 3, 9 * gib, "cpu") == 3  # what its caches bear
    assert budget.choose_member_chunk(64, 0, 2 * budget.CACHED, 9 * gib, "cpu") == 1


def test_the_base_is_divided_when_it_must_be():
    llama = models.build({"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
                          "num_key_value_heads": 8, "vocab_size": 128256}, "bfloat16")  # fmt: skip
    gib = 2**30  # 15 GiB of weights
    assert budget.smallest_model_axis(llama, 8, 80 * gib) == 1
    assert budget.smallest_model_axis(llama, 8, 16 * gib) == 2
    assert budget.smallest_model_axis(llama, 8, 8 * gib) == 4
    assert budget.smallest_model_axis(llama, 6, 8 * gib) == 6
    assert budget.smallest_model_axis(llama, 8, gib) == 8  # does not fit; the plan says so


def test_the_plan_of_the_demo(demo_evaluator):
    made = make_plan(demo_evaluator, rate=1e12)
    inputs, spec = demo_evaluator.inputs("search"), demo_evaluator.loaded.mask_spec
    assert made.base == sum(x.nbytes for x in jax.tree.leaves(demo_evaluator.loaded.params))
    assert made.member_chunk == min(4, demo_evaluator.loaded.run.search.population)
    assert made.flops_per_mask == budget.mask_flops(
        demo_evaluator.loaded.backbone, demo_evaluator.merge, inputs, spec.shape
    )
    search = demo_evaluator.loaded.run.search
    assert made.masks == search.population * search.generations * search.seeds
    np.testing.assert_allclose(made.seconds, made.masks * made.flops_per_mask / 1e12)
    text = "\n".join(made.lines())
    assert "mesh: population 1 x data 1 x model 1 (1 device)" in text and "MORE THAN" not in text
    assert "MORE THAN THERE IS" in "\n".join(dataclasses.replace(made, memory=1).lines())


def test_a_plan_pays_for_both_searches_of_a_cross_fit(demo_run, demo_evaluator):
    search = dataclasses.replace(demo_run.search, strategy="gradient", fitness="margin", generations=5)

    def planned(cross_fit):
        run = dataclasses.replace(demo_run, search=dataclasses.replace(search, cross_fit=cross_fit))
        return make_plan(demo_evaluator.under(run), rate=1e12)

    one, both = planned(False), planned(True)
    assert (one.masks, both.masks) == (18, 35)
    for plan, said in ((one, "18 masks (3.5 a step"), (both, "35 masks (7 a step")):
        assert said in "\n".join(plan.lines())


def test_low_rank_deltas_take_cores_alone():
    _, merge, _, inputs = make_inputs("mean")
    own, dense = budget.delta_bytes(merge, inputs.ingredients, (2, len(TASKS)))
    k = 2 * len(TASKS)  # rank 2
    assert not dense and own == len(inputs.ingredients) * 2 * k * k * 4


def test_search_plan_prints_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            [
                "search",
                "demo",
                "--plan",
                "--generations",
                "2",
                "--set",
                "search.strategy=cma_es",
                "--population",
                "4",
                "--json",
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert any("at most 24 masks" in line for line in found["lines"])  # three seeds
    assert found["masks"] == 24 and found["total"] > found["base"] > 0
    assert not list(tmp_path.iterdir())
