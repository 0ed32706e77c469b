"""Writing pruned and merged PEFT adapters. No torch."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from adapter_files import RECIPE, TASKS, make, make_base, merged, spelled

from enmp_jax.adapters import load_adapters, read_adapter
from enmp_jax.adapters.hf_export import export_checkpoint
from enmp_jax.adapters.lora_factors import lora_factors
from enmp_jax.adapters.peft_export import export_adapters, export_peft
from enmp_jax.adapters.recipe import Recipe
from enmp_jax.deltas import Dense, LowRank
from enmp_jax.errors import UserError


def test_pruned_adapters_hold_the_kept_modules_and_nothing_else(loaded, keep, tmp_path):
    lines = export_adapters(tmp_path / "out", loaded, keep, RECIPE)
    assert lines == ["cars: 4 of 6 modules, rank 2", "dtd: 4 of 6 modules, rank 3"]
    for i, task in enumerate(TASKS):
        source, found = loaded.adapters[task], read_adapter(tmp_path / "out" / task)
        assert set(found.modules) == {p for p in source.modules if keep[int(p.split(".")[2]), i]}
        assert sorted(found.config["target_modules"]) == sorted(found.modules)
        assert found.settings.rank == found.settings.alpha == source.settings.rank
        for path, (a, b) in found.modules.items():
            np.testing.assert_array_equal(a, source.modules[path][0])  # bit for bit
            np.testing.assert_array_equal(b, source.modules[path][1])
        assert found.heads.keys() == source.heads.keys()


def test_masks_of_single_projections(loaded, tmp_path):
    keep = np.ones((3, 2, 2), bool)
    keep[1, loaded.stack.projections.index("model.layers.{}.mlp.up_proj"), 0] = False
    export_adapters(tmp_path / "out", loaded, keep, Recipe(pruned=[(1, "mlp.up_proj", "cars")]))
    found = set(loaded.adapters["cars"].modules) - set(read_adapter(tmp_path / "out" / "cars").modules)
    assert found == {"model.layers.1.mlp.up_proj"}
    assert set(read_adapter(tmp_path / "out" / "dtd").modules) == set(loaded.adapters["dtd"].modules)


@pytest.mark.parametrize("alpha,kept", [(4, "bfloat16"), (1, "bfloat16"), (3, "float32")])
def test_types_are_kept_when_the_scaling_allows(tmp_path, alpha, kept):
    make(tmp_path / "a", 0, dtype=ml_dtypes.bfloat16, alpha=alpha)
    loaded = load_adapters({"a": tmp_path / "a"})
    export_adapters(tmp_path / "out", loaded, np.ones((3, 1), bool), Recipe())
    raw = safetensors.numpy.load_file(tmp_path / "out" / "a" / "adapter_model.safetensors")
    assert {value.dtype.name for value in raw.values()} == {kept}
    found = read_adapter(tmp_path / "out" / "a")
    for path, (_, b) in loaded.adapters["a"].modules.items():
        np.testing.assert_array_equal(found.modules[path][1], b)


def test_a_task_with_nothing_left_gets_a_zero_module(loaded, keep, tmp_path):
    keep[:, 1] = False
    export_adapters(tmp_path / "out", loaded, keep, RECIPE)
    found = read_adapter(tmp_path / "out" / "dtd")
    assert len(found.modules) == 1 and not next(iter(found.modules.values()))[1].any()


@pytest.mark.parametrize("method", ["sum", "mean"])
def test_low_rank_merges_are_exact_at_their_rank(loaded, keep, tmp_path, method):
    deltas = merged(loaded, keep, method)
    written = export_peft(tmp_path / "out", loaded, deltas, RECIPE)
    assert written.error == 0 and written.rank in (4, 5)
    assert f"rank {written.rank}, exact" in written.line
    found = read_adapter(tmp_path / "out")
    assert found.settings.alpha == found.settings.rank and found.settings.rank_pattern == {}
    for template, delta in deltas.items():
        for layer, dense in enumerate(np.asarray(delta.materialise())):
            a, b = found.modules[template.replace("{}", str(layer))]
            np.testing.assert_allclose(b @ a, dense, rtol=1e-5, atol=1e-6)
    assert safetensors.numpy.load_file(tmp_path / "out" / "heads" / "cars.safetensors")["weight"].shape == (
        2,
        6,
    )
    assert not (tmp_path / "out" / "heads" / "dtd.safetensors").exists()
    assert found.settings.task_type is None and not found.heads  # PEFT would make a new head


def test_layers_with_nothing_left_are_left_out(loaded, keep, tmp_path):
    keep[2] = False
    export_peft(tmp_path / "out", loaded, merged(loaded, keep), RECIPE)
    assert {path.split(".")[2] for path in read_adapter(tmp_path / "out").modules} == {"0", "1"}


def test_nothing_left_at_all_is_an_error(loaded, keep, tmp_path):
    with pytest.raises(UserError, match="every module was pruned"):
        export_peft(tmp_path / "out", loaded, merged(loaded, np.zeros_like(keep)), RECIPE)
    assert not (tmp_path / "out").exists()


def delta_of_rank(k, m=40, n=30, layers=2, seed=0):
    random = np.random.default_rng(seed)
    left, right = random.normal(size=(layers, m, k)), random.normal(size=(layers, k, n))
    return LowRank(*(jnp.asarray(x, jnp.float32) for x in (left, np.stack([np.eye(k)] * layers), right)))


@pytest.mark.parametrize("dense", [False, True])
def test_truncation_is_the_best_of_its_rank(dense):
    delta = delta_of_rank(8)
    full = np.asarray(delta.materialise(), np.float64)
    deltas = {"h.{}": Dense(jnp.asarray(full, jnp.float32)) if dense else delta}
    found = lora_factors(deltas, spelled(deltas), 3)
    best = [np.linalg.svd(x, compute_uv=False) for x in full]
    lost = np.sqrt(sum((s[3:] ** 2).sum() for s in best) / sum((s**2).sum() for s in best))
    assert found.rank == 3 and found.error == pytest.approx(lost, rel=1e-5)
    made = [found.modules[f"h.{layer}"] for layer in range(2)]
    error = np.sqrt(
        sum(np.sum((x - b.astype(float) @ a) ** 2) for x, (a, b) in zip(full, made)) / np.sum(full**2)
    )
    assert error == pytest.approx(lost, rel=1e-5)
    exact = lora_factors(deltas, spelled(deltas), tolerance=1e-5)
    assert exact.rank == 8 and exact.error < 1e-6


def test_rank_above_the_matrix_is_cut_to_it_without_loss():
    delta = delta_of_rank(50)
    found = lora_factors({"h.{}": delta}, spelled({"h.{}": delta}))
    assert found.rank == 30 and found.error < 1e-12
    a, b = found.modules["h.1"]
    np.testing.assert_allclose(b @ a, np.asarray(delta.materialise())[1], atol=2e-4)


def test_lanczos_agrees_with_the_full_svd(monkeypatch):
    monkeypatch.setattr("enmp_jax.adapters.lora_factors._DIRECT", 10)
    weight = np.random.default_rng(0).normal(size=(1, 90, 70)).astype(np.float32)
    deltas = {"h.{}": Dense(jnp.asarray(weight))}
    found = lora_factors(deltas, spelled(deltas), 5)
    s = np.linalg.svd(weight[0].astype(float), compute_uv=False)
    assert found.error == pytest.approx(np.sqrt((s[5:] ** 2).sum() / (s**2).sum()), rel=1e-5)


def test_nan_in_a_delta_is_refused(loaded, keep, tmp_path):
    deltas = merged(loaded, keep, scale=float("nan"))
    make_base(tmp_path / "base")
    with pytest.raises(UserError, match="NaN or Inf"):
        export_peft(tmp_path / "out", loaded, deltas, RECIPE)
    with pytest.raises(UserError, match="NaN or Inf"):
        export_checkpoint(tmp_path / "out", loaded, deltas, tmp_path / "base", RECIPE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("k,j", [(3, 5), (5, 3), (4, 4)])
def test_a_core_that_is_not_square_goes_to_the_side_that_keeps_the_rank_small(k, j):
    random = np.random.default_rng(0)
    parts = [random.normal(size=shape) for shape in ((2, 9, k), (2, k, j), (2, j, 8))]
    delta = LowRank(*(jnp.asarray(part, jnp.float32) for part in parts))
    found = lora_factors({"h.{}": delta}, spelled({"h.{}": delta}))
    assert found.rank == min(k, j) and found.error == 0
    for layer in range(2):
        a, b = found.modules[f"h.{layer}"]
        np.testing.assert_allclose(b @ a, np.asarray(delta.materialise())[layer], rtol=1e-4, atol=1e-5)
