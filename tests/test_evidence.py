"""The evidence script: seeds draw other data, a killed run goes on, and what rows say of themselves."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from enmp_jax.data import redraw
from enmp_jax.data.base import Examples
from enmp_jax.errors import UserError
from enmp_jax.evaluation.loaded_run import load

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import evidence
import evidence_figures
import evidence_kinds
import evidence_overview
import evidence_report
import evidence_suite
import transfer


def examples(contents):
    keys = np.asarray([f"{c:032d}".encode() for c in contents], "S32")
    labels = np.asarray(contents, np.int32)
    return Examples({"image": labels[:, None]}, labels, (), keys)


def tasks():
    """Two tasks that share contents 20 to 39, a repeated row in the first."""
    return {
        "a": {"search": examples([*range(20), 3]), "selection": examples(range(20, 40))},
        "b": {"search": examples(range(40, 60)), "selection": examples(range(20, 40))} | {"test": "as it is"},
    }


def contents(drawn, task, split):
    return drawn[task][split].labels.tolist()


def test_seeds_draw_disjoint_and_different_splits():
    seen = set()
    for seed in range(1, 6):
        drawn = redraw(tasks(), seed, {})
        for task in ("a", "b"):
            search, selection = (contents(drawn, task, s) for s in ("search", "selection"))
            whole = [x for s in ("search", "selection") for x in tasks()[task][s].labels.tolist()]
            assert sorted(search + selection) == sorted(whole)
        # also across tasks, which may hold the same images
        every = {s: {*contents(drawn, "a", s), *contents(drawn, "b", s)} for s in ("search", "selection")}
        assert not every["search"] & every["selection"]
        assert drawn["b"]["test"] == "as it is"
        seen.add(tuple(contents(drawn, "b", "search")))
    assert len(seen) == 5
    assert contents(redraw(tasks(), 1, {}), "a", "search") == contents(redraw(tasks(), 1, {}), "a", "search")


def test_a_smaller_limit_is_part_of_a_larger_one():
    small, large = (redraw(tasks(), 1, {"search": n, "selection": n}) for n in (3, 7))
    for split in ("search", "selection"):
        assert len(contents(small, "b", split)) == 3
        assert set(contents(small, "b", split)) < set(contents(large, "b", split))


def test_a_run_file_draws_by_its_seed_and_keeps_the_test_split(demo_run, demo_loaded):
    runs = [
        dataclasses.replace(demo_run, evaluation=dataclasses.replace(demo_run.evaluation, seed=seed))
        for seed in (1, 2)
    ]
    first, second = (load(run).examples for run in runs)
    for i in range(len(demo_run.tasks)):
        own = {split: set(found[i].keys.tolist()) for split, found in first.items()}
        assert len(own["search"]) == 10 and len(own["selection"]) == 8
        assert not own["search"] & own["selection"] and not own["search"] & own["test"]
        assert own["search"] != set(second["search"][i].keys.tolist())
        assert own["test"] == set(demo_loaded.examples["test"][i].keys.tolist())


def arguments(out, **given):
    defaults = {
        "suite": "demo", "out": out, "set": "main", "columns": ["plain", "ours, continuous"],
        "methods": ["sum"], "seeds": 2, "examples": [4], "test": 5,
    }  # fmt: skip
    return argparse.Namespace(**defaults | given)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def counted(monkeypatch):
    """A suite of no cost, whose rows can be made to fail; what was measured."""
    seen = []

    def measure(group, column, known):
        seen.append((group.seed, column["kind"]))
        if len(seen) == dies_at.get("row"):
            raise KeyboardInterrupt
        return {"test": 0.5, "seconds": 0.0}

    dies_at = {}
    monkeypatch.setattr(evidence, "measure", measure)
    monkeypatch.setattr(evidence, "Suite", lambda *_: None)
    monkeypatch.setattr(evidence, "Group", lambda suite, method, seed, n: argparse.Namespace(seed=seed))
    return seen, dies_at


def test_a_killed_run_does_no_row_twice(counted, tmp_path):
    (seen, dies_at), out = counted, tmp_path / "rows.jsonl"
    dies_at["row"] = 3
    with pytest.raises(KeyboardInterrupt):
        evidence.run(arguments(out))
    assert len(rows(out)) == 2
    evidence.run(arguments(out))
    expected = [(0, "plain"), (0, "weights"), (1, "plain")]
    assert seen == [*expected, (1, "plain"), (1, "weights")]
    assert [(r["seed"], r["column"]) for r in rows(out)] == [
        (seed, column) for seed in (0, 1) for column in ("plain", "ours, continuous")
    ]
    evidence.run(arguments(out))
    assert len(seen) == 5


def test_rows_of_no_method_come_last_and_once(counted, tmp_path):
    out = tmp_path / "rows.jsonl"
    evidence.run(arguments(out, seeds=1, methods=["sum", "tsv"], columns=["joint LoRA", "plain"]))
    assert [(row["method"], row["column"]) for row in rows(out)] == [
        ("sum", "plain"), ("-", "joint LoRA"), ("tsv", "plain"),
    ]  # fmt: skip


def test_a_line_cut_short_is_done_again(counted, tmp_path):
    (seen, _), out = counted, tmp_path / "rows.jsonl"
    evidence.run(arguments(out, seeds=1))
    out.write_text(out.read_text()[:-20])
    evidence.run(arguments(out, seeds=1))
    assert seen == [(0, "plain"), (0, "weights"), (0, "weights")]
    assert [row["column"] for row in evidence_report.read(out)] == ["plain", "ours, continuous"]


def test_a_row_of_other_settings_is_refused(counted, tmp_path):
    seen, _ = counted
    out = tmp_path / "rows.jsonl"
    evidence.run(arguments(out, seeds=1))
    with pytest.raises(UserError, match="demo, sum, 0, plain, 4: the file has this row with other settings"):
        evidence.run(arguments(out, seeds=1, test=6))
    assert len(seen) == 2


def test_rows_count_their_budget_and_read_the_test_split_once(tmp_path, monkeypatch):
    """For real, on the demo: a mask, a search of weights, and one that follows both splits."""
    looks = []
    counts = evidence_kinds.Data.counts

    def counting(self, keep, scale):
        if self.examples == 6 * 5:
            looks.append(len(keep))
        return counts(self, keep, scale)

    monkeypatch.setattr(evidence_kinds.Data, "counts", counting)
    short = {**evidence.COLUMNS["ours, continuous"], "passes": 12, "curve": True}
    monkeypatch.setitem(evidence.COLUMNS, "ours, continuous", short)
    monkeypatch.setitem(
        evidence.COLUMNS, "ours, cross-fit", {**evidence.COLUMNS["ours, cross-fit"], "passes": 30}
    )
    out = tmp_path / "rows.jsonl"
    columns = ["plain", "first-order", "ours, continuous", "ours, cross-fit"]
    evidence.run(arguments(out, columns=columns, seeds=1))
    plain, mask, weights, both = rows(out)
    assert len(looks) == 4 and looks[:2] == [1, 1] and looks[3] == 1
    assert plain["example_evaluations"] == 0 and plain["pruned"] == []
    assert mask["example_evaluations"] == np.ceil(3.5 * 24)
    assert weights["steps"] == 2  # two more, and a look, would cost 17 passes
    assert weights["example_evaluations"] == (3.5 * 2 + 2) * 24
    assert both["steps"] == 3 and both["example_evaluations"] == (3.5 * 3 + 2) * 2 * 24
    assert np.asarray(weights["keep"]).shape == np.asarray(both["keep"]).shape == (6, 4, 6)
    assert all(cost <= weights["example_evaluations"] for cost, _ in weights["curve"])
    assert {row["scale"] for row in (plain, mask, weights)} == {plain["scale"]}


def test_one_mask_scores_alone_as_among_others():
    suite = evidence_suite.Suite("demo", 5)
    group = evidence_kinds.Group(suite, "ties", 0, 4)
    data = group.data("search", {"method": "ties", "density": 0.4})
    keep = np.random.default_rng(0).random((2, *suite.layers.shape)) > 0.3
    alone, among = data.counts(keep[1:], 0.7), data.counts(keep, 0.7)
    np.testing.assert_array_equal(alone.correct[0], among.correct[1])
    for one, many in zip(alone, among, strict=True):
        np.testing.assert_allclose(one[0], many[1], rtol=1e-5, atol=1e-5)
    assert not np.allclose(among.value[0], among.value[1], atol=1e-3)


def test_labels_and_the_experts_answers_tune_the_plain_merge_on_the_same_scores(monkeypatch):
    group = evidence_kinds.Group(evidence_suite.Suite("demo", 5), "sum", 0, 4)
    data, counts, scored = group.data("search", {"method": "sum"}), evidence_kinds.Data.counts, []
    every, grid = group.suite.layers.all_kept(), data.evaluator.loaded.run.merge.scale_grid
    wanted = {
        judge: data.score(np.stack([every] * len(grid)), np.asarray(grid), judge).argmax()
        for judge in ("margin", "expert_margin")
    }

    def counting(*args):
        scored.append(args)
        return counts(*args)

    monkeypatch.setattr(evidence_kinds.Data, "counts", counting)
    for fitness, judge in (("accuracy", "margin"), ("expert_margin", "expert_margin")):
        assert group.tuned(fitness) == [{"method": "sum"}, grid[wanted[judge]]]
    assert len(scored) == 1


def test_what_is_found_is_tried_by_the_other_methods_and_seeds():
    def row(method, seed, column="ours, binary", **more):
        return {"suite": "s", "column": column, "examples": 4, "method": method, "seed": seed, **more}

    found = [
        row("sum", 0, keep=[1]),
        row("tsv", 0, keep=[0]),
        row("sum", 1, keep=[0]),
        row("sum", 0, "plain"),
    ]
    wanted = [
        (r["method"], r["seed"], r["used_method"], r["used_seed"])
        for r in transfer.pairs(found, ["ours, binary"])
    ]
    assert wanted == [("sum", 0, "tsv", 0), ("sum", 0, "sum", 1), ("tsv", 0, "sum", 0), ("sum", 1, "sum", 0)]
    scores = [(0.52, 0.5, 0.54), (0.43, 0.4, 0.45), (0.61, 0.6, 0.6), (0.45, 0.4, 0.47)]
    measured = [
        row(method, seed, used_method=used, used_seed=other, moved=moved, plain=plain, own=own,
            split="test" if method != used else "search")
        for (method, seed, used, other), (moved, plain, own) in zip(wanted, scores, strict=True)
    ]  # fmt: skip
    matrix, seeds = (part.splitlines() for part in transfer.table(measured).split("\n\n"))
    assert matrix[0] == "| s, ours, binary: found with, used with | tsv | sum |"
    assert matrix[2:] == ["| tsv | (own +4.0) | +1.0 |", "| sum | +2.0 | (own +0.0) |"]
    assert seeds[2:] == ["| sum | 2 | +4.0 | 12.7 | +6.0 |"]


def test_figures_show_intervals_from_three_seeds_on_and_share_their_axis():
    rows = [
        {"column": column, "examples": n, "seed": seed, "test": 0.5 + 0.01 * seed + extra}
        for n, seeds in ((4, 3), (50, 2))
        for seed in range(seeds)
        for column, extra in (("plain", 0.0), ("plain, no labels", 0.2))
    ]
    figure = evidence_figures.rungs(rows)
    labelled, unlabelled = figure.axes
    assert labelled.get_ylim() == unlabelled.get_ylim()
    for ax, extra in ((labelled, 0.0), (unlabelled, 0.2)):
        (line,) = ax.containers
        (bars,) = line.lines[2]
        lengths = [path.vertices[1, 1] - path.vertices[0, 1] for path in bars.get_paths()]
        # Student's t of 2 degrees of freedom: 4.303; the deviation is 0.01
        assert lengths == pytest.approx([2 * 4.303 * 0.01 / np.sqrt(3), 0], rel=1e-3)
        np.testing.assert_allclose(
            np.asarray(line.lines[0].get_ydata(), float), [0.51 + extra, 0.505 + extra]
        )
    assert len(figure.legends) == 1 and not any(ax.get_legend() for ax in figure.axes)


def test_an_overview_compares_equal_seeds():
    def row(method, seed, column, test):
        return {"suite": "s", "examples": 4, "method": method, "seed": seed, "column": column, "test": test}

    made = [
        row("sum", 0, "plain", 0.5), row("sum", 1, "plain", 0.6), row("sum", 1, "plain, no labels", 0.55),
        row("tsv", 0, "plain", 0.5), row("sum", 0, "paper", 0.52), row("tsv", 0, "paper", 0.51),
        row("sum", 0, "ours, continuous", 0.54), row("sum", 1, "ours, continuous", 0.66),
        row("tsv", 0, "ours, continuous", 0.52), row("sum", 1, "ours, continuous, no labels", 0.56),
        row("-", 0, "joint LoRA", 0.9), row("sum", 0, "masks by margin", 0.1),
    ]  # fmt: skip
    lines = evidence_overview.overview([r | {"search": 0.5} for r in made]).split("\n\n")[0].splitlines()
    assert lines[0] == "| s, 4 examples a task | sum | tsv | mean | ahead of paper |"
    assert lines[2:] == [
        "| plain | 0.550 (2) | 0.500 (1) | | |",
        "| plain, no labels | 0.550 (1) |  | | |",
        "| paper | +2.0 (1) | +1.0 (1) | +1.5 | +0.0 |",
        "| ours, continuous | +5.0 (2) | +2.0 (1) | +3.5 | +1.5 |",
        "| ours, continuous, no labels | +1.0 (1) |  | +1.0 |  |",
    ]


def test_an_overview_has_intervals_over_the_seeds_that_all_methods_have():
    tests = {("sum", 0): 0.52, ("sum", 1): 0.53, ("sum", 2): 0.54, ("tsv", 0): 0.54, ("tsv", 1): 0.55}
    rows = [
        {"suite": "s", "examples": 4, "method": method, "seed": seed, "column": column, "test": value}
        for (method, seed), test in tests.items()
        for column, value in (("plain", 0.5), ("paper", test))
    ]
    assert "| paper | +3.0 (3) | +4.5 (2) | +3.8 | +0.0 |" in evidence_overview.overview(rows)
    rows += [rows[-1] | {"seed": 2, "column": column, "test": 0.5 + more} for column, more in
             (("plain", 0.0), ("paper", 0.06))]  # fmt: skip
    # means of both methods by seed: 3, 4, 5; Student's t of 2 degrees of freedom 4.303
    assert "| paper | +3.0 (3) | +5.0 (3) | +4.0 ± 2.5 | +0.0 ± 0.0 |" in evidence_overview.overview(rows)


def test_an_overview_tells_of_the_methods_with_most_seeds():
    gains = {("sum", 0): 1, ("sum", 1): 2, ("sum", 2): 3, ("tsv", 0): 3, ("tsv", 1): 4, ("tsv", 2): 5}
    rows = [
        {"suite": "s", "examples": 4, "method": method, "seed": seed, "column": column, "test": value / 100}
        for (method, seed), gain in gains.items()
        for column, value in (("plain", 50), ("paper", 51), ("ours, continuous", 50 + gain))
    ]
    assert "seeds |" not in evidence_overview.overview(rows)  # there is nobody with fewer
    rows += [row | {"method": "iso"} for row in rows if row["method"] == "sum" and row["seed"] < 2]
    rows.append(rows[0] | {"column": "random"})
    _, table = evidence_overview.overview(rows).split("\n\n")
    assert table.splitlines() == [
        "| s, 4 examples a task: sum, tsv, 3 seeds | mean | ahead of paper |",
        "|---|---|---|",
        "| paper | +1.0 ± 0.0 | +0.0 ± 0.0 |",
        "| ours, continuous | +3.0 ± 2.5 | +2.0 ± 2.5 |",  # by seed 2, 3, 4
    ]


def test_an_overview_has_sizes_fitnesses_and_strategies():
    def row(column, test, seed=0, examples=4, search=0.0):
        return {
            "suite": "s", "method": "-" if "joint" in column else "tsv", "seed": seed, "column": column,
            "examples": examples, "test": test, "search": search, "example_evaluations": 1000 + seed,
        }  # fmt: skip

    made = [
        row("plain", 0.5, examples=50), row("plain", 0.5), row("plain", 0.6, seed=1),
        row("refined, no labels", 0.7, examples=50), row("joint LoRA", 0.4), row("joint LoRA", 0.5, seed=1),
        row("masks by margin", 0.51, search=0.1), row("masks by margin", 0.63, seed=1, search=0.2),
        row("weights by margin", 0.54, search=0.3),
        row("strategy de", 0.52), row("strategy de", 0.61, seed=1),
        row("strategy swap", 0.53), row("strategy swap", 0.7, seed=1) | {"skipped": "no"},
    ]  # fmt: skip
    tables = evidence_overview.overview(made).split("\n\n")
    first, second, sizes, kinds, strategies = (table.splitlines() for table in tables)
    assert first[0].startswith("| s, 4 examples") and second[0].startswith("| s, 50 examples")
    assert sizes[0] == "| s, tsv: examples a task | 4, labels | 50, labels | 4, none | 50, none |"
    assert sizes[2] == "| plain | 0.550 (2) | 0.500 (1) |  |  |"
    assert "| refined |  |  |  | 0.700 (1) |" in sizes
    assert sizes[-1] == "| joint LoRA from the base | 0.450 (2) |  |  |  |"
    assert kinds[2:] == ["| margin | +15.0 ± 7.1 | +2.0 ± 1.4 | +30.0 | +4.0 |"]
    assert strategies[2:] == ["| swap | +3.0 | 1,000 |", "| de | +1.5 ± 0.7 | 1,000 |"]
