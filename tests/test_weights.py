"""Weights of modules: in mask.json, in merges under a mask, and in everything that is exported."""

import functools
import json
import re
import shlex
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from adapter_files import TASKS, load_all, make, make_base, spelled

from enmp_jax import merges
from enmp_jax.adapters import load_adapters, read_adapter
from enmp_jax.adapters.lora_factors import lora_factors
from enmp_jax.adapters.peft_export import export_adapters, export_peft
from enmp_jax.adapters.recipe import Recipe, hashes, mask_text
from enmp_jax.cli import main as cli
from enmp_jax.deltas import Deltas, Dense
from enmp_jax.errors import UserError
from enmp_jax.masks import MaskSpec
from enmp_jax.runs import mask_file

TIES = {"method": "ties", "space": "full", "isotropize": False, "density": 0.4}


def weights_of(spec, seed=0):
    """Weights in 0..3 with a pruned module, an untouched one, and one that float64 spells long."""
    weights = np.random.default_rng(seed).uniform(0, 3, spec.shape).astype(np.float32)
    weights.reshape(-1)[:3] = 0, 1, 0.3
    return weights


@pytest.fixture
def spec(loaded):
    return MaskSpec.of(loaded.stack)


@pytest.fixture
def weights(spec):
    return weights_of(spec)


@pytest.fixture
def mask(spec, weights, tmp_path):
    """A mask.json next to the adapters, found for TIES at scale 0.7."""
    path = tmp_path / "secret-user" / "mask.json"
    path.write_text(json.dumps(spec.to_json(weights, 0.7, TIES)))
    return path


@pytest.mark.parametrize("granularity", ["layer", "projection"])
def test_weights_round_trip_bit_for_bit(loaded, granularity):
    spec = MaskSpec.of(loaded.stack, granularity)
    weights = weights_of(spec)
    data = json.loads(json.dumps(spec.to_json(weights, 0.5, TIES | {"scale": 0.5, "gamma": None})))
    assert [len(entry) for entry in data["weights"]] == [len(spec.shape) + 1] * (spec.n_modules - 1)
    assert data["weights"][0] == [*data["pruned"][0], 0.0]
    assert data["weights"][1][-1] == 0.3
    assert len(data["pruned"]) == 1
    assert data["merge"] == TIES
    saved = mask_file.from_json(data, loaded.stack)
    assert saved.keep.dtype == np.float32
    np.testing.assert_array_equal(saved.keep, weights)
    assert (saved.scale, saved.merge) == (0.5, TIES)


def test_masks_without_weights_are_written_as_ever(loaded, spec):
    data = spec.to_json(spec.all_kept(), None)
    assert list(data) == ["granularity", "pruned", "scale", "tasks", "layers"]
    saved = mask_file.from_json(data, loaded.stack)
    assert saved.keep.dtype == bool and saved.merge is None
    # weights that are all 1 are weights still
    assert mask_file.from_json(spec.to_json(np.ones(spec.shape), 1.0), loaded.stack).keep.dtype == np.float32


def test_modules_that_do_not_exist_have_no_weight(tmp_path):
    make(tmp_path / "a", 0, layers=(0, 2))
    make(tmp_path / "b", 1)
    spec = MaskSpec.of(load_adapters({"a": tmp_path / "a", "b": tmp_path / "b"}).stack)
    names = [tuple(module) for *module, _ in spec.weighted_modules(np.full(spec.shape, 0.5, np.float32))]
    assert (1, "a") not in names and len(names) == spec.n_modules == 5


def test_factors_of_tasks_follow_the_order_of_the_adapters(loaded, spec):
    data = spec.to_json(spec.all_kept(), 1.0, TIES | {"task_weights": (0.25, 4.0)})
    turned = mask_file.from_json(json.loads(json.dumps(data)), loaded.stack.select([1, 0]))
    assert turned.merge is not None and turned.merge["task_weights"] == (4.0, 0.25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [[0, "cars", "much"]]}, "module 0:cars: the weight must be a number, not 'much'"),
        ({"weights": [[0, "cars", None]]}, "must be a number, not None"),
        ({"weights": [[0, "cars", True]]}, "must be a number, not True"),
        ({"weights": [[0, "cars", float("nan")]]}, r"the weight is nan: it must lie in 0\.\.100"),
        ({"weights": [[0, "cars", float("inf")]]}, "the weight is inf"),
        ({"weights": [[0, "cars", -0.1]]}, "the weight is -0.1"),
        ({"weights": [[0, "cars", 101]]}, "the weight is 101"),
        ({"weights": [[0, "cars", 1.5], [0, "cars", 2]]}, "module 0:cars is weighted twice"),
        ({"pruned": [[0, "cars"], [0, "cars"]]}, "module 0:cars is pruned twice"),
        ({"pruned": [[0, "cars"]], "weights": [[0, "cars", 0.5]]}, "is pruned and has the weight 0.5"),
        ({"weights": [[0, "carz", 0.5]]}, "did you mean 'cars'"),
        ({"weights": [[9, "cars", 0.5]]}, "layer 9"),
        ({"weights": [[0, "cars"]]}, "does not name a module"),
        ({"weights": [[]]}, "like"),
        ({"weights": [3]}, "like"),
        ({"weights": {"0": 1}}, "weights must be a list"),
        ({"scale": float("nan")}, "scale must be a number"),
        ({"scale": 10**400}, "scale must be a number"),
        ({"merge": "ties"}, "merge must be a mapping"),
        ({"merge": {"space": "full"}}, "merge must be a mapping with the key method"),
        ({"merge": {"method": "tiess"}}, "did you mean 'ties'"),
        ({"merge": {"method": "ties", "density": 3}}, "density is 3"),
        ({"merge": {"method": "ties", "gama": 3}}, "gama"),
        ({"merge": {"method": "ties", "space": 3}}, "merge.space"),
        ({"merge": {"method": "ties", "isotropize": "yes"}}, "merge.isotropize"),
        ({"merge": {"method": "ties", "task_weights": [1.0]}}, "one number for each task"),
    ],
)  # fmt: skip
def test_bad_weights_are_one_clear_line(loaded, spec, tmp_path, change, message):
    path = tmp_path / "mask.json"
    path.write_text(json.dumps(spec.to_json(spec.all_kept(), 0.5) | change))
    with pytest.raises(UserError, match=message) as error:
        mask_file.load(path, loaded.stack)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    arguments = [word for task in TASKS for word in ("--adapter", f"{task}={tmp_path}/secret-user/{task}")]
    assert cli.main(["merge", *arguments, "--mask", str(path), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_pruned_and_weight_zero_say_the_same(loaded, spec):
    data = spec.to_json(spec.all_kept(), None) | {"pruned": [[0, "cars"]], "weights": [[0, "cars", 0]]}
    keep = mask_file.from_json(data, loaded.stack).keep
    assert keep[0, 0] == 0 and keep.sum() == 5


def deltas_under(loaded, keep, scale, method="ties", **hyperparameters):
    merge = merges.make(method, **hyperparameters)
    found = merge.merge(merge.prepare(loaded.stack), jnp.asarray(keep), scale)
    return {
        f"{template.replace('{}', str(layer))}.weight": dense
        for template, delta in found.items()
        for layer, dense in enumerate(np.asarray(delta.materialise()))
    }


def enmp_merge(tmp_path, monkeypatch, *words, out="out"):
    monkeypatch.chdir(tmp_path / "secret-user")
    arguments = ["--adapter", "cars=cars", "--adapter", "dtd=dtd", *words, "--out", str(tmp_path / out)]
    return cli.main(["merge", *arguments])


def written_delta(path):
    return safetensors.numpy.load_file(path / "delta.safetensors")


def test_a_mask_brings_its_weights_scale_and_merge(loaded, weights, mask, tmp_path, monkeypatch, capfd):
    assert enmp_merge(tmp_path, monkeypatch, "--mask", "mask.json") == 0
    right = deltas_under(loaded, weights, 0.7, density=0.4)
    wrong = deltas_under(loaded, weights, 0.7)  # the default density
    found = written_delta(tmp_path / "out")
    assert any(np.abs(right[name] - wrong[name]).max() > 0.1 for name in right)
    for name, dense in right.items():
        np.testing.assert_allclose(found[name], dense, atol=1e-6)
    assert capfd.readouterr().err == ""
    assert json.loads((tmp_path / "out" / "mask.json").read_text()) == json.loads(mask.read_text()) | {
        "merge": {key: value for key, value in TIES.items() if value},
        "adapters": hashes(loaded),
    }


@pytest.mark.parametrize(
    ("words", "method", "hyperparameters", "scale", "note"),
    [
        (["--method", "sum"], "sum", {}, 0.7, "for ties in full space, density 0.4; merging with sum in"),
        (["--density", "0.9"], "ties", {"density": 0.9}, 0.7, "merging with ties in full space, density 0.9"),
        (["--isotropize"], "ties", {"density": 0.4, "isotropize": True}, 0.7, "in full space, isotropize"),
        (["--scale", "0.2", "--method", "ties"], "ties", {"density": 0.4}, 0.2, None),
    ],
)  # fmt: skip
def test_the_command_line_wins_and_says_so(
    loaded, weights, mask, tmp_path, monkeypatch, capfd, words, method, hyperparameters, scale, note
):
    assert enmp_merge(tmp_path, monkeypatch, "--mask", "mask.json", *words) == 0
    for name, dense in deltas_under(loaded, weights, scale, method, **hyperparameters).items():
        np.testing.assert_allclose(written_delta(tmp_path / "out")[name], dense, atol=1e-5)
    err = capfd.readouterr().err
    assert len(err.splitlines()) == (note is not None)
    assert (note or "") in err


@pytest.mark.parametrize("options", [["--format", "adapters"], ["--format", "peft"], ["--format", "delta"],
                                     ["--format", "checkpoint", "--base-model", "base"]])  # fmt: skip
@pytest.mark.parametrize("granularity", ["layer", "projection"])
def test_the_recorded_command_repeats_a_weighted_merge(
    loaded, tmp_path, monkeypatch, capfd, options, granularity
):
    spec = MaskSpec.of(loaded.stack, granularity)
    merge = {"method": "dare", "space": "full", "drop_rate": 0.3, "seed": 5, "task_weights": (1.0, 0.5)}
    text = json.dumps(spec.to_json(weights_of(spec), 0.7, merge))
    (tmp_path / "secret-user" / "m.json").write_text(text)
    make_base(tmp_path / "secret-user" / "base")
    assert enmp_merge(tmp_path, monkeypatch, "--mask", "m.json", *options, out="first") == 0
    first, again = tmp_path / "first", tmp_path / "again"
    config = (first / "enmp_config.yaml").read_text()
    recorded = re.search(r"# +(enmp merge .*)", config)
    assert recorded and "--mask mask.json" in recorded[1] and "--prune" not in recorded[1]
    assert all(recorded[1] in card.read_text() for card in first.glob("README.md"))
    shutil.copy(first / "mask.json", tmp_path / "secret-user")
    words = [str(again) if word == "DIR" else word for word in shlex.split(recorded[1])]
    assert cli.main(words[1:]) == 0
    assert capfd.readouterr().err == ""
    files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert len(files) >= 3
    for file in files:
        assert (first / file).read_bytes() == (again / file).read_bytes(), file


def test_recipes_without_weights_prune_by_name(loaded):
    recipe = Recipe({"method": "sum", "space": "full", "scale": 1.0}, [(0, "cars")])
    saved = mask_file.from_json(json.loads(mask_text(loaded, recipe)), loaded.stack)
    assert saved.keep.dtype == bool and not saved.keep[0, 0] and saved.keep.sum() == 5
    assert saved.merge == {"method": "sum", "space": "full"}


def test_adapters_with_weights_folded_in_sum_to_the_merge_under_weights(loaded, spec, weights, tmp_path):
    recipe = Recipe({"method": "sum"}, spec.pruned_modules(weights), weights=spec.weighted_modules(weights))
    export_adapters(tmp_path / "out", loaded, weights, recipe)
    right = deltas_under(loaded, weights, 1.0, "sum")
    total = {name: np.zeros_like(dense) for name, dense in right.items()}
    for task in TASKS:
        for path, (a, b) in read_adapter(tmp_path / "out" / task).modules.items():
            total[f"{path}.weight"] += b @ a
        card = (tmp_path / "out" / task / "README.md").read_text()
        assert "Only a plain sum" in card and f"# Weighted LoRA adapter: {task}" in card
        assert "with a weight on every module" in card and "negative modules removed" not in card
    for name, dense in right.items():
        np.testing.assert_allclose(total[name], dense, rtol=1e-4, atol=1e-5)
    assert "- layer 1, cars, weight 0.3" in (tmp_path / "out" / "README.md").read_text()
    assert mask_file.load(tmp_path / "out" / "mask.json", loaded.stack).keep.tolist() == weights.tolist()


@pytest.mark.parametrize(("weight", "kept"), [(2.0, "bfloat16"), (0.5, "bfloat16"), (0.3, "float32")])
def test_types_are_kept_when_the_weight_allows(tmp_path, weight, kept):
    make(tmp_path / "a", 0, dtype=ml_dtypes.bfloat16)
    loaded = load_adapters({"a": tmp_path / "a"})
    export_adapters(tmp_path / "out", loaded, np.full((3, 1), weight, np.float32), Recipe())
    raw = safetensors.numpy.load_file(tmp_path / "out" / "a" / "adapter_model.safetensors")
    assert {value.dtype.name for value in raw.values()} == {kept}
    found = read_adapter(tmp_path / "out" / "a")
    for path, (_, b) in loaded.adapters["a"].modules.items():
        np.testing.assert_array_equal(found.modules[path][1], b * np.float32(weight))


def test_a_weight_that_makes_b_overflow_is_refused(loaded, weights, tmp_path):
    for _, b in loaded.adapters["dtd"].modules.values():
        b *= np.float32(1e37)
    with pytest.raises(UserError, match=r"B times its weight .* overflows"):
        export_adapters(tmp_path / "out", loaded, np.full_like(weights, 90), Recipe())
    assert not (tmp_path / "out").exists()


def test_peft_and_checkpoint_hold_the_merge_under_weights(loaded, weights, mask, tmp_path, monkeypatch):
    base = make_base(tmp_path / "secret-user" / "base")
    words = ["--mask", "mask.json", "--method", "sum"]
    assert enmp_merge(tmp_path, monkeypatch, *words, "--format", "peft", out="peft") == 0
    options = ["--format", "checkpoint", "--base-model", "base"]
    assert enmp_merge(tmp_path, monkeypatch, *words, *options, out="model") == 0
    right = deltas_under(loaded, weights, 0.7, "sum")
    adapter, model = read_adapter(tmp_path / "peft"), load_all(tmp_path / "model")
    for name, dense in right.items():
        a, b = adapter.modules[name.removesuffix(".weight")]
        np.testing.assert_allclose(b @ a, dense, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model[name] - base[name], dense, rtol=1e-4, atol=1e-5)


def spectrum(s, m=30, n=20, seed=0):
    """A matrix with given singular values."""
    random = np.random.default_rng(seed)
    u, v = (np.linalg.qr(random.normal(size=(side, len(s))))[0] for side in (m, n))
    return (u * np.asarray(s)) @ v.T


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.01, 0.001])
def test_dense_deltas_get_the_smallest_rank_that_meets_the_tolerance(tolerance):
    full = np.stack([spectrum(0.5 ** np.arange(20)), spectrum(0.7 ** np.arange(20), seed=1)])
    deltas: Deltas = {"h.{}": Dense(jnp.asarray(full, jnp.float32))}
    found = lora_factors(deltas, spelled(deltas), tolerance=tolerance)
    lost = np.zeros(21)
    for x in full:
        energy = np.linalg.svd(x, compute_uv=False) ** 2
        lost += np.append(np.cumsum(energy[::-1])[::-1], 0)
    error = np.sqrt(lost / lost[0])
    assert error[found.rank] <= tolerance < error[found.rank - 1]
    assert found.error == pytest.approx(error[found.rank], rel=1e-3)
    assert lora_factors(deltas, spelled(deltas), 2, tolerance).rank == min(2, found.rank)


@pytest.mark.parametrize("tolerance", [0.0, None])
def test_no_tolerance_means_exact(tolerance):
    deltas: Deltas = {"h.{}": Dense(jnp.asarray(spectrum(0.5 ** np.arange(20))[None], jnp.float32))}
    found = lora_factors(deltas, spelled(deltas), tolerance=tolerance)
    assert (found.rank, found.error) == (20, 0)


@pytest.mark.parametrize("tolerance", [-0.1, float("nan"), float("inf")])
def test_bad_tolerances(loaded, tmp_path, tolerance):
    with pytest.raises(UserError, match="tolerance"):
        export_peft(tmp_path / "out", loaded, {}, Recipe(), tolerance=tolerance)


def peft_error(directory, right):
    modules = read_adapter(directory).modules
    lost = whole = 0.0
    for name, dense in right.items():
        a, b = modules[name.removesuffix(".weight")]
        lost, whole = lost + np.sum((dense - b @ a) ** 2), whole + np.sum(dense**2)
    return np.sqrt(lost / whole)


def test_merged_adapters_are_within_the_tolerance_or_say_that_they_are_not(
    loaded, weights, mask, tmp_path, monkeypatch, capfd
):
    words = ["--mask", "mask.json", "--format", "peft"]
    right = deltas_under(loaded, weights, 0.7, density=0.4)
    assert enmp_merge(tmp_path, monkeypatch, *words) == 0
    assert peft_error(tmp_path / "out", right) <= 0.01
    assert capfd.readouterr().err == ""
    assert enmp_merge(tmp_path, monkeypatch, *words, "--tolerance", "0.3", out="loose") == 0
    assert 0.01 < peft_error(tmp_path / "loose", right) <= 0.3
    assert "--tolerance 0.3" in (tmp_path / "loose" / "enmp_config.yaml").read_text()
    capfd.readouterr()
    assert enmp_merge(tmp_path, monkeypatch, *words, "--rank", "2", out="capped") == 0
    error = peft_error(tmp_path / "capped", right)
    assert error > 0.01
    (line,) = capfd.readouterr().err.splitlines()
    assert f"relative error {error:.2e} is above the tolerance 0.01" in line
    assert enmp_merge(tmp_path, monkeypatch, *words, "--rank", "2", "--strict", out="strict") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "at rank 2" in line and f"{error:.2e}" in line and "tolerance is 0.01" in line
    assert not (tmp_path / "strict").exists()


def test_the_error_is_handed_to_the_caller(loaded, weights, tmp_path):
    merge = merges.make("ties", density=0.4)
    deltas = merge.merge(merge.prepare(loaded.stack), jnp.asarray(weights), 0.7)
    written = export_peft(tmp_path / "out", loaded, deltas, Recipe(), rank=2)
    right = deltas_under(loaded, weights, 0.7, density=0.4)
    assert written.error == pytest.approx(peft_error(tmp_path / "out", right), rel=1e-4)
    assert written.rank == read_adapter(tmp_path / "out").settings.rank == 2
    assert f"relative error {written.error:.2e}" in written.line


def _merged(merge, keep, stack):
    return merge.merge(merge.prepare(stack), keep, 1.0)


def test_help_says_which_exports_are_exact(loaded, spec, capfd):
    with pytest.raises(SystemExit):
        cli.main(["merge", "--help"])
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capfd.readouterr().out).split())
    listed = re.search(r"else \((.*?) in full space: dense\)", words)
    assert listed
    dense = set()
    for method in merges.METHODS:
        merge = merges.make(method)
        run = functools.partial(_merged, merge, jnp.asarray(spec.all_kept()))
        found = jax.eval_shape(run, loaded.stack)
        if any(isinstance(delta, Dense) for delta in found.values()):
            dense.add(method)
    assert set(re.findall(r"\w+", listed[1])) - {"and"} == dense


def test_names_in_cards_are_no_markup(tmp_path):
    make(tmp_path / "a", 0)
    task = "*a* | _b_ [c](d) <e> `f` snake_case"
    loaded = load_adapters({task: tmp_path / "a"})
    recipe = Recipe({"method": "sum"}, [(0, task)], scores={"merged": {task: 0.5}})
    deltas = merges.make("sum")
    keep = np.array([[False], [True], [True]])
    merged = deltas.merge(deltas.prepare(loaded.stack), jnp.asarray(keep), 1.0)
    export_peft(tmp_path / "out", loaded, merged, recipe)
    card = (tmp_path / "out" / "README.md").read_text()
    shown = r"\*a\* \| \_b\_ \[c\](d) \<e\> \`f\` snake_case"
    body, command, _ = card.split("```\n")
    assert task not in body and body.count(shown) == 4  # what it is, adapters, scores, dropped
    assert shlex.quote(f"{task}=a") in command
