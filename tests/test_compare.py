"""``enmp compare``: the same figures as ``enmp evaluate``, each row made once."""

import dataclasses
import json

import numpy as np
import pytest
import yaml

import enmp_jax as enmp
from enmp_jax.cli import main as cli
from enmp_jax.config.schema import to_dict
from enmp_jax.config.sections import MergeConfig
from enmp_jax.errors import UserError
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.io.progress import SILENT
from enmp_jax.report.terminal import print_comparison
from enmp_jax.runs import compare, tuning
from enmp_jax.runs.compare import compare_run
from enmp_jax.runs.evaluate import evaluate_run


@pytest.fixture
def one_load(monkeypatch, demo_loaded):
    """No time spent on loading the demo again."""

    def load(run, *given):
        return dataclasses.replace(demo_loaded, run=run)

    for module in ("compare", "evaluate"):
        monkeypatch.setattr(f"enmp_jax.runs.{module}.load", load)


def few(run, *scales):
    return dataclasses.replace(run, merge=dataclasses.replace(run.merge, scale_grid=scales))


def test_rows_are_what_separate_evaluations_say(one_load, demo_run, monkeypatch):
    read, test = [], []
    score, inputs = Evaluator.score, Evaluator.inputs
    monkeypatch.setattr(tuning, "GRIDS", {"density": (0.2,)})

    def remembered(self, split, *given):
        made = inputs(self, split, *given)
        test.extend([made.batches] if split == "test" else [])
        return made

    def counted(self, given, keep, scale, plan=None):
        read.extend(len(keep) for batches in test if batches is given.batches)
        return score(self, given, keep, scale, plan)

    monkeypatch.setattr(Evaluator, "inputs", remembered)
    monkeypatch.setattr(Evaluator, "score", counted)
    result = compare_run(demo_run, None, SILENT, ["sum", "ties"], ["full", "core"])
    assert read == [1, 1, 1, 1], "the test split is read once a row"
    assert {(r["method"], r["space"]) for r in result["rows"]} == {
        (m, s) for m in ("sum", "ties") for s in ("full", "core")
    }
    means = [r["mean_normalised"]["merged"] for r in result["rows"]]
    assert means == sorted(means, reverse=True)
    for row in (
        r for r in result["rows"] if (r["method"], r["space"]) in (("sum", "full"), ("ties", "core"))
    ):
        merge = MergeConfig(
            row["method"], row["space"], scale_grid=(0.3, 0.6), hyperparameters=row["hyperparameters"]
        )
        alone = evaluate_run(dataclasses.replace(demo_run, merge=merge), "test", None, None, False, SILENT)
        assert row["scale"] == alone["scale"]
        assert row["merged"] == pytest.approx(alone["merged"], abs=1e-6)
        assert row["mean_normalised"]["merged"] == pytest.approx(alone["mean_normalised"]["merged"], abs=1e-6)
        assert result["reference"] == pytest.approx(alone["reference"], abs=1e-6)


def test_what_is_best_on_the_search_split_is_chosen(one_load, demo_run, monkeypatch):
    """Of equal ones the first, which is the default; what breaks the model is passed over."""
    fitness = {0.4: 0.5, 0.1: 0.7, 0.2: np.nan}

    def choose(evaluator, inputs, scoring):
        value = fitness[evaluator.loaded.run.merge.hyperparameters["density"]]
        if np.isnan(value):
            raise UserError("no finite fitness")
        return 0.3, {0.3: value}

    monkeypatch.setattr(tuning, "choose_scale", choose)
    evaluator = Evaluator(dataclasses.replace(compare.load(demo_run)))
    among = tuning.candidates(demo_run, "ties", "full")
    assert [m.hyperparameters["density"] for m in among] == [0.4, 0.1, 0.2], "the run's own value comes first"
    inputs = evaluator.inputs("search")
    assert tuning.tune(evaluator, inputs, among).evaluator.loaded.run.merge.hyperparameters == {
        "density": 0.1
    }
    fitness[0.4] = 0.7
    assert tuning.tune(evaluator, inputs, among).evaluator.loaded.run.merge.hyperparameters == {
        "density": 0.4
    }
    with pytest.raises(UserError, match="no finite fitness"):
        tuning.tune(evaluator, inputs, among[2:])


def test_a_value_that_a_method_refuses_is_passed_over(one_load, demo_run):
    """DELLA's drop rate of the grid, 0.9, leaves no room for its own spread of rates."""
    assert 0.9 in [m.hyperparameters["drop_rate"] for m in tuning.candidates(demo_run, "della", "full")]
    (row,) = compare_run(few(demo_run, 0.3), None, SILENT, ["della"], ["full"])["rows"]
    assert row["hyperparameters"]["drop_rate"] < 0.9


def test_a_method_that_cannot_merge_is_left_out_unless_asked_for(one_load, demo_run, monkeypatch, capsys):
    make = Evaluator.under

    def under(self, run):
        if run.merge.method == "ties":
            raise UserError("ties: not these")
        return make(self, run)

    monkeypatch.setattr(Evaluator, "under", under)
    monkeypatch.setattr(compare, "method_space_pairs", lambda *_: [("ties", "full"), ("sum", "full")])
    result = compare_run(few(demo_run, 0.3), None, SILENT)
    assert [row["method"] for row in result["rows"]] == ["sum"]
    assert result["left_out"] == {"ties, full": "ties: not these"}
    print_comparison(result)
    assert "Left out: ties, full: ties: not these" in capsys.readouterr().out
    with pytest.raises(UserError, match="ties: not these"):
        compare_run(few(demo_run, 0.3), None, SILENT, ["ties", "sum"])
    monkeypatch.setattr(compare, "method_space_pairs", lambda *_: [("ties", "full")])
    with pytest.raises(UserError, match="no method can merge these adapters: ties: not these"):
        compare_run(few(demo_run, 0.3), None, SILENT)


def test_every_method_is_compared_in_every_space_that_it_has():
    pairs = compare.method_space_pairs((), ())
    assert set(pairs) == {(m, s) for m in enmp.merges.METHODS for s in enmp.merges.SPACES} - set(
        enmp.merges.REFUSED
    )
    assert compare.method_space_pairs(["dare-ties"], ["core"]) == [("dare_ties", "core")]
    with pytest.raises(UserError, match="did you mean 'ties'"):
        compare.method_space_pairs(["teis"], ())
    with pytest.raises(UserError, match="nothing to compare"):
        compare.method_space_pairs(["lego"], ["core"])


def test_an_interrupted_comparison_makes_no_row_twice(one_load, demo_run, monkeypatch, tmp_path):
    run, made, make = few(demo_run, 0.3), [], compare._make_row

    def stops(*given):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(given)
        return make(*given)

    monkeypatch.setattr(compare, "_make_row", stops)
    arguments = tmp_path / "out", SILENT, ["sum", "mean"], ["full"]
    with pytest.raises(KeyboardInterrupt):
        compare_run(run, *arguments)
    with (tmp_path / "out/compare.jsonl").open("a") as file:
        file.write('{"row": "mean full", "set')  # the half of a line

    again = []
    monkeypatch.setattr(compare, "_make_row", lambda *given: again.append(given) or make(*given))
    result = compare_run(run, *arguments)
    assert len(again) == 1 and {row["method"] for row in result["rows"]} == {"sum", "mean"}
    assert json.loads((tmp_path / "out/compare.json").read_text()) == result
    compare_run(run, *arguments)
    assert len(again) == 1

    # one line where the settings are others
    with pytest.raises(UserError, match="other settings for merge"):
        compare_run(few(demo_run, 0.6), *arguments)
    monkeypatch.setattr(tuning, "GRIDS", {})
    compare_run(run, *arguments)  # sum and mean have no hyperparameter
    with pytest.raises(UserError, match="row sum full was made with other settings for --search"):
        compare_run(run, *arguments, search=True)
    lines = (tmp_path / "out/compare.jsonl").read_text().splitlines()
    (tmp_path / "out/compare.jsonl").write_text("\n".join([lines[0][:50], lines[1], ""]))
    with pytest.raises(UserError, match="damaged in line 1"):
        compare_run(run, *arguments)


def test_searches_are_a_column_of_their_own(one_load, demo_run, monkeypatch, tmp_path):
    search = dataclasses.replace(
        demo_run.search,
        strategy="gradient",
        fitness="margin",
        generations=2,
        check_every=1,
        learning_rate=0.3,
    )
    run = dataclasses.replace(few(demo_run, 0.3), search=search)
    # on so few examples the plain merge may win: what is asked here is what a row of weights looks like
    monkeypatch.setattr("enmp_jax.runs.subsearch.with_plain", lambda evaluator, found, scale: found)
    (row,) = compare_run(run, tmp_path / "out", SILENT, ["sum"], ["full"], search=True)["rows"]
    assert row["weighted"] > 0 and row["mean_normalised"].keys() == {"merged", "enmp"}
    assert row["enmp"].keys() == row["merged"].keys()
    assert (tmp_path / "out/searches/sum-full/history.jsonl").exists()

    def refuses(*given):
        raise UserError("the fitness does not change")

    monkeypatch.setattr(compare, "search_and_select", refuses)
    (row,) = compare_run(run, None, SILENT, ["mean"], ["full"], search=True)["rows"]
    assert row["note"] == "the fitness does not change" and "enmp" not in row


def test_the_command_prints_a_table_and_keeps_it(one_load, demo_run, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_dict(few(demo_run, 0.3))))
    out = tmp_path / "out"
    command = [
        "compare",
        str(tmp_path / "run.yaml"),
        "--out",
        str(out),
        "--methods",
        "sum",
        "--spaces",
        "full",
    ]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "search fitness" in printed and "mirrored" in printed
    assert (out / "plots/compare.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main([*command, "--json"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text[text.index("{") :]) == json.loads((out / "compare.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--methods", "teis"], "did you mean 'ties'"),
        (["demo", "--spaces", "ful"], "did you mean 'full'"),
        (["demo", "--out", "{tmp}"], "is not empty"),
        (["{tmp}"], "no directory of a finished search"),
        (["{tmp}", "--set", "merge.method=sum"], "changes a run file"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, message):
    (tmp_path / "file").write_text("")
    assert cli.main(["compare", *(a.format(tmp=tmp_path) for a in arguments)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
