"""What the page says beyond the scores: intervals, effects, seeds, splits, controls, methods, exports."""

import json
import math
import re

import pytest
from report_files import TASKS, add_all, make_run
from test_report import Page, page_of

from enmp_jax.cli import main as cli
from enmp_jax.errors import UserError
from enmp_jax.report import charts, figures, words, write
from enmp_jax.report.data import read


def facts_of(run):
    """What the script tells of each cell."""
    text = (run / "report.html").read_text()
    return json.loads(re.search(r'id="modules-data">(.*?)</script>', text).group(1))["facts"]


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_run_with_everything_is_told_whole(tmp_path):
    run = add_all(make_run(tmp_path / "run", seeds=3))
    text = page_of(run).text
    for said in (
        "gain, 95 % interval +1.2 to +7.0",
        "-1.0 to +9.0",  # of each task
        "4 of 48 modules pruned. Most were taken from dtd (2), and in layer 0 (1). Nothing was taken",
        "search: climbed on 70.0 80.0 +10.0",
        "test: never seen 70.0 74.0 +4.0",
        "Is it more than luck? What was found is +4.1 points",
        "random masks 75.0 1.0 -1.0 -3.0 to +1.0",
        "Other merge methods",
        "ties, full 0.5",
        "Left out: lego, full: not these ranks",
        "one LoRA adapter of rank 16; it misses the merge by 3.0 % and was scored itself: 79.0 %",
    ):
        assert said in text, said
    names = {path.name for path in write.write_plots(run)}
    assert {"compare.svg", "controls.svg", "compare.png", "controls.png"} <= names


def test_cells_know_effects_and_seeds(tmp_path):
    run = add_all(make_run(tmp_path / "run", seeds=3))
    page_of(run)
    kept, loo, first, seeds = facts_of(run)
    assert kept["values"][1][0] == "left out" and kept["values"][0][0] == "merged"
    # module i is (layer, task) in that order: of layer 2, task 1 number 9
    assert loo["values"][1][2] == f"{100 * (0.001 * 9 - 0.01):+.2f}" == "-0.10" and "alone" in loo["before"]
    assert first["values"][1][2] == "+0.10" and "first order" in first["before"]
    assert "margin" in first["after"] and "accuracy" in loo["after"]
    # the first of the pruned modules is left out by seed 0 only, the third by all
    pruned = json.loads((run / "mask.json").read_text())["pruned"]
    often = [seeds["values"][TASKS.index(task)][layer] for layer, task in pruned]
    assert often == ["1", "2", "3", "3"] and seeds["after"] == " of 3 seeds"


def test_projections_have_rows_of_their_own(tmp_path):
    run = add_all(make_run(tmp_path / "run", seeds=3, granularity="projection"))
    page = page_of(run)
    assert page.text.count("q_proj k_proj v_proj") >= 1 and page.text.count("v_proj") >= len(TASKS)
    assert all(len(fact["values"]) == 3 * len(TASKS) for fact in facts_of(run))
    # layer 5, projection 2, task 1, in that order
    module = (5 * 3 + 2) * len(TASKS) + 1
    assert facts_of(run)[1]["values"][1 * 3 + 2][5] == f"{100 * (0.001 * module - 0.01):+.2f}"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, "Leaving out 4 of 48 LoRA modules makes the merged model better"),
        (
            {"gain": (-0.01, 0.02)},
            "Leaving out 4 of 48 LoRA modules may help: the gain is within what chance can do",
        ),
        ({"enmp": 0.1}, "Leaving out 4 of 48 LoRA modules did not help on the test split"),
        ({"weighted": 48}, "Weighting 48 LoRA modules makes the merged model better"),
        ({"pruned": []}, "Another scale makes the merged model better"),
    ],
)
def test_the_headline_says_no_more_than_the_data(tmp_path, change, line):
    scores = json.loads((make_run(tmp_path / "run") / "scores.json").read_text())
    gain = dict(zip(("low", "high"), change.pop("gain", (0.01, 0.02))))
    if "enmp" in change:
        scores["mean_normalised"]["enmp"] = change.pop("enmp")
    assert words.headline(scores | change, gain) == line


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("effects.json", {"effects": [[0, "cars"]]}, "effects.json is damaged"),
        ("effects.json", {"effects": [["0", "cars", 1.0]]}, "effects.json is damaged"),
        ("seeds.json", {"0": {}}, "seeds.json is damaged"),
        ("test-answers.json", {"gain": {"enmp": {"difference": 1}}}, "test-answers.json is damaged"),
        (
            "controls.json",
            {"rows": [{"row": "found", "mean_normalised": 0.5, "values": []}]},
            "controls.json is damaged",
        ),
        ("compare.json", {"rows": [{"method": "ties"}]}, "compare.json is damaged"),
        ("compare.json", {"tasks": [], "rows": [], "left_out": "lego"}, "compare.json is damaged"),
        ("scores.json", {"fitness_on": {"test": 1}}, "scores.json is damaged"),
    ],
)
def test_damage_beside_the_results_is_one_line(tmp_path, name, changes, message):
    run = add_all(make_run(tmp_path / "run"))
    edit(run / name, **changes)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        write.write_report(run)
    assert "\n" not in str(error.value)


def test_modules_of_another_mask_are_left_out(tmp_path):
    """Effects of layers and tasks that the mask does not have are none of its cells."""
    run = add_all(make_run(tmp_path / "run"))
    edit(run / "effects.json", effects=[[99, "cars", 0.1], [0, "boats", 0.1], [0, "q_proj", "cars", 0.1]])
    page_of(run)
    assert all(value is None for row in facts_of(run)[1]["values"] for value in row)


def test_several_runs_on_one_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    add_all(make_run(tmp_path / "a"))
    add_all(make_run(tmp_path / "b"))
    make_run(tmp_path / "old")
    answers = {task: {"merged": "0110", "enmp": "1111"} for task in TASKS}
    edit(tmp_path / "b" / "test-answers.json", answers=answers)
    assert cli.main(["report", "a", "b", "old"]) == 0
    page = Page((tmp_path / "comparison.html").read_text())
    assert capsys.readouterr().out == "comparison.html\n"
    assert "best of 3 runs" in page.text and "Against a" in page.text
    # one of four examples more in every task, by references of 0.85, 0.87, 0.89 and 0.91
    gain = sum(0.25 / (0.85 + 0.02 * i) for i in range(4)) / 4
    assert f"b {100 * gain:+.1f}" in page.text
    assert not (tmp_path / "a" / "report.html").exists()
    # a task of completions: the likelihood of a token, of answers that have 8 tokens together
    for run, total in (("a", -16.0), ("b", -4.0)):
        own = {"merged": [-4.0] * 4, "enmp": [total / 4] * 4}
        edit(
            tmp_path / run / "test-answers.json",
            answers=answers | {TASKS[0]: own},
            tokens={TASKS[0]: [2, 2, 1, 3]},
        )
    assert cli.main(["report", "a", "b", "--out", "tokens.html"]) == 0
    gain = (math.exp(-4 / 8) - math.exp(-16 / 8)) / 0.85 / 4
    assert f"b {100 * gain:+.1f}" in Page((tmp_path / "tokens.html").read_text()).text
    # other test data: no paired difference
    edit(tmp_path / "b" / "fingerprints.json", **{f"the test data of {TASKS[0]}": "other"})
    assert cli.main(["report", "a", "b", "--out", "two.html"]) == 0
    assert "Against a" not in Page((tmp_path / "two.html").read_text()).text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "give the directory"),
        (["a", "a"], "a is given twice"),
        (["a", "--out", "x.html"], "leave out --out"),
        (["a", "none"], "is not a directory"),
    ],
)
def test_reports_that_cannot_be(tmp_path, monkeypatch, capsys, given, message):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a")
    assert cli.main(["report", *given]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))


def test_a_table_made_later_comes_onto_the_page(tmp_path):
    run = make_run(tmp_path / "run")
    assert "Is it more than luck" not in page_of(run).text
    result = json.loads((add_all(run) / "controls.json").read_text())
    write.write_table(run, "controls", figures.controls(result))
    assert "Is it more than luck" in Page((run / "report.html").read_text()).text
    assert (run / "plots" / "controls.svg").exists() and not (run / "plots" / "mask.svg").exists()
    # where no search has finished there is no page yet
    write.write_table(tmp_path, "controls", figures.controls(result))
    assert not (tmp_path / "report.html").exists()


def test_ticks_are_round_and_few():
    assert charts.ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert charts.ticks(71.3, 74.4, 4) == [72.0, 73.0, 74.0]
    assert charts.short(250_000) == "250k" and charts.short(1.5e6) == "1.5M" and charts.short(7) == "7"


def test_an_older_run_lacks_what_it_did_not_keep(tmp_path):
    run = make_run(tmp_path / "run")
    assert read(run).beside.gain == {} and read(run).beside.controls is None
    text = page_of(run).text
    for absent in ("interval", "Is it more than luck", "Other merge methods", "Files to take away", "Seeds"):
        assert absent not in text
