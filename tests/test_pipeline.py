"""A whole search on the packaged demo: files, determinism, resuming, one compilation."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import yaml

from enmp_jax.adapters.peft_import import load_adapters
from enmp_jax.config import run_file
from enmp_jax.config.schema import parse
from enmp_jax.errors import UserError
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.scoring import Counts, Scoring
from enmp_jax.io.progress import SILENT
from enmp_jax.runs import mask_file
from enmp_jax.runs.directory import Checkpoints, RunDirectory
from enmp_jax.runs.evaluate import evaluate_run
from enmp_jax.runs.search import Finalist, choose_scale, finalists, search_run, select
from enmp_jax.runs.searcher import Searcher
from enmp_jax.search.memo import Memo


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
        "scores.json",
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
    with pytest.raises(UserError, match="other settings for search"):
        search_run(other, finished[0], SILENT, resume=True)


def test_an_occupied_directory_is_refused_and_left_alone(demo_run, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty"):
        search_run(demo_run, tmp_path, SILENT)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="no config.yaml"):
        search_run(demo_run, tmp_path, SILENT, resume=True)


def test_searches_with_several_seeds_compile_the_evaluation_once(
    demo_evaluator, demo_run, tmp_path, compilations
):
    directory = RunDirectory(tmp_path / "run")
    searcher = Searcher(demo_evaluator, directory, SILENT)
    directory.start(demo_run)
    inputs, scoring = demo_evaluator.inputs("search"), demo_evaluator.scoring("search")
    for seed in range(3):
        searcher.search(inputs, scoring, 0.5, seed)
    assert compilations("advance") == 1


def test_scores_of_other_data_are_not_remembered(demo_evaluator, demo_run, tmp_path):
    """The same search twice runs no mask again; against other expert accuracies, all of them."""
    run = dataclasses.replace(demo_run, search=dataclasses.replace(demo_run.search, seeds=2))
    searcher = Searcher(
        Evaluator(dataclasses.replace(demo_evaluator.loaded, run=run)), RunDirectory(tmp_path / "0"), SILENT
    )
    inputs, scoring = demo_evaluator.inputs("search"), demo_evaluator.scoring("search")
    other = scoring._replace(reference=scoring.reference * 2)
    ran = []
    for i, given in enumerate((scoring, scoring, other)):
        searcher.directory = RunDirectory(tmp_path / str(i))
        searcher.directory.start(run)
        before = searcher.masks_run
        searcher.search(inputs, given, 0.5, 0)
        ran.append(searcher.masks_run - before)
    assert ran[0] > 0 and ran == [ran[0], 0, ran[0]]


def test_the_scale_is_the_best_of_the_grid_on_the_search_split(demo_evaluator):
    inputs, scoring = demo_evaluator.inputs("search"), demo_evaluator.scoring("search")
    scale, fitness = choose_scale(demo_evaluator, inputs, scoring)
    assert set(fitness) == {0.3, 0.6} and fitness[scale] == max(fitness.values())


def test_the_plain_merge_is_a_candidate_and_wins_over_worse_masks(demo_evaluator):
    """Pruning everything of one task must not be chosen when it scores worse on the selection split."""
    memo = Memo()
    bad = demo_evaluator.loaded.mask_spec.all_kept()
    bad[:, 0] = False
    bad[:, 4] = False
    memo.add(bad[None], np.asarray([1e9], np.float32))
    candidates = finalists(demo_evaluator, memo, 0, 0.6)
    assert [f.keep.all() for f in candidates] == [False, True]
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
    counts = Counts(np.zeros((len(values), 6)), np.repeat(np.asarray(values, np.float32)[:, None], 6, 1))
    monkeypatch.setattr(evaluator, "score", lambda *given: counts)
    monkeypatch.setattr(evaluator, "scoring", lambda split: Scoring(np.ones(6), np.ones(6)))


def test_a_scale_that_breaks_the_model_is_not_chosen(monkeypatch, demo_evaluator):
    """Broken models have the fitness NaN, which numpy's argmax prefers to any number."""
    with_fitness(monkeypatch, demo_evaluator, [np.nan, -2.0])
    assert choose_scale(demo_evaluator, None, demo_evaluator.scoring("search"))[0] == 0.6
    with_fitness(monkeypatch, demo_evaluator, [np.nan, np.nan])
    with pytest.raises(UserError, match="no finite fitness at scale 0.3, 0.6"):
        choose_scale(demo_evaluator, None, demo_evaluator.scoring("search"))


@pytest.mark.parametrize(
    ("pruned", "plain", "wins"),
    [(0.5, 0.5, "plain"), (0.6, 0.5, "pruned"), (np.nan, 0.5, "plain"), (0.5, np.nan, "pruned")],
)
def test_pruning_must_win_its_place(monkeypatch, demo_evaluator, pruned, plain, wins):
    """A tie on the selection split goes to the plain merge, whatever the search thought; NaN never wins."""
    monkeypatch.setattr(demo_evaluator, "inputs", lambda split: None)
    with_fitness(monkeypatch, demo_evaluator, [pruned, plain])
    keep = demo_evaluator.loaded.mask_spec.all_kept()
    fewer = keep.copy()
    fewer[0, 0] = False
    winner = select(demo_evaluator, [Finalist(0, fewer, 0.5, 9.0), Finalist(0, keep, 0.5, None)])[0]
    assert ("plain" if winner.keep.all() else "pruned") == wins


def test_checkpoints_are_saved_whenever_their_interval_was_crossed(demo_run, tmp_path, monkeypatch):
    """Two generations a dispatch and one checkpoint every three: after 4 and 6, not only at the end."""
    saved = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, generation, tree: saved.append(generation))
    search = dataclasses.replace(
        demo_run.search, generations=7, generations_per_dispatch=2, checkpoint_every=3
    )
    search_run(dataclasses.replace(demo_run, search=search), tmp_path / "run", SILENT)
    assert saved == [4, 6, 7]
