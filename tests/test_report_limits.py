"""Reports of runs that no picture can show whole, or that are damaged: quick, and in one line."""

import json
import time

import pytest

from enmp_jax.errors import UserError
from enmp_jax.report import write
from enmp_jax.report.data import read
from enmp_jax.report.figures import figures
from enmp_jax.report.limits import PAGE, PICTURE, cut, drawn, shortened
from enmp_jax.report.page import page
from enmp_jax.report.paper import draw, label

LINE = {"seed": 0, "generation": 0, "masks_evaluated": 4, "best": 0.5, "fitness": [0.5, None]}


def run_dir(path, tasks=("a", "b"), layers=2, lines=3, seeds=1, mask=(), scores=(), line=()):
    column = dict.fromkeys(tasks, 0.5)
    pruned = [[layer, tasks[-1]] for layer in range(layers)]
    contents = {
        "config.yaml": "merge: {method: ties}\n",
        "environment.json": "{}",
        "history.jsonl": "".join(
            json.dumps({**LINE, **dict(line), "seed": i % seeds}) + "\n" for i in range(lines)
        ),
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
        ({"tasks": [f"t{i}" for i in range(40)], "layers": 250}, "first 24 of 40 tasks"),
        ({"lines": 50_000}, "about 1000 generations"),
        ({"lines": 3000, "seeds": 1500}, "first 20 of 1500 seeds"),
    ],
)
def test_what_no_picture_shows_is_left_out_and_said(tmp_path, size, note):
    start = time.thread_time()
    data = read(run_dir(tmp_path, **size))
    shown, notes = drawn(data)
    assert len(notes) == 1 and note in notes[0]
    most = PICTURE
    assert shown.mask["layers"] <= most.layers and len(shown.tasks) <= most.tasks
    assert len(shown.by_seed()) <= most.seeds
    for chart in figures(shown).values():
        draw(chart).draw_without_rendering()
    assert time.thread_time() - start < 10
    assert len(shortened(data.scores)[0]["tasks"]) <= 500


def test_the_page_says_what_is_left_out(tmp_path):
    text = page(read(run_dir(tmp_path, tasks=[f"t{i}" for i in range(600)])))
    assert "Pictures show the first 500 of 600 tasks" in text and "table shows the first 500 of 600" in text
    assert "t499<" in text and "t500<" not in text


def test_a_large_run_is_a_page_that_opens(tmp_path):
    """300 tasks in 80 layers, two seeds of 1000 generations with 32 members."""
    tasks = [f"a task of some length, {i}" for i in range(300)]
    members = {"fitness": [0.123456 + i / 1e3 for i in range(32)]}
    data = read(run_dir(tmp_path, tasks=tasks, layers=80, lines=2000, seeds=2, line=members))
    start = time.thread_time()
    text = page(data)
    assert len(text.encode()) < 2_000_000 and time.thread_time() - start < 10
    assert text.count("<td class=c") == PAGE.cells == 300 * 80


def test_names_are_no_formulas(tmp_path):
    """A dollar sign begins one for matplotlib, and a broken formula is an error."""
    tasks = [r"$\frac$", "a$b$c", "x" * 190, "tab\tnew"]
    data = read(run_dir(tmp_path, tasks=tasks))
    for chart in figures(data).values():
        draw(chart).draw_without_rendering()
    assert label("a$b") == r"a\$b" and len(cut("x" * 190)) == 40 and cut("a\nb") == "a b"


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
