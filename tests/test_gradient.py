"""Gradients through merge and model, the search that follows them, masks made of weights, and refining."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from device_problem import TASKS, make_inputs
from safetensors.numpy import load_file, save_file

from enmp_jax.adapters.recipe import RECIPE
from enmp_jax.config.sections import RefineConfig
from enmp_jax.deltas import Dense, LowRank, add_deltas
from enmp_jax.errors import UserError
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.fitness import FITNESS
from enmp_jax.evaluation.population import count_all
from enmp_jax.evaluation.scoring import Scoring, class_log_probabilities
from enmp_jax.io.progress import SILENT
from enmp_jax.runs.climb import harden
from enmp_jax.runs.refine import refine_run
from enmp_jax.runs.search import search_run
from enmp_jax.runs.verify import verify
from enmp_jax.search import gradient
from enmp_jax.training.experts import init_factors
from enmp_jax.training.loop import Schedule
from enmp_jax.training.refine import refine

SMOOTH = [name for name, kind in FITNESS.items() if kind.has_gradient and not kind.hidden]


def with_expert(inputs, backbone, merge):
    """The inputs with the answers of task 0's adapter as every task's expert."""
    keep = jnp.zeros((2, len(TASKS))).at[:, 0].set(1.0)
    deltas = merge.merge(inputs.ingredients, keep, 1.0)
    made = []
    for bucket in inputs.batches:
        rows = [
            class_log_probabilities(
                inputs.heads,
                backbone.features(inputs.params, {k: v[b] for k, v in bucket.inputs.items()}, deltas),
                bucket.task[b],
            )
            for b in range(len(bucket.label))
        ]
        made.append(bucket._replace(expert=jnp.stack(rows)))
    return inputs._replace(batches=tuple(made))


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("method", ["mean", "tsv"])
def test_gradients_are_finite_differences(name, method):
    """Of every smooth fitness, with respect to the weight of every module, through merge and model."""
    backbone, merge, _, inputs = make_inputs(method)
    inputs, kind = with_expert(inputs, backbone, merge), FITNESS[name]
    ones = jnp.ones(len(TASKS))
    scoring = Scoring(ones * 7, ones, 0.9 * ones if not kind.logarithmic else -0.1 * ones, ones)

    @jax.jit
    def value(weights):
        counts = count_all(
            backbone, inputs, merge.merge(inputs.ingredients, weights, 0.5), len(TASKS), kind, remat=True
        )
        return scoring.fitness(counts, kind)

    weights = jnp.asarray(np.random.default_rng(1).uniform(0.5, 1.5, (2, len(TASKS))), jnp.float32)
    got = np.asarray(jax.jit(jax.grad(value))(weights))
    step = 1e-2
    for index in np.ndindex(*weights.shape):
        up, down = value(weights.at[index].add(step)), value(weights.at[index].add(-step))
        expected = float(up - down) / (2 * step)
        assert got[index] == pytest.approx(expected, abs=2e-3 + 0.02 * float(np.abs(got).max()))
    assert np.abs(got).max() > 1e-3  # and there is something to follow


def toy(weights, target):
    return -jnp.sum((weights - target) ** 2)


def climb_toy(target, look, **settings):
    present = np.ones(3, bool)
    present[2] = False
    ascent = gradient.make_ascent(toy, gradient.Settings(**settings))
    state = ascent.init(jax.random.key(0), present)
    fold = gradient.Fold((jnp.asarray(target),), look)
    return ascent, gradient.run(ascent, [state], present, [fold], [])


def test_weights_stay_in_their_range_and_missing_modules_at_one():
    target = [-5.0, 9.0, 4.0]
    _, looks = climb_toy(target, lambda w: float(toy(w, np.asarray(target))), steps=60, learning_rate=0.2)
    np.testing.assert_allclose(looks[-1].weights, [0.0, 3.0, 1.0])
    np.testing.assert_array_equal(gradient.best(looks).weights, looks[-1].weights)


def test_the_other_data_stop_the_search_and_choose_its_weights():
    """What is followed wants 3; what is looked at is best at 1.5: stopped three looks after passing it."""
    _, looks = climb_toy(
        [3.0, 3.0, 0.0], lambda w: -abs(float(w[0]) - 1.5), steps=100, learning_rate=0.1, patience=3
    )
    best = gradient.best(looks)
    assert best.weights[0] == pytest.approx(1.5, abs=0.1)
    assert looks[-1].step == best.step + 3 * 2 < 100


def test_folds_stop_together_and_their_mean_is_found():
    """One half wants 3, the other 0; each is judged by the other's wish: nothing is better than the start."""
    present, wishes = np.ones(3, bool), [[3.0] * 3, [0.0] * 3]
    ascent = gradient.make_ascent(toy, gradient.Settings(40, learning_rate=0.1, patience=3, jitter=0.0))
    states = [ascent.init(jax.random.key(0), present)] * 2

    def climbed(judges):
        folds = [
            gradient.Fold((jnp.asarray(wish),), lambda w, judge=judge: float(toy(w, np.asarray(judge))))
            for wish, judge in zip(wishes, judges, strict=True)
        ]
        return gradient.run(ascent, states, present, folds, [])

    looks = climbed(wishes[::-1])
    assert gradient.best(looks).step == 0 and looks[-1].step == 3 * 2
    # what one gains by this judge, the other loses
    assert gradient.best(climbed([wishes[0]] * 2)).step == 0
    # judged by what they follow, both arrive; the fold that is there first waits for the other
    looks = climbed(wishes)
    best, root = gradient.best(looks), 2**0.5
    np.testing.assert_allclose(best.weights, 1.5, atol=0.1)
    # judges see 3 and 0 nearer to 1 by the root of two, as noisy as the mean of both
    expected = -3 * ((2 - 2 / root) ** 2 + (1 - 1 / root) ** 2) / 2
    assert best.value == pytest.approx(expected, abs=0.05) and best.step > 12


def test_a_penalty_keeps_weights_near_the_plain_merge():
    free, held = (
        climb_toy([3.0, 3.0, 0.0], lambda w: float(w[0]), steps=80, penalty=penalty)[1][-1].weights[0]
        for penalty in (0.0, 30.0)
    )
    assert free > 2.5 and held < 1.5


@pytest.fixture(scope="module")
def gradient_run(demo_run):
    search = dataclasses.replace(
        demo_run.search, strategy="gradient", fitness="margin", generations=4, granularity="projection",
        seeds=1, checkpoint_every=1,
    )  # fmt: skip
    merge = dataclasses.replace(demo_run.merge, method="tsv", hyperparameters={})
    return dataclasses.replace(demo_run, search=search, merge=merge)


@pytest.fixture(scope="module")
def finished(gradient_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "weights"
    return out, search_run(gradient_run, out, SILENT)


def history(out):
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def test_a_search_of_weights_climbs_and_counts_its_cost(finished, gradient_run):
    out, scores = finished
    lines = history(out)
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert lines[-1]["fitness"][0] > lines[1]["fitness"][0]  # on the split that it follows
    n = {name: sum(sizes.values()) for name, sizes in scores["splits"].items()}
    assert scores["example_evaluations"] == 3.5 * 4 * n["search"] + 3 * n["selection"]
    mask = json.loads((out / "mask.json").read_text())
    if scores["weighted"]:
        assert len(mask["weights"]) == scores["weighted"] and mask["merge"]["method"] == "tsv"
    assert (out / "merged" / "adapter_model.safetensors").exists()


def test_a_killed_search_of_weights_goes_on_to_the_same_result(finished, gradient_run, tmp_path):
    out, scores = finished
    killed = tmp_path / "killed"
    shutil.copytree(out, killed)
    shutil.rmtree(killed / "checkpoints" / "seed-0" / "3")
    for name in ("mask.json", "scores.json", "report.html"):
        (killed / name).unlink()
    for name in ("plots", "adapters", "merged"):
        shutil.rmtree(killed / name)
    resumed = search_run(gradient_run, killed, SILENT, resume=True)
    assert history(killed) == history(out)
    assert resumed["enmp"] == scores["enmp"] and resumed["weighted"] == scores["weighted"]


def test_a_cross_fitted_search_pays_for_both_splits_and_goes_on(gradient_run, finished, tmp_path):
    out, search = tmp_path / "run", dataclasses.replace(gradient_run.search, cross_fit=True)
    run = dataclasses.replace(gradient_run, search=search)
    scores, lines = search_run(run, out, SILENT), history(out)
    examples = sum(sum(scores["splits"][split].values()) for split in ("search", "selection"))
    assert scores["example_evaluations"] == (3.5 * 4 + 3) * examples
    alone = history(finished[0])
    assert lines[-1]["step"] == 4 and lines[-1]["selection"] != alone[-1]["selection"]
    for name in ("mask.json", "scores.json", "report.html"):
        (out / name).unlink()
    for name in ("plots", "adapters", "merged", "checkpoints/seed-0/3"):
        shutil.rmtree(out / name)
    resumed = search_run(run, out, SILENT, resume=True)
    assert history(out) == lines and resumed["enmp"] == scores["enmp"]


def test_a_budget_bounds_steps_and_looks(gradient_run, demo_loaded, tmp_path):
    n = {split: int(demo_loaded.sizes(split).sum()) for split in ("search", "selection")}
    dispatch = 7 * n["search"] + n["selection"]
    search = dataclasses.replace(gradient_run.search, budget=n["selection"] + dispatch)
    scores = search_run(dataclasses.replace(gradient_run, search=search), tmp_path / "run", SILENT)
    assert scores["example_evaluations"] == n["selection"] + dispatch
    assert [line["step"] for line in history(tmp_path / "run")] == [0, 2]
    search = dataclasses.replace(search, budget=dispatch - 1)
    with pytest.raises(UserError, match=f"look at the selection split cost {dispatch}"):
        search_run(dataclasses.replace(gradient_run, search=search), tmp_path / "less", SILENT)


def test_what_has_no_gradient_is_refused(gradient_run, tmp_path):
    search = dataclasses.replace(gradient_run.search, fitness="accuracy")
    with pytest.raises(UserError, match="accuracy has no useful gradient"):
        search_run(dataclasses.replace(gradient_run, search=search), tmp_path / "a", SILENT)
    search = dataclasses.replace(gradient_run.search, fitness="acuracy")
    with pytest.raises(UserError, match="did you mean 'accuracy'"):
        search_run(dataclasses.replace(gradient_run, search=search), tmp_path / "b", SILENT)
    assert not (tmp_path / "b").exists()


def test_hardened_weights_are_masks_within_the_limit(gradient_run, demo_loaded):
    search = dataclasses.replace(gradient_run.search, granularity="layer", max_pruned=0.2)
    run = dataclasses.replace(gradient_run, search=search)
    evaluator = Evaluator(dataclasses.replace(demo_loaded, run=run))
    spec = evaluator.loaded.mask_spec
    weights = np.random.default_rng(0).uniform(0, 2, spec.shape).astype(np.float32)
    inputs, scoring = evaluator.inputs("search"), evaluator.scoring("search")
    found, scored = harden(evaluator, inputs, scoring, 0.5, weights, seed=3)
    assert all(f.keep.dtype == bool and f.pruned <= spec.max_count and f.seed == 3 for f in found)
    fitness = [f.search for f in found]
    assert fitness == sorted(fitness, reverse=True) and scored >= spec.max_count + 1
    # the smallest weights are among what was tried
    smallest = np.argsort(weights.reshape(-1))[0]
    assert any(not f.keep.reshape(-1)[smallest] for f in found)


@pytest.mark.parametrize("kinds", [("low", "low"), ("low", "open"), ("low", "dense"), ("dense", "dense")])
def test_deltas_add_up(kinds):
    random = np.random.default_rng(0)

    def delta(kind, k):
        left, core, right = (jnp.asarray(random.normal(size=s)) for s in ((2, 5, k), (2, k, k), (2, k, 4)))
        made = LowRank(left, core, right)
        if kind == "open":
            return LowRank(left, core @ right, None)
        return made if kind == "low" else Dense(made.materialise())

    a, b = {"m": delta(kinds[0], 2), "only": delta("low", 1)}, {"m": delta(kinds[1], 3)}
    total = add_deltas(a, b)
    expected = a["m"].materialise() + b["m"].materialise()
    np.testing.assert_allclose(total["m"].materialise(), expected, atol=1e-5)
    assert isinstance(total["m"], Dense if "dense" in kinds else LowRank)
    np.testing.assert_array_equal(total["only"].materialise(), a["only"].materialise())


def test_refining_starts_at_the_merge_and_keeps_the_best(demo_loaded, gradient_run):
    search = dataclasses.replace(gradient_run.search, fitness="expert_kl")
    evaluator = Evaluator(
        dataclasses.replace(demo_loaded, run=dataclasses.replace(gradient_run, search=search))
    )
    keep = jnp.ones((demo_loaded.stack.n_layers, len(demo_loaded.tasks)))
    start = evaluator.merge.merge(evaluator.ingredients, keep, 0.5)
    config = RefineConfig(rank=2, steps=12, check_every=3, learning_rate=5e-3)
    refined = refine(evaluator, start, config)
    scoring, inputs = evaluator.scoring("selection"), evaluator.inputs("selection")

    def value(deltas):
        return float(scoring.fitness(evaluator.score_deltas(inputs, deltas), evaluator.kind))

    assert refined.fitness[0] == pytest.approx(value(start), abs=1e-4)
    assert value(refined.deltas) == pytest.approx(max(refined.fitness), abs=1e-4)
    assert max(refined.fitness) > refined.fitness[0] and refined.step > 0
    (name, delta), *_ = refined.deltas.items()
    assert delta.max_rank == start[name].max_rank + 2  # ranks add up


def test_cross_fitted_refining_adds_half_of_two_loras(demo_loaded, gradient_run, monkeypatch):
    """Each is the LoRA that its split trains alone; the other split judges the half that is added."""
    search = dataclasses.replace(gradient_run.search, fitness="probability")
    loaded = dataclasses.replace(demo_loaded, run=dataclasses.replace(gradient_run, search=search))
    fewer = [e.take(np.arange(6)) for e in loaded.examples["selection"]]  # splits of different sizes
    splits = {"search": loaded.examples["search"], "selection": fewer}
    evaluator = Evaluator(dataclasses.replace(loaded, examples={**loaded.examples, **splits}))
    # every gradient is longer than this: clipped each by itself, not both together
    monkeypatch.setattr("enmp_jax.training.refine.Schedule", functools.partial(Schedule, clip=1e-4))
    keep = jnp.ones((loaded.stack.n_layers, len(loaded.tasks)))
    start = evaluator.merge.merge(evaluator.ingredients, keep, 0.5)
    config = RefineConfig(rank=2, steps=8, check_every=4, learning_rate=5e-3, cross_fit=True)
    both = refine(evaluator, start, config)
    assert both.step == 8 and len(both.fitness) == 3

    factors = init_factors(loaded.backbone, sorted(loaded.stack.pairs), 2, 2, jax.random.key(0))
    alone, judged = [], {"full": [], "half": []}
    for i, (split, judge) in enumerate((("search", "selection"), ("selection", "search"))):
        own = jax.tree.map(lambda x, i=i: x[i : i + 1], factors)
        monkeypatch.setattr("enmp_jax.training.refine.init_factors", lambda *_, own=own: own)
        # judged by what it follows, so that the last step is its best
        same = evaluator.on({**loaded.examples, "search": splits[split], "selection": splits[split]})
        one = refine(same, start, dataclasses.replace(config, cross_fit=False))
        assert one.step == 8
        alone.append({name: delta.materialise() for name, delta in one.deltas.items()})
        for name, divisor in (("full", 1), ("half", 2)):
            seen = {
                key: Dense(delta.materialise() + (alone[i][key] - delta.materialise()) / divisor)
                for key, delta in start.items()
            }
            counts = evaluator.score_deltas(evaluator.inputs(judge), seen)
            judged[name].append(float(evaluator.scoring(judge).fitness(counts, evaluator.kind)))
    for name, delta in both.deltas.items():
        np.testing.assert_allclose(delta.materialise(), (alone[0][name] + alone[1][name]) / 2, atol=2e-6)
        assert delta.max_rank == start[name].max_rank + 4
    assert both.fitness[-1] == pytest.approx(np.mean(judged["half"]), abs=1e-5)
    assert both.fitness[-1] != pytest.approx(np.mean(judged["full"]), abs=1e-4)


def refined_is_the_merge_and_a_lora(export):
    """``enmp verify`` proves it; not with a lower rank, another scale or other weights."""

    def added():
        (report,) = verify(str(export), {})
        return next(check for check in report.checks if check.name == "merge and LoRA")

    assert added().ok
    recipe, weights = export / RECIPE, export / "adapter_model.safetensors"
    said, right = yaml.safe_load(recipe.read_text()), load_file(weights)
    for section, key, value in (("refined", "rank", 1), ("merge", "scale", 1.3 * said["merge"]["scale"])):
        recipe.write_text(yaml.safe_dump(said | {section: said[section] | {key: value}}))
        assert not added().ok
    recipe.write_text(yaml.safe_dump(said))
    name = next(name for name, values in right.items() if "lora_B" in name and values.any())
    save_file(right | {name: right[name] * 1.01}, weights, {"format": "pt"})
    assert not added().ok
    save_file(right, weights, {"format": "pt"})
    assert added().ok


def test_a_finished_search_is_refined_once(finished, tmp_path):
    out, scores = finished
    run = tmp_path / "run"
    shutil.copytree(out, run)
    config = RefineConfig(rank=2, steps=4, check_every=2)
    refined = refine_run(run, config, SILENT)
    kept = json.loads((run / "test-answers.json").read_text())
    for task, own in kept["answers"].items():
        share = own["refined"].count("1") / len(own["refined"])
        assert share == pytest.approx(refined["refined"][task], abs=1e-6)
    gain, mean = refined["interval"]["refined"], refined["mean_normalised"]
    assert gain["difference"] == pytest.approx(mean["refined"] - mean["merged"], abs=1e-6)
    assert json.loads((run / "scores.json").read_text()) == refined
    assert {"merged", "enmp", "refined"} <= set(refined["mean_normalised"])
    assert refined["enmp"] == scores["enmp"]
    assert (run / "refined" / "adapter_model.safetensors").exists()
    refined_is_the_merge_and_a_lora(run / "refined")
    refine_run(run, dataclasses.replace(config, cross_fit=True), SILENT, run / "twice")
    refined_is_the_merge_and_a_lora(run / "twice")  # a LoRA of rank 4
    with pytest.raises(UserError, match="already there"):
        refine_run(run, config, SILENT)
    with pytest.raises(UserError, match="no directory of a finished search"):
        refine_run(tmp_path, config, SILENT)
