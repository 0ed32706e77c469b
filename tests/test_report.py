"""Plots, report and tables from the files of a run directory."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
from report_files import TASKS, make_run, make_weighted_run

from enmp_jax.errors import UserError
from enmp_jax.evaluation.fitness import FITNESS
from enmp_jax.io.progress import make_reporter
from enmp_jax.report import data as report_data
from enmp_jax.report import figures, screen, tables, terminal, write
from enmp_jax.report.charts import Curve, Lines


class Page(HTMLParser):
    """Checks nesting; collects links, marks and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.urls, self.words, self.marks, self.scripts = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        assert tag not in ("link", "iframe", "img")
        self.urls += [value for key, value in attrs if key in ("src", "srcset", "href")]
        self.marks += [given["class"]] if str(given.get("class")).startswith("mark ") else []
        self.scripts += [given.get("type", "text/javascript")] if tag == "script" else []
        if tag == "td" and self.open[-1] == "td":  # its end tag may be left out
            self.open.pop()
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag == "tr" and self.open[-1] == "td":
            self.open.pop()
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += [] if self.open[-1:] in (["script"], ["style"]) else [data]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page_of(run):
    return Page(write.write_report(run).read_text(encoding="utf-8"))


@pytest.mark.parametrize(("seeds", "granularity"), [(1, "layer"), (3, "projection")])
def test_plots_and_report_end_to_end(tmp_path, seeds, granularity):
    run = make_run(tmp_path / "run", seeds, granularity)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    written = write.write_plots(run)
    names = [f"{name}.{kind}" for name in ("convergence", "mask", "tasks") for kind in ("png", "svg")]
    assert sorted(p.name for p in written) == names
    for plot in written:
        if plot.suffix == ".svg":
            assert "<text" in plot.read_text() and "dtd" in (run / "plots/tasks.svg").read_text()
            continue
        image = matplotlib.image.imread(plot)
        assert image.shape[0] > 200
        assert image.shape[1] > 500
        assert image[..., :3].std() > 0.02
    page = page_of(run)
    assert page.urls == [] and page.scripts == ["application/json"] * 2 + ["text/javascript"]
    assert page.marks.count("mark found") == len(TASKS) + 2  # and the mean, and the legend
    for words in (
        "a <very> long task & name", "68.0 (80.0)", "cma_es", "ties", "jax", "npz:digits.npz", "test (400)",
        "Leaving out 4 of 48 LoRA modules makes" if granularity == "layer" else "of 48", "layers 0",
        "enmp search ./run --out ./run-again",
    ):  # fmt: skip
        assert words in page.text, words
    assert ("Over 3 seeds the gain is +4.0 ± 1.0 points" in page.text) == (seeds == 3)
    assert "interval" not in page.text  # an older run knows none
    # nothing of the run was touched, nothing half written left behind
    assert {
        p.name: p.read_bytes() for p in run.iterdir() if p.is_file() and p.name != "report.html"
    } == before
    assert not list(run.rglob("*.tmp"))
    # again over what is there: the same bytes
    first = {p: p.read_bytes() for p in (*written, run / "report.html")}
    write.write_plots(run)
    write.write_report(run)
    assert {p: p.read_bytes() for p in first} == first


def test_table_has_the_figures():
    scores = {
        "split": "test", "tasks": ["a", "b"], "reference": {"a": 0.9, "b": 0.5},
        "merged": {"a": 0.45, "b": 0.5}, "enmp": {"a": 0.81, "b": 0.4},
        "mean_normalised": {"merged": 0.75, "enmp": 0.85}, "pruned": [[0, "a"]],
    }  # fmt: skip
    header, rows = tables.score_rows(scores)
    assert header == ["task", "expert", "merged", "merged + ENMP", "change"]
    assert rows == [
        ["a", "90.0", "45.0 (50.0)", "81.0 (90.0)", "+36.0"],
        ["b", "50.0", "50.0 (100.0)", "40.0 (80.0)", "-10.0"],
        ["mean", "70.0", "47.5 (75.0)", "60.5 (85.0)", "+13.0"],
    ]
    assert tables.verdict(scores).endswith("goes from 75.0 % to 85.0 % (+10.0 points).")
    assert tables.verdict({**scores, "pruned": [], "enmp": scores["merged"]}) == (
        "0 modules pruned: no mask beat the plain merge (75.0 % mean normalised accuracy)."
    )
    # an evaluation without a mask, and of the experts alone
    plain = {key: value for key, value in scores.items() if key not in ("enmp", "pruned")}
    assert tables.score_rows(plain)[0] == ["task", "expert", "merged"]
    alone = {key: scores[key] for key in ("tasks", "reference")}
    assert tables.score_rows(alone)[1][-1] == ["mean", "70.0"]
    assert tables.score_rows({**scores, "reference": {"a": 0.0, "b": 0.5}})[1][0][2] == "45.0"


def test_printed_tables_are_whole_in_a_pipe(capsys, tmp_path):
    scores = json.loads((make_run(tmp_path / "run", 3) / "scores.json").read_text())
    terminal.print_scores(scores)
    out = capsys.readouterr().out
    assert "…" not in out
    for words in (
        "a <very> long task & name", "4 of 48 modules pruned", "pruned  dtd: layers 0, 3", "Over 3 seeds",
        "960 masks evaluated, 300 distinct masks, 41.5 masks per second",
    ):  # fmt: skip
        assert words in out, words
    terminal.print_evaluation(
        {key: scores[key] for key in ("split", "tasks", "reference", "merged", "mean_normalised")}
    )
    assert "sun397" in capsys.readouterr().out


def test_history_is_read_as_written(tmp_path):
    run = make_run(tmp_path / "run", 2)
    lines = (run / "history.jsonl").read_text().splitlines()
    broken = json.loads(lines[0]) | {"fitness": [None, float("nan"), 0.5], "best": 0.5}
    (run / "history.jsonl").write_text("\n".join([json.dumps(broken), *lines[1:]]))
    data = report_data.read(run)
    assert [len(h) for h in data.by_seed().values()] == [20, 20]
    np.testing.assert_array_equal(data.history[0].fitness, [np.nan, np.nan, 0.5])
    assert data.history[1].masks_evaluated == 32
    assert data.plain_fitness == 0.71
    heat = figures.modules(data)
    assert heat.pruned.sum() == 4 and heat.of == 1 and not heat.weighted
    assert heat.text(1, 0) == heat.text(1, 3) == heat.text(0, 11) == heat.text(3, 5) == "×"
    (cloud,) = [c for c in figures.convergence(data).curves if c.shape == "cloud" and c.name]
    assert len(cloud.x) == 20 * 16 - 15 + 2 and cloud.x[0] == 16  # the first generation has three members
    write.write_plots(run)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("scores.json", {"pruned": 3}, "scores.json is damaged"),
        ("scores.json", {"pruned": [[]]}, "scores.json is damaged"),
        ("scores.json", {"seeds": [{"gain": 0.1}]}, "scores.json is damaged: KeyError"),
        ("scores.json", {"scale_grid": {"0.4": "much"}}, "scores.json is damaged"),
        ("scores.json", {"weighted": [1]}, "scores.json is damaged"),
        ("scores.json", {"seeds": [{"seed": 0, "gain": "much"}]}, "scores.json is damaged"),
        ("scores.json", {"splits": {"test": 4}}, "scores.json is damaged"),
        ("scores.json", {"gain": [1]}, "scores.json is damaged"),
        ("mask.json", {"granularity": "head"}, "granularity 'head'"),
        ("mask.json", {"pruned": [["0", "cars"]]}, "mask.json is damaged"),
        ("mask.json", {"pruned": [[0, "q_proj", "cars"]]}, "module 0:q_proj:cars"),
        ("mask.json", {"granularity": "projection"}, "mask.json is damaged: KeyError"),
        (
            "mask.json",
            {"granularity": "projection", "projections": ["q"], "pruned": [[0, "k", "cars"]]},
            "'k'",
        ),
        ("mask.json", {"weights": [[0, "cars", "much"]]}, "mask.json is damaged"),
        ("mask.json", {"weights": [[0, "boats", 0.5]]}, "module 0:boats"),
        ("mask.json", {"weights": [[0, "cars", float("nan")]]}, "weight nan"),
        ("mask.json", {"weights": [[0, "cars", -1]]}, "weight -1"),
    ],
)
def test_run_files_with_wrong_content(tmp_path, name, change, message):
    run = make_run(tmp_path / "run")
    data = json.loads((run / name).read_text())
    (run / name).write_text(json.dumps(data | change))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        report_data.read(run)
    assert "\n" not in str(error.value)
    assert str(run / name) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("scores.json", None, "no scores.json: the search there has not finished"),
        ("scores.json", "{", "scores.json is damaged"),
        ("scores.json", "[]", "must hold a mapping"),
        ("scores.json", '{"tasks": ["a"], "reference": {}}', "scores.json is damaged"),
        ("mask.json", '{"pruned": [[99, "cars"]], "tasks": ["cars"], "layers": 4}', "mask.json is damaged"),
        ("mask.json", None, "no mask.json"),
        ("history.jsonl", '{"generation": 0}\n', "history.jsonl is damaged in line 1"),
        ("history.jsonl", '{"masks_evaluated": 1, "fitness": [0.5]}\n{"masks', "damaged in line 2"),
        ("config.yaml", "a: [", "config.yaml is damaged"),
        ("config.yaml", "search: 3", "config.yaml is damaged"),
        ("config.yaml", "tasks: [cars]", "config.yaml is damaged"),
        ("environment.json", "\xff", "environment.json"),
    ],
)
def test_damaged_run_files(tmp_path, name, content, message):
    run = make_run(tmp_path / "run")
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content.encode("latin-1"))
    for function in (write.write_plots, write.write_report):
        with pytest.raises(UserError, match=re.escape(message)) as error:
            function(run)
        assert "\n" not in str(error.value)
    assert not (run / "plots").exists()
    assert not (run / "report.html").exists()


def test_not_a_run_directory(tmp_path):
    with pytest.raises(UserError, match="is not a directory"):
        write.write_report(tmp_path / "none")
    with pytest.raises(UserError, match="no config"):
        write.write_report(tmp_path)


@pytest.mark.parametrize("granularity", ["layer", "projection"])
def test_weights_of_modules_are_drawn(tmp_path, granularity):
    run = make_run(tmp_path / "run", granularity=granularity)
    data = json.loads((run / "mask.json").read_text())
    names = [[name] for name in data.get("projections", [])] or [[]]
    data["weights"] = [[2, *names[0], "cars", 1.5], [2, *names[-1], "dtd", 0.25]]
    (run / "mask.json").write_text(json.dumps(data))
    found = report_data.read(run)
    heat, whole = figures.modules(found), figures.modules(found, finer=False)
    of = len(names)
    assert whole.values.shape == (4, 12) and heat.values.shape == (4 * of, 12) and heat.weighted
    assert heat.values[0, 2] == 1.5 and heat.values[2 * of - 1, 2] == 0.25
    assert whole.values[0, 2] == pytest.approx(1 + 0.5 / of)
    assert whole.values[1, 2] == pytest.approx(1 - 0.75 / of)
    assert whole.values[1, 3] == 0 if of == 1 else 0 <= whole.values[1, 3] < 1
    assert whole.values[2, 4] == 1 and whole.shade()[2, 4] == 0 and heat.shade().min() == -1
    assert heat.text(0, 2) == "1.5" and heat.text(2 * of - 1, 2) == "0.2"
    assert "weights.png" in [p.name for p in write.write_plots(run)]
    assert "The weight of each module" in page_of(run).text


def test_a_pareto_front_is_listed(tmp_path):
    run = make_run(tmp_path / "run")
    assert "Pareto front" not in page_of(run).text
    scores = json.loads((run / "scores.json").read_text())
    front = [
        {"mean": 0.91, "worst": 0.8125, "pruned": [[0, "cars"]], "scale": 0.5},
        {"mean": 0.9375, "worst": 0.7, "pruned": [], "scale": 0.5},
    ]
    (run / "scores.json").write_text(json.dumps(scores | {"pareto": front}))
    text = page_of(run).text
    assert "0.9375 0.7000 0 0.5 0.9100 0.8125 1 0.5" in text
    (run / "scores.json").write_text(json.dumps(scores | {"pareto": [{"mean": 1.0}]}))
    with pytest.raises(UserError, match="scores.json is damaged"):
        write.write_report(run)


def test_a_fitness_of_no_known_name_goes_by_its_own(tmp_path):
    run = make_run(tmp_path / "run", fitness="smooth_margin")
    assert report_data.read(run).fitness_label == "smooth margin"
    assert "smooth margin, % of the experts" in page_of(run).text
    other = make_run(tmp_path / "other", fitness="expert_margin")
    assert "the margin of the expert's class" in report_data.read(other).fitness_label
    scores = json.loads((other / "scores.json").read_text())
    (other / "scores.json").write_text(json.dumps(scores | {"fitness": "margin"}))
    assert report_data.read(other).fitness_label == "normalised sigmoid of the margin"


def test_every_fitness_has_a_label():
    assert set(report_data.FITNESS_LABELS) == set(FITNESS)


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_gradient_search_is_reported(tmp_path, capsys, seeds):
    run = make_weighted_run(tmp_path / "run", seeds)
    data = report_data.read(run)
    assert data.plain_fitness == 0.71
    first, second = data.history[:2]
    assert (first.step, first.masks_evaluated, first.selection) == (0, None, 0.8)
    assert np.isnan(first.best) and np.isnan(second.selection) and np.isnan(data.history[3].fitness).all()
    heat = figures.modules(data)
    assert (heat.pruned.sum(), heat.of) == (4, 1)  # in both lists, counted once
    chart = figures.convergence(data)
    assert chart.x_label.startswith("example-evaluations")
    assert "selection split" in [curve.name for curve in chart.curves]
    assert sorted(heat.text(*at) for at in np.ndindex(heat.values.shape))[-6:] == ["0.5", "2.8", *"××××"]
    assert np.allclose([heat.shade()[0, 2], heat.shade()[1, 7], heat.shade()[2, 2]], [1, -0.5, 0])
    write.write_plots(run)
    text = page_of(run).text
    for words in ("Weighting 6 of 48 LoRA modules makes", "6 of 48 modules weighted, 4 of them pruned",
                  "32,400", "The weight of each module", "at each step (search split)"):  # fmt: skip
        assert words in text, words
    assert ("modules weighted modules pruned" in text or "modules weighted mean" in text) == (seeds == 2)
    terminal.print_scores(data.scores)
    out = capsys.readouterr().out
    assert "6 of 48 modules weighted" in out and "32,400 example evaluations" in out


def test_weights_are_called_weights():
    scores = {
        "tasks": ["a"], "reference": {"a": 0.9}, "merged": {"a": 0.5}, "enmp": {"a": 0.5},
        "mean_normalised": {"merged": 0.5, "enmp": 0.5}, "modules": 8, "weighted": 0,
    }  # fmt: skip
    assert tables.verdict(scores).startswith("0 of 8 modules weighted: no weights beat the plain merge")
    better = {**scores, "weighted": 5, "enmp": {"a": 0.6}, "mean_normalised": {"merged": 0.5, "enmp": 0.6}}
    assert tables.verdict(better).startswith("5 of 8 modules weighted: mean normalised accuracy")
    assert tables.verdict(better | {"pruned": [[0, "a"]]}).startswith(
        "5 of 8 modules weighted, 1 of them pruned: mean"
    )


def test_a_history_counts_one_thing(tmp_path):
    run = make_weighted_run(tmp_path / "run")
    with open(run / "history.jsonl", "a") as file:
        file.write('{"seed": 0, "masks_evaluated": 8, "fitness": [0.5]}\n')
    with pytest.raises(UserError, match="different things"):
        write.write_plots(run)
    assert not (run / "plots").exists()


def test_a_gain_without_pruning_is_called_one():
    scores = {
        "tasks": ["a"], "reference": {"a": 0.9}, "merged": {"a": 0.5}, "enmp": {"a": 0.5}, "pruned": [],
        "mean_normalised": {"merged": 0.55, "enmp": 0.55}, "modules": 8,
    }  # fmt: skip
    assert "no mask beat the plain merge" in tables.verdict(scores)
    weighted = {**scores, "enmp": {"a": 0.6}, "mean_normalised": {"merged": 0.55, "enmp": 0.66}}
    assert tables.verdict(weighted).startswith("0 of 8 modules pruned: mean normalised accuracy on the test")


NAMES = ("dtd [classes, width]", "cars [/x]", "[bold]sun[/bold]", ":warning: task")


def test_square_brackets_and_colons_are_printed_as_they_are(capsys, monkeypatch, tmp_path):
    scores = json.loads((make_run(tmp_path / "run", 3, tasks=NAMES) / "scores.json").read_text())
    terminal.print_scores(scores)
    terminal.print_evaluation(scores)
    out = capsys.readouterr().out
    for name in NAMES:
        assert out.count(name) >= 2, name
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    with make_reporter() as reporter:
        for name in NAMES:
            reporter.say(name)
    err = capsys.readouterr().err
    for name in NAMES:
        assert name in err


def test_captions_do_not_depend_on_docstrings(tmp_path):
    """``python -OO`` drops docstrings."""
    run = make_run(tmp_path / "run")
    code = (
        f"import pathlib; from enmp_jax.report.write import write_report as w; w(pathlib.Path({str(run)!r}))"
    )
    subprocess.run([sys.executable, "-OO", "-c", code], check=True)
    text = Page((run / "report.html").read_text(encoding="utf-8")).text
    for words in (
        "Fitness of the search against what it paid",
        "Which modules are left out",
        "the task's own adapter",
    ):
        assert words in text


def test_a_run_is_read_once_for_plots_and_page(tmp_path, monkeypatch):
    run, reads = make_run(tmp_path / "run"), []

    def counted(path):
        reads.append(path)
        return report_data.read(path)

    monkeypatch.setattr(write, "read", counted)
    assert write.write_all(run).exists() and (run / "plots/mask.png").exists()
    assert len(reads) == 1


def test_a_long_history_is_told_at_a_bounded_number_of_places():
    x, y = np.arange(5000.0), np.linspace(0.5, 0.6, 5000)
    y[0] = np.nan
    curves = (
        Curve("found", "thin", "best so far", x, y), Curve("found", "thin", "", x, y + 0.1),
        Curve("expert", "squares", "chosen", x[-1:], y[-1:]), Curve("merged", "rule", "plain", x[:1], y[1:2]),
    )  # fmt: skip
    told = screen.readings(Lines("", "masks", "", curves))
    assert len(told["names"]) == len(told["at"]) == screen.MOST_READINGS
    assert (told["names"][0], told["names"][-1]) == ("0 masks", "4,999 masks")
    assert (told["at"][0], told["at"][-1]) == (0, 1000)
    best, chosen, plain = (fact["values"][0] for fact in told["facts"])
    assert best[0] is None and best[-1] == "60.0 to 70.0"
    assert chosen[:-1] == [None] * (screen.MOST_READINGS - 1) and chosen[-1] == "60.0"
    assert set(plain) == {"50.0"}
