"""What we export, loaded by PEFT and transformers, against our own backbone with the same deltas."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import tiny_models as tiny
import torch

from enmp_jax import merges, models
from enmp_jax.adapters import load_adapters, read_adapter
from enmp_jax.adapters.hf_export import export_checkpoint
from enmp_jax.adapters.peft_export import export_adapters, export_peft
from enmp_jax.adapters.recipe import Recipe
from enmp_jax.errors import UserError

pytestmark = pytest.mark.reference
FAMILIES = ("clip", "llama", "bert")
TASKS = ("one", "two", "three")
RECIPE = Recipe(merge={"method": "sum", "scale": 0.5}, pruned=[(0, "one"), (2, "two")], seed=3)
ATOL = 1e-4


def _merges() -> list[tuple[str, str, bool]]:
    found = [("sum", "full", True), ("ties", "knots", True)]
    for method, space in itertools.product(merges.METHODS, merges.SPACES):
        try:
            merges.make(method, space)
        except UserError:
            continue  # a pair that the method does not have
        found.append((method, space, False))
    assert {method for method, _, _ in found} == set(merges.METHODS)
    return found


class Case:
    """A base, three adapters and our view of them."""

    def __init__(self, name: str, root):
        self.name, self.root = name, root
        self.base = tiny.make_base(name, root / "base")
        options = [{}, {"use_rslora": True, "r": 3}, {"rank_pattern": {"layers?.1.*": 2}, "lora_alpha": 5}]
        self.sources = {
            task: str(tiny.make_adapter(name, self.base, root / task, seed, **options[seed]))
            for seed, task in enumerate(TASKS)
        }
        self.backbone, self.params = models.load(self.base)
        self.loaded = load_adapters(
            self.sources,
            canonical=self.backbone.canonical,
            n_layers=self.backbone.n_layers,
            modules=self.backbone.modules,
        )
        self.features = jax.jit(self.backbone.features)
        self.keep = np.ones((self.backbone.n_layers, len(TASKS)), bool)
        self.keep[0, 0] = self.keep[2, 1] = False

    def merge(self, method="sum", space="full", iso=False, scale=0.5):
        merge = merges.make(method, space, iso)
        run = jax.jit(lambda stack, keep: merge.merge(merge.prepare(stack), keep, scale))
        return run(self.loaded.stack, jnp.asarray(self.keep))

    def ours(self, deltas) -> np.ndarray:
        inputs = {key: jnp.asarray(value) for key, value in tiny.family(self.name).inputs.items()}
        features = np.asarray(self.features(self.params, inputs, deltas))
        if self.name == "clip":
            return features
        head = models.load_head(self.base)
        assert head is not None
        weight, bias = head
        return features @ weight.T + (0 if bias is None else bias)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("method,space,iso", _merges())
def test_every_method_gives_the_same_outputs_everywhere(case, tmp_path, method, space, iso):
    deltas = case.merge(method, space, iso, scale=2.0)
    ours = case.ours(deltas)
    base = tiny.load_base(case.name, case.base)
    assert np.abs(ours - tiny.outputs(case.name, base)).max() > 20 * ATOL  # the deltas matter

    written = export_peft(tmp_path / "peft", case.loaded, deltas, RECIPE, tolerance=None)
    assert "exact" in written.line
    adapted = tiny.load_quietly(base, tmp_path / "peft")
    np.testing.assert_allclose(tiny.outputs(case.name, adapted), ours, atol=ATOL, rtol=0)

    export_checkpoint(tmp_path / "model", case.loaded, deltas, case.base, RECIPE)
    merged = tiny.load_base(case.name, tmp_path / "model")
    np.testing.assert_allclose(tiny.outputs(case.name, merged), ours, atol=ATOL, rtol=0)


def test_pruned_adapters_load_without_warning_and_equal_our_deltas(case, tmp_path):
    export_adapters(tmp_path / "out", case.loaded, case.keep, RECIPE)
    for i, task in enumerate(TASKS):
        only = np.zeros_like(case.keep)
        only[:, i] = case.keep[:, i]
        merge = merges.make("sum")
        deltas = merge.merge(merge.prepare(case.loaded.stack), jnp.asarray(only), 1.0)
        model = tiny.load_quietly(tiny.load_base(case.name, case.base), tmp_path / "out" / task)
        found = {key for key in model.state_dict() if "lora_A" in key}
        assert len(found) == len(read_adapter(tmp_path / "out" / task).modules)  # nothing added by PEFT
        assert len(found) < len(case.loaded.adapters[task].modules) or task == "three"
        ours = case.ours(deltas)
        if case.name != "clip":  # the adapter brings its own head
            (head,) = case.loaded.heads[task].values()
            inputs = {key: jnp.asarray(value) for key, value in tiny.family(case.name).inputs.items()}
            ours = np.asarray(case.features(case.params, inputs, deltas)) @ head["weight"].T + head.get(
                "bias", 0
            )
        np.testing.assert_allclose(tiny.outputs(case.name, model), ours, atol=ATOL, rtol=0)


def test_unpruned_adapters_equal_the_originals_in_peft(case, tmp_path):
    export_adapters(tmp_path / "out", case.loaded, np.ones_like(case.keep), Recipe())
    for task in TASKS:
        before = tiny.load_quietly(tiny.load_base(case.name, case.base), case.sources[task])
        after = tiny.load_quietly(tiny.load_base(case.name, case.base), tmp_path / "out" / task)
        np.testing.assert_allclose(
            tiny.outputs(case.name, after), tiny.outputs(case.name, before), atol=1e-6, rtol=0
        )


def test_a_fully_pruned_adapter_is_the_base(case, tmp_path):
    keep = np.ones_like(case.keep)
    keep[:, 0] = False
    export_adapters(tmp_path / "out", case.loaded, keep, Recipe())
    model = tiny.load_quietly(tiny.load_base(case.name, case.base), tmp_path / "out" / "one")
    ours = case.ours(None)
    if case.name != "clip":
        (head,) = case.loaded.heads["one"].values()
        inputs = {key: jnp.asarray(value) for key, value in tiny.family(case.name).inputs.items()}
        ours = np.asarray(case.features(case.params, inputs, None)) @ head["weight"].T + head.get("bias", 0)
    np.testing.assert_allclose(tiny.outputs(case.name, model), ours, atol=ATOL, rtol=0)


def test_truncation_reports_the_error_it_makes(case, tmp_path):
    deltas = case.merge("ties")
    reported = export_peft(tmp_path / "peft", case.loaded, deltas, RECIPE, rank=4).error
    written = read_adapter(tmp_path / "peft")
    lost = whole = 0.0
    for template, delta in deltas.items():
        for layer, dense in enumerate(np.asarray(delta.materialise(), np.float64)):
            a, b = written.modules[case.loaded.names[template][layer]]
            assert a.shape[0] <= 4
            lost += np.sum((dense - b.astype(np.float64) @ a) ** 2)
            whole += np.sum(dense**2)
    assert reported == pytest.approx(np.sqrt(lost / whole), rel=1e-2)
    assert reported > 0.01
    assert f"{reported:.2e}" in (tmp_path / "peft" / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_checkpoint_in_another_type_loads_in_transformers(case, tmp_path, dtype):
    deltas = case.merge()
    export_checkpoint(tmp_path / "model", case.loaded, deltas, case.base, RECIPE, dtype=dtype)
    model = tiny.family(case.name).model.from_pretrained(tmp_path / "model", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    found = tiny.outputs(case.name, model.float().eval())
    np.testing.assert_allclose(found, case.ours(deltas), atol=0.1, rtol=0.1)


def test_sharded_base_stays_sharded(case, tmp_path):
    model: Any = tiny.load_base(case.name, case.base)
    model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    shards = sorted(p.name for p in (tmp_path / "base").glob("*.safetensors"))
    assert len(shards) > 2
    deltas = case.merge()
    export_checkpoint(tmp_path / "model", case.loaded, deltas, tmp_path / "base", RECIPE)
    assert sorted(p.name for p in (tmp_path / "model").glob("*.safetensors")) == shards
    merged = tiny.load_base(case.name, tmp_path / "model")
    np.testing.assert_allclose(tiny.outputs(case.name, merged), case.ours(deltas), atol=ATOL, rtol=0)


def test_heads_of_the_tasks_are_written_next_to_the_merge(case, tmp_path):
    export_peft(tmp_path / "peft", case.loaded, case.merge(), RECIPE)
    written = sorted(p.stem for p in (tmp_path / "peft").glob("heads/*.safetensors"))
    assert written == ([] if case.name == "clip" else sorted(TASKS))
