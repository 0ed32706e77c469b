"""``enmp controls``: rows that are what they say, each made once, on a test split that is read once a row."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

from enmp_jax.cli import main as cli
from enmp_jax.config.schema import to_dict
from enmp_jax.config.sections import MergeConfig
from enmp_jax.deltas import Deltas
from enmp_jax.errors import UserError
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.example_scores import ExampleScores
from enmp_jax.io.progress import SILENT
from enmp_jax.runs import control_bench, control_rows, controls
from enmp_jax.runs.controls import controls_run, make_bench, sentences, with_differences
from enmp_jax.runs.evaluate import evaluate_run
from enmp_jax.runs.finalists import Finalist
from enmp_jax.search import geometry
from enmp_jax.search.statistics import Sample
from enmp_jax.training.refine import Refined

PRUNED = [(0, "digit"), (2, "even"), (5, "mirrored")]


@pytest.fixture
def searched(tmp_path, monkeypatch, demo_run, demo_loaded):
    """A run and the directory of its search, as if it had found a mask."""

    def load(run, splits, reporter):  # no time spent on loading the demo again
        examples = {split: demo_loaded.examples[split] for split in splits}
        return dataclasses.replace(demo_loaded, run=run, examples=examples)

    for module in ("controls", "evaluate"):
        monkeypatch.setattr(f"enmp_jax.runs.{module}.load", load)
    path, spec = tmp_path / "run", demo_loaded.mask_spec
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(to_dict(demo_run)))
    scores = {
        "seed": 0, "scale_grid": {"0.3": 0.5, "0.6": 0.6}, "example_evaluations": 600,
        "splits": {"search": dict.fromkeys(demo_loaded.tasks, 10.0)},
    }  # fmt: skip
    (path / "environment.json").write_text(json.dumps({"root": str(demo_run.root)}))
    (path / "scores.json").write_text(json.dumps(scores))
    mask = spec.to_json(spec.keep_from_pruned(PRUNED), 0.6, demo_run.merge.recipe())
    (path / "mask.json").write_text(json.dumps(mask))
    return demo_run, path


@pytest.fixture
def bench(searched, demo_evaluator):
    """What the rows share."""
    _, path = searched
    scores = json.loads((path / "scores.json").read_text())
    return make_bench(demo_evaluator, path, scores, 20, 2, None, SILENT)


def make(bench, kind):
    ((_, make),) = control_rows.KINDS[kind].rows(bench).items()
    return make(bench)


def test_the_test_split_is_read_once_a_row(searched, monkeypatch, demo_evaluator):
    run, path = searched
    reads, of_masks = [], ExampleScores.of_masks
    monkeypatch.setattr(
        ExampleScores,
        "of_masks",
        lambda self, keep, *given: reads.append(len(keep)) or of_masks(self, keep, *given),
    )
    chosen = ["random", "shuffled", "leave_one_out", "first_order", "greedy", "norm", "cosine"]
    result = controls_run(run, path, SILENT, chosen)
    names = [row["row"] for row in result["rows"]]
    assert names == [
        "plain", "found", "random masks", "leave one out", "first order", "greedy", "by norm", "by cosine",
    ]  # fmt: skip
    assert reads == [1, 1, 20, 1, 1, 1, 1, 1]
    rows = {row["row"]: row for row in result["rows"]}
    spec = demo_evaluator.loaded.mask_spec
    keep = np.stack([spec.all_kept(), spec.keep_from_pruned(PRUNED)])
    counts = demo_evaluator.score(demo_evaluator.inputs("test"), keep, np.full(2, 0.6, np.float32))
    known = np.asarray(demo_evaluator.scoring("test").normalised(counts))
    found = [rows["plain"]["mean_normalised"], rows["found"]["mean_normalised"]]
    assert found == pytest.approx(known, rel=1e-6)
    assert rows["found"]["gain"]["difference"] == pytest.approx(known[1] - known[0], abs=1e-6)
    random = rows["random masks"]
    assert random["mean_normalised"] == pytest.approx(np.mean(random["values"]))
    assert random["std"] == pytest.approx(np.std(random["values"], ddof=1))
    assert random["as_good_as_found"] == sum(v >= found[1] for v in random["values"])
    for name in names[1:]:
        assert rows[name]["gain"]["low"] <= rows[name]["gain"]["difference"] <= rows[name]["gain"]["high"]
        assert rows[name]["gain"]["p_holm"] >= rows[name]["gain"]["p"]
    assert rows["by norm"]["pruned"] == random["pruned"] == len(PRUNED)
    assert json.loads((path / "controls.json").read_text()) == result


def test_interrupted_controls_make_no_row_twice(searched, monkeypatch):
    run, path = searched
    made, make_row = [], controls._make_row

    def stops(name, *given):
        if name == "by norm":
            raise KeyboardInterrupt
        made.append(name)
        return make_row(name, *given)

    monkeypatch.setattr(controls, "_make_row", stops)
    with pytest.raises(KeyboardInterrupt):
        controls_run(run, path, SILENT, ["random", "norm"])
    assert made == ["plain", "found", "random masks"] and not (path / "controls.json").exists()
    monkeypatch.setattr(
        controls, "_make_row", lambda name, *given: made.append(name) or make_row(name, *given)
    )
    result = controls_run(run, path, SILENT, ["random", "norm"])
    assert made[3:] == ["by norm"]
    assert controls_run(run, path, SILENT, ["random", "norm"]) == result and len(made) == 4


def test_rows_of_other_settings_are_refused(searched, monkeypatch):
    run, path = searched
    controls_run(run, path, SILENT, ["random"])
    with pytest.raises(UserError, match="row random masks was made with other settings for masks"):
        controls_run(run, path, SILENT, ["random"], masks=21)
    controls_run(run, path, SILENT, ["random"], seeds=7)  # random masks do not depend on it
    monkeypatch.setattr(control_rows, "_transfer", lambda bench, method: controls._plain(bench))
    result = controls_run(run, path, SILENT, ["transfer"])  # nor on the other splits that others read
    assert [row["row"] for row in result["rows"]][:4] == ["plain", "found", "random masks", "transfer to sum"]
    controls_run(run, path, SILENT, ["random", "transfer"])
    mask = json.loads((path / "mask.json").read_text())
    (path / "mask.json").write_text(json.dumps(mask | {"pruned": mask["pruned"][:1]}))
    with pytest.raises(UserError, match="row plain was made with other settings for mask"):
        controls_run(run, path, SILENT, ["random"])


def test_random_and_shuffled_rows_prune_as_much(bench, monkeypatch):
    seen = []
    monkeypatch.setattr(
        control_bench.Bench,
        "score",
        lambda self, keep, **details: seen.append(keep) or control_bench.Scored(np.zeros((1, 1))),
    )
    make(bench, "random")
    assert control_rows.KINDS["shuffled"].rows(bench) == {}, "the same as random masks"
    weights = np.where(bench.found.keep, 1.3, 0.0).astype(np.float32)
    bench.found = Finalist(0, weights, 0.6, None)
    make(bench, "shuffled")
    for keep, kept in zip(seen, (1, np.float32(1.3)), strict=True):
        assert len(keep) == 20 and ((keep == 0).sum((1, 2)) == 3).all() and (keep[keep != 0] == kept).all()
    assert bench.count == 3
    bench.found = Finalist(0, bench.plain, 0.6, None)
    assert bench.count == bench.evaluator.loaded.mask_spec.max_count == 7, "where nothing is pruned"


@pytest.mark.parametrize("wins", [0, 1])
def test_one_shot_rows_choose_their_end_on_the_search_split(bench, monkeypatch, wins):
    monkeypatch.setattr(control_bench.Bench, "fitness", lambda self, keep: np.eye(2)[wins])
    seen = []
    monkeypatch.setattr(bench.test, "of_masks", lambda keep, scale: seen.append(keep[0]) or np.zeros((1, 54)))
    scored = make(bench, "norm")
    loaded = bench.evaluator.loaded
    norms = geometry.norms(loaded.stack, loaded.mask_spec)
    threshold = np.sort(norms.reshape(-1))[[2, -3][wins]]
    np.testing.assert_array_equal(~seen[0], norms >= threshold if wins else norms <= threshold)
    assert scored.details["note"] == ("the smallest", "the largest")[wins]


def test_greedy_has_the_budget_of_the_search(bench):
    """600 example-evaluations on 60 examples would be 10 masks; every module is tried once at least."""
    assert bench.masks_paid == 36
    scored = make(bench, "greedy")
    assert scored.details["masks"] <= 36
    bench.masks_paid = 5
    assert make(bench, "greedy").details["masks"] <= 5


def test_a_mask_is_transferred_against_the_other_methods_own_plain_merge(searched, bench, monkeypatch):
    run, path = searched
    monkeypatch.setattr("enmp_jax.runs.tuning.GRIDS", {})
    rows = control_rows.KINDS["transfer"].rows(bench)
    assert list(rows) == ["transfer to sum", "transfer to tsv", "transfer to iso"]
    scored = rows["transfer to sum"](bench)
    assert scored.baseline is not None
    other = dataclasses.replace(run, merge=MergeConfig("sum", scale_grid=run.merge.scale_grid))
    plain = evaluate_run(other, "test", None, None, False, SILENT)
    known = evaluate_run(other, "test", path / "mask.json", plain["scale"], False, SILENT)["mean_normalised"]
    test = bench.test
    assert test.sample.mean(scored.baseline) == pytest.approx(known["merged"], abs=1e-6)
    assert test.sample.mean(scored.examples)[0] == pytest.approx(known["enmp"], abs=1e-6)


def test_joint_loras_start_from_the_base_and_from_the_merge(bench, monkeypatch):
    calls: list = []

    def refine(evaluator: Evaluator, start: Deltas, config, seed):
        calls.append((sorted(start), config.fitness, evaluator.kind.name, seed))
        return Refined(start, 0, [0.0])

    monkeypatch.setattr(control_rows, "refine", refine)
    rows = control_rows.KINDS["joint_lora"].rows(bench)
    assert list(rows) == [
        f"joint LoRA from {start}, {whose}" for start in ("base", "merge") for whose in ("experts", "labels")
    ]
    base = rows["joint LoRA from base, labels"](bench)
    assert calls == [([], "log_likelihood", "log_likelihood", seed) for seed in (0, 1)]
    spec = bench.evaluator.loaded.mask_spec
    np.testing.assert_array_equal(base.examples, bench.test.of_masks(~spec.all_kept()[None], 1.0)[[0, 0]])
    merged = rows["joint LoRA from merge, experts"](bench)
    assert calls[2] == (sorted(bench.evaluator.loaded.stack.pairs), "expert_kl", "expert_kl", 0)
    np.testing.assert_array_equal(merged.examples, bench.test.of_masks(bench.plain[None], 0.6)[[0, 0]])


def test_random_adapters_take_the_place_of_the_adapters(bench, monkeypatch):
    monkeypatch.setattr(geometry, "random_like", lambda stack, seed: stack)
    scored = make(bench, "random_adapters")
    assert len(scored.examples) == 2
    scale = float(scored.details["note"].split()[1].rstrip(","))
    plain = bench.test.of_masks(bench.plain[None], scale)
    np.testing.assert_array_equal(scored.examples, plain[[0, 0]])
    monkeypatch.undo()
    scored, merge = make(bench, "random_adapters"), bench.evaluator.merge
    scales = scored.details["note"].removeprefix("scale ").split(", ")
    for seed, (scale, correct) in enumerate(zip(scales, scored.examples, strict=True)):
        ingredients = merge.prepare(geometry.random_like(bench.evaluator.loaded.stack, seed))
        known = bench.test.of_masks(bench.plain[None], float(scale), ingredients=ingredients)[0]
        np.testing.assert_array_equal(correct, known)
        assert (correct != bench.test.of_masks(bench.plain[None], float(scale))[0]).any()


def test_sensitivity_changes_one_setting_at_a_time(bench, monkeypatch):
    seen = []

    def search(evaluator, folder, reporter, inputs, scale):
        settings = evaluator.loaded.run.search
        seen.append((settings, evaluator.loaded.sizes("search")[0], folder.name))
        assert sum(int(b.mask.sum()) for b in inputs.batches) == evaluator.loaded.sizes("search").sum()
        return {seed: Finalist(seed, bench.plain, scale, None) for seed in range(settings.seeds)}

    monkeypatch.setattr(control_rows, "search_and_select", search)
    bench.generations = 2
    rows = control_rows.KINDS["sensitivity"].rows(bench)
    for row in rows.values():
        assert row(bench).examples.shape == (2, 54)
    own = dataclasses.replace(bench.evaluator.loaded.run.search, seeds=2, generations=2)
    changed = [
        {
            f.name: value
            for f in dataclasses.fields(s)
            if (value := getattr(s, f.name)) != getattr(own, f.name)
        }
        for s, *_ in seen
    ]
    assert changed == [
        {}, {"population": 2}, {"population": 8}, {"max_pruned": 0.1}, {"max_pruned": 0.4},
        {"sigma0": 0.5}, {"sigma0": 2.0}, {}, {},
    ]  # fmt: skip
    assert [size for _, size, _ in seen] == [10] * 7 + [5, 2] and len({name for *_, name in seen}) == 9


def test_sigma0_changes_at_a_start_that_stays(bench):
    """An automatic start moves along with sigma0: the search would be the same."""
    run = bench.evaluator.loaded.run
    search = dataclasses.replace(run.search, x0="auto", sigma0=0.6)
    bench.evaluator = bench.evaluator.under(dataclasses.replace(run, search=search))
    rows = control_rows.KINDS["sensitivity"].rows(bench)
    changes = {name: row.keywords["changes"] for name, row in rows.items() if isinstance(row, partial)}
    # 7 of 36 modules may be pruned: 3.5 expected, 1.297 deviations of a normal distribution above its mean
    for factor in (0.5, 2):
        held = {"x0": pytest.approx(-0.6 * 1.2967, rel=1e-3)}
        assert changes[f"sensitivity, sigma0 {0.6 * factor:g}"] == {"sigma0": 0.6 * factor, **held}
    assert changes["sensitivity, population 2"] == {"population": 2}


def test_differences_are_to_the_own_plain_merge_and_corrected_over_rows():
    task, half = np.repeat([0, 1], 50), np.tile([1, 0], 50)

    def row(correct, models=1, **more):
        return {"correct": list(map(int, correct)), "values": [0.5] * models, "mean_normalised": 0.5, **more}

    rows = {
        "plain": row(half),
        "found": row(np.ones(100)),
        "random masks": row(half * 2 + (1 - half), 2),  # the second mask gets everything right
        "transfer to sum": row(half, baseline=list(map(int, np.zeros(100)))),
    }
    plain, found, random, transfer = with_differences(rows, Sample(task, np.array([0.5, 0.5])))
    assert "gain" not in plain and "found_better_by" not in found and "found_better_by" not in transfer
    assert [r["gain"]["difference"] for r in (found, random, transfer)] == pytest.approx([0.5, 0.25, 0.5])
    assert random["found_better_by"]["difference"] == pytest.approx(0.25)
    assert random["as_good_as_found"] == 2
    assert all(r["gain"]["p_holm"] == pytest.approx(3 * 2 / 10_001) for r in (found, random, transfer))
    assert random["found_better_by"]["p_holm"] == random["found_better_by"]["p"]
    assert not any("correct" in r or "baseline" in r for r in (plain, found, random, transfer))


def test_the_verdict_on_a_control_is_that_of_the_corrected_test():
    def row(name, difference, p):
        found = {"difference": difference, "low": difference - 0.01, "high": difference + 0.01, "p_holm": p}
        return {"row": name, "values": [0.5], "found_better_by": found}

    found = {"row": "found", "gain": {"difference": 0.1, "low": 0.0, "high": 0.2}}
    _, better, level = sentences(
        [found, row("a", -0.02, 0.2), row("b", -0.02, 0.04), row("c", 0.02, 0.04), row("d", 0.02, 0.2)]
    )
    assert better == "Better than what was found (corrected p below 0.05): b."
    assert level == "Not to be told from it: a; d."


def test_the_command_takes_the_directory_of_a_search(searched, capsys):
    _, path = searched
    assert cli.main(["controls", str(path), "--rows", "random"]) == 0
    printed = capsys.readouterr().out
    assert (
        "random masks" in printed
        and "of 20 as good as found" in printed
        and "from the plain merge" in printed
    )
    assert (path / "plots/controls.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main(["controls", str(path), "--rows", "random", "--json"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text[text.index("{") :]) == json.loads((path / "controls.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "randon"], "unknown control 'randon': did you mean 'random'"),
        (["--seeds", "1"], "1 seed is too few for a deviation: give at least 2 seeds"),
        (["--masks", "5"], "5 random masks are too few"),
        (["--out", "elsewhere"], "leave out --out"),
        (["--set", "search.seeds=2"], "changes a run file"),
    ],
)
def test_bad_input_is_one_line(searched, capsys, arguments, message):
    _, path = searched
    assert cli.main(["controls", str(path), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (path / "controls.jsonl").exists()


def test_a_control_needs_its_splits(demo_run, capsys):
    lacking = dataclasses.replace(
        demo_run.tasks[0], data=dataclasses.replace(demo_run.tasks[0].data, selection=None)
    )
    run = dataclasses.replace(demo_run, tasks=(lacking, *demo_run.tasks[1:]))
    with pytest.raises(
        UserError, match="the control joint_lora needs a selection split, which the data of digit"
    ):
        controls.check(run, ["joint_lora"], 20, 2)
    controls.check(run, ["random", "greedy"], 20, 2)
    assert cli.main(["controls", "demo"]) == 2
    assert "give --out DIR" in capsys.readouterr().err


def test_the_help_names_every_control():
    from enmp_jax.cli import controls as command

    text = " ".join(Path(command.__file__).read_text().split())
    assert all(f"{kind}," in text or f"{kind};" in text for kind in control_rows.KINDS)
