"""A whole search on the packaged demo: files, determinism, resuming, one compilation."""

import dataclasses
import html
import json
import shlex
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from report_files import add_all, make_run

from enmp_jax.adapters.peft_import import load_adapters
from enmp_jax.cli import main as cli
from enmp_jax.config import run_file
from enmp_jax.config.schema import parse
from enmp_jax.errors import UserError
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.fitness import FITNESS
from enmp_jax.evaluation.scoring import Counts, Scoring
from enmp_jax.io.checkpoints import Checkpoints
from enmp_jax.io.progress import SILENT
from enmp_jax.report import data as report_data
from enmp_jax.report import words
from enmp_jax.runs import mask_file
from enmp_jax.runs.directory import RunDirectory
from enmp_jax.runs.evaluate import evaluate_run
from enmp_jax.runs.evolve import evolve
from enmp_jax.runs.finalists import Finalist, select, with_plain
from enmp_jax.runs.search import choose_scale, search_run


@pytest.fixture(scope="module")
def finished(demo_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    return out, search_run(demo_run, out, SILENT)


def history(out):
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def test_the_run_directory_holds_what_the_readme_says(finished, demo_run):
    out, scores = finished
    for name in (
        "config.yaml",
        "environment.json",
        "history.jsonl",
        "mask.json",
        "seeds.json",
        "scores.json",
        "test-answers.json",
        "report.html",
    ):
        assert (out / name).stat().st_size > 0, name
    assert len(list((out / "plots").glob("*.png"))) >= 3
    assert json.loads((out / "scores.json").read_text()) == scores
    resolved = parse(run_file.RunConfig, yaml.safe_load((out / "config.yaml").read_text()), "config")
    assert dataclasses.replace(resolved, root=demo_run.root) == demo_run
    assert not list(out.rglob("*.tmp"))
    records = history(out)
    assert [r["generation"] for r in records] == [0, 1, 2]
    assert records[-1]["masks_evaluated"] == 12 and records[-1]["best"] == max(
        max(r["fitness"]) for r in records
    )


def test_scores_are_in_0_to_1_and_belong_together(finished, demo_evaluator):
    _, scores = finished
    assert scores["split"] == "test" and scores["masks_evaluated"] == 12
    for kind in ("reference", "base", "merged", "enmp"):
        assert set(scores[kind]) == set(demo_evaluator.loaded.tasks)
        assert all(0 <= value <= 1 for value in scores[kind].values())
    for kind in ("merged", "enmp"):
        mean = np.mean([scores[kind][t] / scores["reference"][t] for t in demo_evaluator.loaded.tasks])
        assert scores["mean_normalised"][kind] == pytest.approx(mean, rel=1e-5)


def test_the_answers_of_single_examples_add_up_to_the_scores(finished, demo_loaded):
    out, scores = finished
    kept = json.loads((out / "test-answers.json").read_text())
    for task, own in kept["answers"].items():
        assert {model: len(text) for model, text in own.items()} == {"merged": 9, "enmp": 9}
        for model, text in own.items():
            assert text.count("1") / 9 == pytest.approx(scores[model][task], abs=1e-6)
        change = kept["gain"]["enmp"]["tasks"][task]
        assert change["difference"] == pytest.approx(scores["enmp"][task] - scores["merged"][task], abs=1e-6)
    mean, gain = scores["mean_normalised"], scores["interval"]["enmp"]
    assert gain["difference"] == pytest.approx(mean["enmp"] - mean["merged"], abs=1e-6)
    assert gain["low"] <= gain["difference"] <= gain["high"] and "tasks" not in gain


def test_the_fitness_is_known_on_every_split(finished, demo_evaluator):
    out, scores = finished
    saved = mask_file.load(out / "mask.json", demo_evaluator.loaded.stack)
    keep = np.stack([demo_evaluator.loaded.mask_spec.all_kept(), saved.keep])
    plain = float(max(scores["scale_grid"], key=lambda scale: scores["scale_grid"][scale]))
    for split in ("search", "selection", "test"):
        inputs, scoring = demo_evaluator.inputs(split), demo_evaluator.scoring(split)
        found = demo_evaluator.fitness_of(inputs, scoring, keep, np.asarray([plain, saved.scale], np.float32))
        on = scores["fitness_on"][split]
        assert [on["merged"], on["enmp"]] == pytest.approx(list(found), rel=1e-5), split


def test_the_masks_of_all_seeds_are_kept(finished):
    out, scores = finished
    assert json.loads((out / "seeds.json").read_text()) == {"0": {"pruned": scores["pruned"]}}


def test_the_commands_of_the_page_run_as_printed(finished, tmp_path, monkeypatch, capsys):
    """Those of hours (controls, compare) up to where they would begin."""
    shutil.copytree(finished[0], tmp_path / "a run")
    monkeypatch.chdir(tmp_path)
    begun = []
    for name in ("compare", "controls"):
        result = json.loads((add_all(make_run(tmp_path / "made up")) / f"{name}.json").read_text())
        monkeypatch.setattr(
            f"enmp_jax.runs.{name}.{name}_run",
            lambda run, out, *_, name=name, result=result: begun.append((name, out)) or result,
        )
    assert cli.main(["report", "a run"]) == 0  # under its new name
    page = Path("a run/report.html").read_text()
    for command, _ in words.commands(report_data.read(Path("a run"))):
        assert html.escape(command) in page
        assert cli.main(shlex.split(command)[1:]) == 0, capsys.readouterr()
    assert begun == [("controls", Path("a run")), ("compare", Path("a run"))]
    again, before = (json.loads(Path(f"a run{end}/mask.json").read_text()) for end in ("-again", ""))
    assert again == before


def test_the_saved_mask_scores_the_same_again(finished, demo_run):
    out, scores = finished
    again = evaluate_run(demo_run, "test", out / "mask.json", None, False, SILENT)
    assert again["enmp"] == pytest.approx(scores["enmp"])
    assert again["merged"] == pytest.approx(scores["merged"]) or scores["scale"] != again["scale"]
    assert again["reference"] == pytest.approx(scores["reference"])
    assert again["pruned"] == scores["pruned"]


def test_the_exported_adapters_are_the_kept_modules(finished, demo_evaluator):
    out, scores = finished
    saved = mask_file.load(out / "mask.json", demo_evaluator.loaded.stack)
    assert [list(m) for m in saved.spec.pruned_modules(saved.keep)] == scores["pruned"]
    exported = load_adapters(
        {t: out / "adapters" / t for t in demo_evaluator.loaded.tasks},
        demo_evaluator.loaded.backbone.canonical,
        n_layers=demo_evaluator.loaded.stack.n_layers,
    )
    for name, pair in exported.stack.pairs.items():
        original = demo_evaluator.loaded.stack.pairs[name]
        for layer in range(exported.stack.n_layers):
            for i in range(exported.stack.n_tasks):
                got = np.asarray(pair.b[layer, i] @ pair.a[layer, i])
                kept = saved.keep[layer, i]
                expected = np.asarray(original.b[layer, i] @ original.a[layer, i]) * kept
                np.testing.assert_allclose(got, expected, atol=1e-6)
    assert (out / "merged" / "adapter_model.safetensors").exists()


def test_the_same_seed_gives_the_same_run(finished, demo_run, tmp_path):
    out, scores = finished
    again = search_run(demo_run, tmp_path / "again", SILENT)
    assert history(tmp_path / "again") == history(out)
    drop = ("masks_per_second", "seconds")
    assert {k: v for k, v in again.items() if k not in drop} == {
        k: v for k, v in scores.items() if k not in drop
    }


def test_another_seed_gives_another_run(finished, demo_run, tmp_path):
    other = dataclasses.replace(demo_run, search=dataclasses.replace(demo_run.search, seed=5))
    search_run(other, tmp_path / "other", SILENT)
    assert history(tmp_path / "other")[0]["fitness"] != history(finished[0])[0]["fitness"]


def test_a_killed_search_goes_on_as_if_nothing_had_happened(finished, demo_run, tmp_path):
    out, scores = finished
    killed = tmp_path / "killed"
    shutil.copytree(out, killed)
    # what a kill after the second checkpoint, during the third generation, leaves behind
    for path in killed.glob("checkpoints/*/3"):
        shutil.rmtree(path)
    for name in ("mask.json", "scores.json", "report.html"):
        (killed / name).unlink()
    for name in ("plots", "adapters", "merged"):
        shutil.rmtree(killed / name)
    lines = (killed / "history.jsonl").read_text().splitlines(keepends=True)
    (killed / "history.jsonl").write_text("".join(lines[:3]) + '{"seed": 0, "gener')
    resumed = search_run(demo_run, killed, SILENT, resume=True)
    assert history(killed) == history(out)
    for key in ("merged", "enmp", "pruned", "masks_evaluated", "distinct_masks"):
        assert resumed[key] == scores[key]


def test_resuming_with_other_settings_is_refused(finished, demo_run):
    other = dataclasses.replace(demo_run, search=dataclasses.replace(demo_run.search, sigma0=0.1))
    with pytest.raises(UserError, match="other settings: changed search.sigma0"):
        search_run(other, finished[0], SILENT, resume=True)


def test_an_occupied_directory_is_refused_and_left_alone(demo_run, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty"):
        search_run(demo_run, tmp_path, SILENT)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="no config.yaml"):
        search_run(demo_run, tmp_path, SILENT, resume=True)


def test_several_seeds_are_one_search_with_one_compilation(demo_run, demo_loaded, tmp_path, compilations):
    """Each seed finds what it finds alone, in one compiled loop."""
    search = dataclasses.replace(demo_run.search, strategy="bit_flip", seeds=3)
    evaluator = Evaluator(dataclasses.replace(demo_loaded, run=dataclasses.replace(demo_run, search=search)))
    inputs, scoring = evaluator.inputs("search"), evaluator.scoring("search")

    def searched(name, run):
        directory = RunDirectory(tmp_path / name)
        directory.start(run)
        found = Evaluator(dataclasses.replace(demo_loaded, run=run))
        result = evolve(found, directory, SILENT, inputs, scoring, 0.5)
        return result, history(tmp_path / name)

    together, lines = searched("three", evaluator.loaded.run)
    assert compilations("advance") == 1
    alone = dataclasses.replace(demo_run, search=dataclasses.replace(search, seed=1, seeds=1))
    _, own = searched("one", alone)
    assert [line for line in lines if line["seed"] == 1] == own
    assert {f.seed for f in together.finalists} == {0, 1, 2}
    # a mask that two seeds propose is run once, and counted for both
    assert together.cost["masks_run"] <= together.cost["distinct_masks"]


def test_a_budget_is_never_exceeded_and_patience_stops(demo_run, demo_loaded, tmp_path):
    examples = int(demo_loaded.sizes("search").sum())

    def searched(name, **settings):
        search = dataclasses.replace(demo_run.search, generations=9, **settings)
        run = dataclasses.replace(demo_run, search=search)
        directory = RunDirectory(tmp_path / name)
        directory.start(run)
        evaluator = Evaluator(dataclasses.replace(demo_loaded, run=run))
        found = evolve(
            evaluator, directory, SILENT, evaluator.inputs("search"), evaluator.scoring("search"), 0.5
        )
        return found.cost, history(tmp_path / name)

    budget = 11 * examples  # two generations of four, and three masks that are too few for a third
    cost, lines = searched("budget", strategy="random", sigma0=2.0, budget=budget)
    assert cost["example_evaluations"] == cost["distinct_masks"] * examples <= budget
    assert len(lines) == 2 and lines[-1]["example_evaluations"] == cost["example_evaluations"]
    # masks that prune nothing never get better
    _, lines = searched("patience", strategy="random", x0=-1e3, patience=2)
    assert len(lines) == 3


def test_budgets_below_one_evaluation_are_refused(demo_run, tmp_path):
    search = dataclasses.replace(demo_run.search, budget=10)
    with pytest.raises(UserError, match="one dispatch of masks costs 240"):
        search_run(dataclasses.replace(demo_run, search=search), tmp_path / "run", SILENT)
    assert not (tmp_path / "run").exists()


def test_the_scale_is_the_best_of_the_grid_on_the_search_split(demo_evaluator):
    inputs, scoring = demo_evaluator.inputs("search"), demo_evaluator.scoring("search")
    scale, fitness = choose_scale(demo_evaluator, inputs, scoring)
    assert set(fitness) == {0.3, 0.6} and fitness[scale] == max(fitness.values())


def test_the_plain_merge_is_a_candidate_and_wins_over_worse_masks(demo_evaluator):
    """Pruning everything of one task must not be chosen when it scores worse on the selection split."""
    bad = demo_evaluator.loaded.mask_spec.all_kept()
    bad[:, 0] = False
    bad[:, 4] = False
    candidates = with_plain(demo_evaluator, [Finalist(0, bad, 0.6, 1e9)], 0.6)
    assert [f.plain for f in candidates] == [False, True]
    winner = select(demo_evaluator, candidates)[0]
    assert winner.selection == max(f.selection for f in candidates)
    assert candidates[0].search == 1e9 and winner.selection < 1e9


def test_a_searched_scale_is_reported_and_used(demo_run, tmp_path):
    search = dataclasses.replace(demo_run.search, search_scale=True)
    run = dataclasses.replace(demo_run, search=search)
    scores = search_run(run, tmp_path / "scale", SILENT)
    scales = {s for record in history(tmp_path / "scale") for s in record["scale"]}
    assert len(scales) > 3 and all(0 < s < 3 for s in scales)
    assert json.loads((tmp_path / "scale" / "mask.json").read_text())["scale"] == pytest.approx(
        scores["scale"]
    )


def with_fitness(monkeypatch, evaluator, values):
    """The evaluator's scores replaced: one fitness for each mask asked about."""
    value = np.repeat(np.asarray(values, np.float32)[:, None], 6, 1)
    counts = Counts(np.zeros((len(values), 6)), np.zeros((len(values), 6)), value)
    one = jnp.ones(6)
    monkeypatch.setattr(evaluator, "kind", FITNESS["probability"])
    monkeypatch.setattr(evaluator, "score", lambda *given: counts)
    monkeypatch.setattr(evaluator, "scoring", lambda split: Scoring(one, one, one, one))


def test_a_scale_that_breaks_the_model_is_not_chosen(monkeypatch, demo_evaluator):
    """Broken models have the fitness NaN, which numpy's argmax prefers to any number."""
    inputs = demo_evaluator.inputs("search")
    with_fitness(monkeypatch, demo_evaluator, [np.nan, -2.0])
    assert choose_scale(demo_evaluator, inputs, demo_evaluator.scoring("search"))[0] == 0.6
    with_fitness(monkeypatch, demo_evaluator, [np.nan, np.nan])
    with pytest.raises(UserError, match="no finite fitness at scale 0.3, 0.6"):
        choose_scale(demo_evaluator, inputs, demo_evaluator.scoring("search"))


@pytest.mark.parametrize(
    ("pruned", "plain", "wins"),
    [(0.5, 0.5, "plain"), (0.6, 0.5, "pruned"), (np.nan, 0.5, "plain"), (0.5, np.nan, "pruned")],
)
def test_pruning_must_win_its_place(monkeypatch, demo_evaluator, pruned, plain, wins):
    """A tie on the selection split goes to the plain merge, whatever the search thought; NaN never wins."""
    with_fitness(monkeypatch, demo_evaluator, [pruned, plain])
    keep = demo_evaluator.loaded.mask_spec.all_kept()
    fewer = keep.copy()
    fewer[0, 0] = False
    winner = select(demo_evaluator, [Finalist(0, fewer, 0.5, 9.0), Finalist(0, keep, 0.5, None)])[0]
    assert ("plain" if winner.keep.all() else "pruned") == wins


def test_checkpoints_are_saved_whenever_their_interval_was_crossed(demo_run, tmp_path, monkeypatch):
    """Two generations a dispatch and one checkpoint every three: after 4 and 6, not only at the end."""
    saved = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, *rest: saved.append(step))
    search = dataclasses.replace(
        demo_run.search, generations=7, generations_per_dispatch=2, checkpoint_every=3
    )
    search_run(dataclasses.replace(demo_run, search=search), tmp_path / "run", SILENT)
    assert saved == [4, 6, 7]
