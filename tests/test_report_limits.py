"""Reports of runs that no picture can show whole, or that are damaged: quick, and in one line."""

import json
import time

import pytest

from enmp_jax.errors import UserError
from enmp_jax.report import write
from enmp_jax.report.data import read
from enmp_jax.report.limits import LAYERS, SEEDS, TASKS, as_label, drawn, shortened
from enmp_jax.report.page import page
from enmp_jax.report.plots import LIGHT, plots_of

LINE = {"seed": 0, "generation": 0, "masks_evaluated": 4, "best": 0.5, "fitness": [0.5, None]}


def run_dir(path, tasks=("a", "b"), layers=2, lines=3, seeds=1, mask=(), scores=()):
    column = dict.fromkeys(tasks, 0.5)
    pruned = [[layer, tasks[-1]] for layer in range(layers)]
    contents = {
        "config.yaml": "merge: {method: ties}\n",
        "environment.json": "{}",
        "history.jsonl": "".join(json.dumps(LINE | {"seed": i % seeds}) + "\n" for i in range(lines)),
        "mask.json": json.dumps({"granularity": "layer", "pruned": pruned, "tasks": tasks, "layers": layers,
                                 **dict(mask)}),
        "scores.json": json.dumps({"tasks": tasks, "reference": column, "merged": column, "enmp": column,
                                   "mean_normalised": {"merged": 0.5, "enmp": 0.5}, **dict(scores)}),
    }  # fmt: skip
    for name, text in contents.items():
        (path / name).write_text(text)
    return path


@pytest.mark.parametrize(
    ("size", "note"),
    [
        ({"layers": 20_000}, "first 256 of 20000 layers"),
        ({"tasks": [f"t{i}" for i in range(3000)]}, "first 48 of 3000 tasks"),
        ({"lines": 50_000}, "about 1000 generations"),
        ({"lines": 3000, "seeds": 1500}, "first 20 of 1500 seeds"),
    ],
)
def test_what_no_picture_shows_is_left_out_and_said(tmp_path, size, note):
    start = time.thread_time()
    data = read(run_dir(tmp_path, **size))
    shown, notes = drawn(data)
    assert len(notes) == 1 and note in notes[0]
    assert shown.mask["layers"] <= LAYERS and len(shown.tasks) <= TASKS and len(shown.by_seed()) <= SEEDS
    for plot in plots_of(data).values():
        plot.draw(shown, LIGHT).draw_without_rendering()
    assert time.thread_time() - start < 10
    assert len(shortened(data.scores)[0]["tasks"]) <= 500


def test_the_page_says_what_is_left_out(tmp_path):
    text = page(read(run_dir(tmp_path, tasks=[f"t{i}" for i in range(600)])))
    assert "first 48 of 600 tasks" in text and "first 500 of 600 tasks" in text
    assert "t499<" in text and "t500<" not in text


def test_names_are_no_formulas(tmp_path):
    """A dollar sign begins one for matplotlib, and a broken formula is an error."""
    tasks = [r"$\frac$", "a$b$c", "x" * 190, "tab\tnew"]
    data = read(run_dir(tmp_path, tasks=tasks))
    for plot in plots_of(data).values():
        plot.draw(data, LIGHT).draw_without_rendering()
    assert as_label("a$b") == r"a\$b" and len(as_label("x" * 190)) == 40 and as_label("a\nb") == "a b"


@pytest.mark.parametrize(
    ("mask", "scores", "name"),
    [
        ({"layers": 10**12}, {}, "mask.json"),
        ({"layers": 1e3}, {}, "mask.json"),
        ({"layers": True}, {}, "mask.json"),
        ({"tasks": "ab"}, {}, "mask.json"),
        ({"pruned": [["0", "a"]]}, {}, "mask.json"),
        ({"pruned": [[0.5, "a"]]}, {}, "mask.json"),
        ({}, {"tasks": []}, "scores.json"),
        ({}, {"tasks": ["a", "a"]}, "scores.json"),
        ({}, {"merged": {"a": 1e300, "b": 1}}, "scores.json"),
        ({}, {"merged": {"a": None, "b": 1}}, "scores.json"),
        ({}, {"enmp": {"a": "0.5", "b": 1}}, "scores.json"),
        ({}, {"mean_normalised": {"merged": float("nan"), "enmp": 1}}, "scores.json"),
    ],
)
def test_values_that_cannot_be_drawn_are_damage(tmp_path, mask, scores, name):
    with pytest.raises(UserError, match=f"{name} is damaged"):
        read(run_dir(tmp_path, mask=mask, scores=scores))


def test_a_page_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "page", lambda data: data.scores["nothing"])
    with pytest.raises(UserError, match="do not fit together"):
        write.write_report(run_dir(tmp_path))
    assert not (tmp_path / "report.html").exists()
