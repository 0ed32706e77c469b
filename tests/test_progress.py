"""What commands say on the way, to people, machines and trackers."""

import importlib
import io
import json
import sys
from types import ModuleType

import pytest

from enmp_jax.cli import main as cli
from enmp_jax.cli import output
from enmp_jax.config.run_file import SUITES
from enmp_jax.io import progress, trackers
from enmp_jax.io.progress import Meter, Progress, Reporter, advance_lines, make_reporter


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_rates_and_time_left_count_from_the_end_of_compiling(clock):
    meter = Meter()
    assert meter.facts(Progress(0, 10, 0.1)) == ["best 0.1000"]
    clock[0] += 500  # compiling
    assert meter.facts(Progress(1, 10, 0.2, masks=8, examples=800, spent=800)) == [
        "best 0.2000", "800 example-evaluations",
    ]  # fmt: skip
    clock[0] += 2
    assert meter.facts(Progress(3, 10, 0.3, masks=24, examples=2400, spent=2400)) == [
        "best 0.3000", "8 masks/s", "800 examples/s", "2400 example-evaluations", "0:07 left",
    ]  # fmt: skip


def test_a_budget_may_end_before_the_generations(clock):
    meter = Meter()
    meter.facts(Progress(1, 1000, 0.2, spent=100, budget=1000))
    clock[0] += 10
    facts = meter.facts(Progress(2, 1000, 0.2, spent=200, budget=1000))
    assert facts[1:] == ["20% of the budget of 1000 example-evaluations", "1:20 left"]


def test_another_search_begins_anew(clock):
    meter = Meter()
    meter.facts(Progress(4, 8, 0.2, seed=0, examples=50))
    clock[0] += 10
    assert meter.facts(Progress(2, 8, 0.2, seed=1, examples=20)) == ["best 0.2000"]


def test_lines_come_every_tenth_and_every_minute(clock):
    said = []
    advance = advance_lines(said.append)
    for done in range(1, 101):
        advance(Progress(done, 100, 0.5))
    assert len(said) == 11 and said[0].startswith("search: generation 1 of 100, best 0.5000")
    assert "generation 100 of 100" in said[-1]
    said.clear()
    for done in range(2, 5):  # of a million: slow ones
        clock[0] += 61
        advance(Progress(done, 1_000_000, 0.5))
    assert len(said) == 3


@pytest.mark.parametrize(("quiet", "machine"), [(False, False), (False, True), (True, False)])
def test_where_lines_go_without_a_terminal(quiet, machine, capsys):
    with make_reporter(quiet, machine) as reporter:
        reporter.say("hello")
        reporter.advance(Progress(1, 1, 0.5))
    out, err = capsys.readouterr()
    assert ("hello" in out, "hello" in err) == (not quiet and not machine, machine)
    assert ("best 0.5000" in out + err) is not quiet


def test_the_bar_of_a_terminal_shows_the_facts(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with make_reporter() as reporter:
        reporter.advance(Progress(3, 8, 0.25, seed=1, spent=90))
        reporter.say("[brackets] stay")
    shown = screen.getvalue()
    assert "search, seed 1" in shown and "3/8" in shown and "best 0.2500, 90 example-evaluations" in shown
    assert "[brackets] stay" in shown


def search(tmp_path, *more):
    few = [f"--set=evaluation.{split}_examples=8" for split in ("search", "selection", "test")]
    quick = ["search.strategy=cma_es", "merge.scale=0.5", "search.population=4", "search.generations=2"]
    few += [f"--set={setting}" for setting in (*quick, "export.formats=[adapters]")]
    arguments = ["search", "demo", "--out", str(tmp_path / "out"), "--seeds=1", *few]
    return cli.main([*arguments, *more])


class Fake(ModuleType):
    """Stands for any tracker's module; ``calls`` is what was logged."""

    def __init__(self, broken=False):
        super().__init__("tracker")
        self.calls, self.settings, self.ended, self.broken = [], {}, 0, broken

    def begin(self, **settings):
        print("a tracker that chats")  # as some do, on standard output
        if self.broken:
            raise ConnectionError("no network")
        self.settings = settings
        return self

    init = start_run = begin

    def SummaryWriter(self, directory):
        return self.begin(directory=directory)

    def define_metric(self, *_, **__):
        pass

    set_experiment = log_dict = define_metric

    def log(self, metrics, step=None):
        metrics = dict(metrics)
        self.calls.append((metrics.pop("step", step), metrics))

    def log_metrics(self, metrics, step):
        self.log(metrics, step)

    def add_scalar(self, name, value, step):
        self.log({name: value}, step)

    def finish(self):
        self.ended += 1

    close = end_run = finish


def test_a_search_with_a_tracker_prints_json_and_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", fake := Fake())
    assert search(tmp_path, "--tracker", "wandb", "--json") == 0
    out, err = capsys.readouterr()
    scores = json.loads(out)
    assert scores["out"] == str(tmp_path / "out") and "loading" in err and "chats" in err
    history = [json.loads(line) for line in (tmp_path / "out/history.jsonl").read_text().splitlines()]
    for (step, logged), line in zip(fake.calls, history):
        assert step == line["generation"] + 1
        assert logged["search/best"] == pytest.approx(line["best"])
        assert logged["search/mean"] == pytest.approx(line["mean"])
        assert logged["search/example_evaluations"] == line["example_evaluations"]
    assert len(fake.calls) == 3 and fake.ended == 1 and fake.settings["config"]["search"]["population"] == 4
    final = fake.calls[-1][1]
    assert final["test/mean_normalised/enmp"] == scores["mean_normalised"]["enmp"]
    assert final["test/merged/digit"] == scores["merged"]["digit"]


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_every_tracker_is_told_the_same(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, trackers.TRACKERS[name].modules[0], fake := Fake())
    seen = []
    with trackers.tracking(name, tmp_path / "run", {"a": 1}, Reporter(seen.append, seen.append)) as tracked:
        tracked.reporter.advance(now := Progress(2, 4, 0.5, mean=0.25, spent=6, seed=3))
        tracked.final({"enmp": {"dtd": 0.75}, "tasks": ["dtd"]})
    assert seen == [now] and fake.ended == 1
    logged = {(step, key): value for step, metrics in fake.calls for key, value in metrics.items()}
    assert logged == {
        (2, "search/seed-3/best"): 0.5, (2, "search/seed-3/mean"): 0.25,
        (2, "search/seed-3/example_evaluations"): 6.0, (0, "test/enmp/dtd"): 0.75,
    }  # fmt: skip


def test_a_tracker_that_fails_is_told_of_once_and_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", Fake(broken=True))
    said, seen = [], []
    with trackers.tracking("trackio", tmp_path, {}, Reporter(said.append, seen.append)) as tracked:
        for done in (1, 2):
            tracked.reporter.advance(Progress(done, 2, 0.5))
    assert said == ["trackio has failed and is left out from here on: no network"] and len(seen) == 2


def test_a_tracker_that_is_missing_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert search(tmp_path, "--tracker", "mlflow") == 2
    error = capsys.readouterr().err
    assert error == "enmp search: --tracker mlflow: it is not installed; pip install mlflow\n"
    assert not (tmp_path / "out").exists()


def test_a_merge_prints_json(tmp_path, capsys):
    adapters = [f"--adapter={task}={SUITES / 'demo/adapters' / task}" for task in ("digit", "even")]
    assert cli.main(["merge", *adapters, "--method=sum", f"--out={tmp_path / 'm'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(tmp_path / "m")


@pytest.mark.parametrize("name", sorted(set(cli.COMMANDS) - {"init", "completion"}))  # those print files
def test_every_command_that_prints_a_result_has_json_and_slow_ones_quiet(name):
    arguments = importlib.import_module(f"enmp_jax.cli.{name}").Args
    assert issubclass(arguments, output.Json)
    assert issubclass(arguments, output.Output) or name in ("merge", "inspect", "verify", "report", "doctor")
