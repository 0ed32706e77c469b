"""Plots, report and tables from the files of a run directory."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
import yaml
from matplotlib.legend import Legend

from enmp_jax.errors import UserError
from enmp_jax.evaluation.fitness import FITNESS
from enmp_jax.io.progress import make_reporter
from enmp_jax.report import data as report_data
from enmp_jax.report import plots, tables, terminal, write

TASKS = ("cars", "dtd", "sun397", "a <very> long task & name")


def make_run(path, seeds=1, granularity="layer", layers=12, tasks=TASKS, fitness="accuracy"):
    """A run directory as ``enmp search`` leaves it, with made-up figures."""
    rng = np.random.default_rng(0)
    path.mkdir(parents=True, exist_ok=True)
    lines = []
    for seed in range(seeds):
        best = -np.inf
        for generation in range(20):
            values = 0.70 + 0.004 * generation + 0.02 * rng.normal(size=16)
            best = max(best, float(values.max()))
            record = {
                "seed": seed, "generation": generation, "masks_evaluated": 16 * (generation + 1),
                "distinct_masks": 15 * (generation + 1), "best": best, "mean": float(values.mean()),
                "fitness": [float(v) for v in values], "pruned": [3] * 16, "scale": [0.5] * 16,
            }  # fmt: skip
            lines.append(json.dumps(record))
    (path / "history.jsonl").write_text("\n".join(lines) + "\n")
    pruned = [[0, tasks[1]], [3, tasks[1]], [layers - 1, tasks[0]], [5, tasks[3]]]
    finer = {}
    if granularity == "projection":
        names = [f"enc.{{}}.attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        pruned = [[layer, name, task] for layer, task in pruned for name in names[: 1 + layer % 3]]
        finer = {"projections": names}
    mask = {
        "granularity": granularity,
        "pruned": pruned,
        "scale": 0.5,
        "tasks": list(tasks),
        "layers": layers,
    }
    (path / "mask.json").write_text(json.dumps(mask | finer))
    reference = {task: 0.85 + 0.02 * i for i, task in enumerate(tasks)}
    merged = {task: 0.8 * value - 0.03 * i for i, (task, value) in enumerate(reference.items())}
    enmp = {task: value + (0.05 if i else -0.01) for i, (task, value) in enumerate(merged.items())}
    mean = {
        k: float(np.mean([s[t] / reference[t] for t in tasks]))
        for k, s in (("merged", merged), ("enmp", enmp))
    }
    scores = {
        "split": "test", "tasks": list(tasks), "reference": reference, "base": dict.fromkeys(tasks, 0.1),
        "merged": merged, "enmp": enmp, "mean_normalised": mean, "pruned": pruned, "scale": 0.5, "seed": 0,
        "seeds": [
            {"seed": s, "mean_normalised": mean["enmp"], "gain": 0.05 - 0.01 * s, "pruned": 4,
             "search": 0.8, "selection": 0.79}
            for s in range(seeds)
        ],
        "gain": {"mean": 0.04, "std": 0.01 if seeds > 1 else None}, "modules": layers * len(tasks),
        "masks_evaluated": 320 * seeds, "distinct_masks": 300, "masks_per_second": 41.5,
        "scale_grid": {"0.4": 0.69, "0.5": 0.71},
        "splits": {
            which: dict.fromkeys(tasks, n)
            for which, n in (("search", 200.0), ("selection", 100.0), ("test", 400.0))
        },
    }  # fmt: skip
    (path / "scores.json").write_text(json.dumps(scores))
    data = {
        "source": "npz:digits.npz",
        "train": "train",
        "search": "search",
        "selection": "val",
        "test": "test",
    }
    config = {
        "base": {"model": "some/base", "dtype": "float32"},
        "tasks": [{"name": task, "adapter": f"adapters/{i}", "data": data} for i, task in enumerate(tasks)],
        "merge": {"method": "ties", "space": "full", "scale": "auto", "density": 0.4, "gamma": None},
        "search": {"strategy": "cma_es", "population": 16, "generations": 20, "fitness": fitness},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {"enmp_jax": "0.1.0", "packages": {"jax": "0.10.2"}, "devices": ["cpu"], "cpu_count": 2}
    (path / "environment.json").write_text(json.dumps(environment))
    return path


class Page(HTMLParser):
    """Checks nesting; collects links, images and text."""

    VOID = ("meta", "img", "source", "link", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.urls, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "iframe")
        self.urls += [value for key, value in attrs if key in ("src", "srcset", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.mark.parametrize(("seeds", "granularity"), [(1, "layer"), (3, "projection")])
def test_plots_and_report_end_to_end(tmp_path, seeds, granularity):
    run = make_run(tmp_path / "run", seeds, granularity)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    written = write.write_plots(run)
    assert sorted(p.name for p in written) == ["accuracies.png", "convergence.png", "mask.png"]
    for plot in written:
        image = matplotlib.image.imread(plot)
        assert image.shape[0] > 200
        assert image.shape[1] > 500
        assert image[..., :3].std() > 0.02
    page = Page(write.write_report(run).read_text(encoding="utf-8"))
    assert len(page.urls) == 6  # three pictures, light and dark
    assert all(url.startswith("data:image/png;base64,") for url in page.urls)
    assert "url(" not in "".join(page.words)
    for words in (
        "a <very> long task & name", "68.0 (80.0)", "cma_es", "ties", "jax", "npz:digits.npz", "test (400)",
        "4 of 48" if granularity == "layer" else "of 48", "layers 0",
    ):  # fmt: skip
        assert words in page.text, words
    assert ("Over 3 seeds the gain is +4.0 ± 1.0 points" in page.text) == (seeds == 3)
    # nothing of the run was touched, nothing half written left behind
    assert {
        p.name: p.read_bytes() for p in run.iterdir() if p.is_file() and p.name != "report.html"
    } == before
    assert not list(run.rglob("*.tmp"))
    # again over what is there
    write.write_plots(run)
    write.write_report(run)


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
    count, of = data.pruned_share()
    assert count.sum() == 4
    assert count[0, 1] == count[3, 1] == count[11, 0] == count[5, 3] == 1
    assert of == 1
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
    weights = found.weights()
    of = len(names)
    assert weights.shape == (12, 4)
    assert weights[2, 0] == pytest.approx(1 + 0.5 / of)
    assert weights[2, 1] == pytest.approx(1 - 0.75 / of)
    assert weights[3, 1] == 0 if of == 1 else 0 <= weights[3, 1] < 1
    assert weights[4, 2] == 1
    assert sorted(p.name for p in write.write_plots(run)) == [
        "accuracies.png", "convergence.png", "weights.png",
    ]  # fmt: skip
    assert "The weight of each module" in Page(write.write_report(run).read_text(encoding="utf-8")).text


def test_a_pareto_front_is_listed(tmp_path):
    run = make_run(tmp_path / "run")
    assert "Pareto front" not in Page(write.write_report(run).read_text()).text
    scores = json.loads((run / "scores.json").read_text())
    front = [
        {"mean": 0.91, "worst": 0.8125, "pruned": [[0, "cars"]], "scale": 0.5},
        {"mean": 0.9375, "worst": 0.7, "pruned": [], "scale": 0.5},
    ]
    (run / "scores.json").write_text(json.dumps(scores | {"pareto": front}))
    text = Page(write.write_report(run).read_text()).text
    assert "0.9375 0.7000 0 0.5 0.9100 0.8125 1 0.5" in text
    (run / "scores.json").write_text(json.dumps(scores | {"pareto": [{"mean": 1.0}]}))
    with pytest.raises(UserError, match="scores.json is damaged"):
        write.write_report(run)


def test_a_fitness_of_no_known_name_goes_by_its_own(tmp_path):
    run = make_run(tmp_path / "run", fitness="smooth_margin")
    assert report_data.read(run).fitness_label == "smooth margin"
    assert "smooth margin on the search split" in Page(write.write_report(run).read_text()).text
    other = make_run(tmp_path / "other", fitness="expert_margin")
    assert "the margin of the expert's class" in report_data.read(other).fitness_label
    scores = json.loads((other / "scores.json").read_text())
    (other / "scores.json").write_text(json.dumps(scores | {"fitness": "margin"}))
    assert report_data.read(other).fitness_label == "normalised sigmoid of the margin"


def test_every_fitness_has_a_label():
    assert set(report_data.FITNESS_LABELS) == set(FITNESS)


def make_weighted_run(path, seeds=1):
    """A run directory of a gradient search, which finds weights."""
    run = make_run(path)
    lines = [
        {"seed": seed, "step": step, "fitness": [None if step == 3 else 0.7 + 0.01 * step], "best": best,
         "mean": None, "example_evaluations": 3600.0 * step, "selection": None if step % 2 else 0.8}
        for seed in range(seeds)
        for step, best in enumerate([None, *np.linspace(0.7, 0.8, 9 - seed)])
    ]  # fmt: skip
    (run / "history.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    mask = json.loads((run / "mask.json").read_text())
    mask["weights"] = [*([*module, 0.0] for module in mask["pruned"]), [2, "cars", 2.75], [7, "dtd", 0.5]]
    mask["merge"] = {"method": "tsv", "space": "full"}
    (run / "mask.json").write_text(json.dumps(mask))
    scores = json.loads((run / "scores.json").read_text())
    for key in ("masks_evaluated", "distinct_masks", "masks_per_second", "gain"):
        del scores[key]
    scores |= {"weighted": 6, "example_evaluations": 32400.0, "fitness": "margin", "rungs": [{"a": 1}],
               "seeds": [{"seed": seed, "mean_normalised": 0.9, "gain": None, "weighted": 6}
                         for seed in range(seeds)], "scale_grid": {"0.4": None, "0.5": 0.71}}  # fmt: skip
    (run / "scores.json").write_text(json.dumps(scores))
    return run


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_gradient_search_is_reported(tmp_path, capsys, seeds):
    run = make_weighted_run(tmp_path / "run", seeds)
    data = report_data.read(run)
    assert data.plain_fitness == 0.71
    first, second = data.history[:2]
    assert (first.step, first.masks_evaluated, first.selection) == (0, None, 0.8)
    assert np.isnan(first.best) and np.isnan(second.selection) and np.isnan(data.history[3].fitness).all()
    count, of = data.pruned_share()
    assert (count.sum(), of) == (4, 1)  # in both lists, counted once
    axes = plots.convergence(data).axes[0]
    assert axes.get_xlabel().startswith("steps")
    (legend,) = axes.findobj(Legend)
    assert isinstance(legend, Legend)
    assert "selection split" in [text.get_text() for text in legend.get_texts()]
    cells, bar = plots.weights(data).axes
    assert [text.get_text() for text in cells.texts].count("×") == 4
    assert {"2.8", "0.5"} <= {text.get_text() for text in cells.texts}
    assert bar.get_ylim() == (0.0, 2.75)
    norm = cells.collections[0].norm
    assert np.allclose(np.asarray(norm(np.array([0.0, 1.0, 2.75]))), [0, 0.5, 1])
    write.write_plots(run)
    text = Page(write.write_report(run).read_text(encoding="utf-8")).text
    for words in ("points with 6 modules weighted", "6 of 48 modules weighted, 4 of them pruned",
                  "32,400", "Weights of modules", "each step of the gradient search"):  # fmt: skip
        assert words in text, words
    assert ("modules weighted mean normalised" in text) == (seeds == 2)
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
        "Fitness on the search split against",
        "Which modules were pruned:",
        "its own expert",
    ):
        assert words in text
