"""A search that survives: signals, numbers that are none, memory that is short, errors in one line."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import transformers

from enmp_jax.cli import boundary
from enmp_jax.cli import main as command_line
from enmp_jax.data.tokenizer import load_tokenizer
from enmp_jax.errors import Stopped, UserError
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.io import signals
from enmp_jax.io.progress import SILENT
from enmp_jax.report import write
from enmp_jax.runs import evolve, rehearsal
from enmp_jax.runs.directory import RunDirectory
from enmp_jax.runs.search import draw, search_run
from enmp_jax.search import loop


def searched(loaded, out, resume=False, say=lambda line: None, **settings):
    search = dataclasses.replace(loaded.run.search, **settings)
    run = dataclasses.replace(loaded.run, search=search)
    evaluator = Evaluator(dataclasses.replace(loaded, run=run), say)
    inputs, scoring = evaluator.inputs("search"), evaluator.scoring("search")
    with RunDirectory(out, resume, say=say) as directory:
        directory.start(run)
        reporter = SILENT._replace(say=say)
        found = evolve.evolve(evaluator, directory, reporter, inputs, scoring, 0.5)
    return found, [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(demo_loaded, tmp_path_factory):
    return searched(demo_loaded, tmp_path_factory.mktemp("whole") / "run")


def same(a, b):
    assert a[1] == b[1]
    for x, y in zip(a[0].finalists, b[0].finalists, strict=True):
        assert (x.keep == y.keep).all() and (x.search, x.scale) == (y.search, y.scale)
    drop = {"masks_per_second"}
    assert {k: v for k, v in a[0].cost.items() if k not in drop} == {
        k: v for k, v in b[0].cost.items() if k not in drop
    }


def test_a_signal_saves_the_search_where_it_is(demo_loaded, whole, tmp_path, monkeypatch):
    """Even where no checkpoint was due; the resumed search is the undisturbed one."""
    told = RunDirectory.append_history

    def append(directory, record):
        told(directory, record)
        if record["generation"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append_history", append)
        with pytest.raises(Stopped) as stopped, handled(monkeypatch):
            searched(demo_loaded, tmp_path / "run", checkpoint_every=100)
    assert stopped.value.signal == signal.SIGTERM
    assert signals.GO_ON in stopped.value.__notes__
    said = []
    again = searched(demo_loaded, tmp_path / "run", resume=True, say=said.append, checkpoint_every=100)
    assert "goes on after generation 2" in said
    same(again, whole)


def handled(monkeypatch):
    monkeypatch.setattr(signals, "_watch", lambda *given: None)  # nobody ends the tests
    return signals.handled("test")


def test_outside_of_a_search_a_signal_ends_the_work_at_once(monkeypatch):
    for number in signals.SIGNALS:
        before = signal.getsignal(number)
        with pytest.raises(Stopped), handled(monkeypatch):
            os.kill(os.getpid(), number)
            time.sleep(5)
        assert signal.getsignal(number) is before


def test_a_signal_while_a_library_reads_a_file_is_not_taken_for_its_error(tmp_path, monkeypatch):
    def told(*given, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", told)
    with pytest.raises(Stopped), handled(monkeypatch):
        load_tokenizer(tmp_path)


STUCK = """
import sys, time
from enmp_jax.cli import boundary
from enmp_jax.io import signals
signals.GRACE_SECONDS = 0.5
def work():
    with signals.saving():
        print("ready", flush=True)
        import hashlib
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)  # as a device does, it lets no handler of Python run
sys.exit(boundary.guarded("enmp search", work))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_process_that_cannot_listen_ends_in_time(number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, error = process.communicate(timeout=10)
    assert process.returncode == code
    assert error.count("\n") == 1 and signal.Signals(number).name in error and "--resume" in error


def test_an_interrupt_while_modules_are_imported_is_one_line(monkeypatch, capsys):
    def importing(name):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(command_line.importlib, "import_module", importing)
    assert command_line.main(["search", "demo", "--out", "never"]) == 130
    assert capsys.readouterr().err == "enmp search: interrupted\n"


def test_an_interrupted_search_says_how_it_goes_on(demo_loaded, tmp_path, capsys):
    def work():
        with RunDirectory(tmp_path / "run", say=lambda line: None) as directory:
            directory.start(demo_loaded.run)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    assert boundary.guarded("enmp search", work) == 130
    assert capsys.readouterr().err == f"enmp search: interrupted; {signals.GO_ON}\n"


ABORTS = """
import ctypes, sys, threading, time
from enmp_jax.cli import boundary
from enmp_jax.devices import survivor
from enmp_jax.io import signals
def work():
    survivor.aborts_with_a_line()
    if sys.argv[1] == "ending":
        survivor.ends_with(2)
    with signals.saving():
        threading.Thread(target=ctypes.CDLL(None).abort).start()  # as the agent of jaxlib does
        time.sleep(10)
sys.exit(boundary.guarded("enmp search", work))
"""


@pytest.mark.parametrize(
    ("when", "code", "said"),
    [
        ("waiting", 1, "enmp search: another process has ended or cannot be reached (JAX says more above); "
         "--resume goes on from what is saved\n"),
        ("ending", 2, ""),  # the main thread says its own line
    ],
)  # fmt: skip
def test_an_abort_of_jaxlib_ends_with_a_line(when, code, said):
    command = [sys.executable, "-c", ABORTS, when]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (code, said)


def test_what_the_end_cannot_write_is_said_before_the_search(demo_run, tmp_path, monkeypatch):
    def card(*given):
        raise ValueError("no card of such names")

    monkeypatch.setattr(rehearsal, "model_card", card)
    monkeypatch.setattr("enmp_jax.runs.search.choose_scale", lambda *given: pytest.fail("it has begun"))
    with pytest.raises(UserError, match="could not be written: no card of such names"):
        search_run(demo_run, tmp_path / "run", SILENT)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_report_that_fails_can_be_repeated(tmp_path, monkeypatch):
    def full(out):
        raise OSError(errno.ENOSPC, "No space left on device")

    said = []
    monkeypatch.setattr(write, "write_all", full)
    draw(tmp_path, SILENT._replace(say=said.append))
    assert len(said) == 1 and "No space left" in said[0] and f"enmp report {tmp_path}" in said[0]


def broken(fitness):
    """Evaluations whose fitness is not a number for some members, by their row."""
    make = evolve.make_evaluate_new

    def other(evaluator, plan):
        evaluate = make(evaluator, plan)

        def score(*given):
            scored = evaluate(*given)
            rows = np.arange(len(scored.fitness))
            return scored._replace(
                fitness=jax.numpy.where(rows < len(fitness), np.float32(fitness[0]), scored.fitness)
            )

        return score

    return other


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_members_without_a_finite_fitness_are_counted_and_rank_last(
    demo_loaded, tmp_path, monkeypatch, value
):
    monkeypatch.setattr(evolve, "make_evaluate_new", broken([value]))
    said = []
    found, lines = searched(demo_loaded, tmp_path / "run", say=said.append)
    assert found.cost["masks_failed"] >= 1
    assert [line for line in said if "no finite fitness" in line]
    assert all(np.isfinite(f.search) for f in found.finalists)
    assert lines[0]["fitness"][0] is None and np.isfinite(lines[0]["best"])


def test_a_generation_without_any_finite_fitness_ends_the_search(demo_loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(evolve, "make_evaluate_new", broken([np.nan] * 4))
    with pytest.raises(
        UserError, match=r"no mask of generation 0 has a finite fitness.*the masks prune .*\(\d"
    ):
        searched(demo_loaded, tmp_path / "run")


def test_out_of_memory_halves_the_members_together(demo_loaded, whole, tmp_path, monkeypatch):
    run = dataclasses.replace(
        demo_loaded.run, evaluation=dataclasses.replace(demo_loaded.run.evaluation, member_chunk=4)
    )
    loaded, make, asked = dataclasses.replace(demo_loaded, run=run), loop.make_step, []

    def short(*given):
        step = make(*given)

        def advance(*more):
            asked.append(True)
            if len(asked) <= failures:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")
            return step.advance(*more)

        return step._replace(advance=advance)

    monkeypatch.setattr(loop, "make_step", short)
    failures, said = 2, []
    again = searched(loaded, tmp_path / "run", say=said.append)
    assert [line for line in said if "out of memory" in line] == [
        "out of memory with 4 members together: trying 2", "out of memory with 2 members together: trying 1"
    ]  # fmt: skip
    for x, y in zip(again[0].finalists, whole[0].finalists, strict=True):
        assert (x.keep == y.keep).all() and x.search == pytest.approx(y.search, rel=1e-5)
    failures = 10
    with pytest.raises(jax.errors.JaxRuntimeError):
        searched(loaded, tmp_path / "other")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "on device (x): free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "look at its permissions"),
        (MemoryError(), 1, "out of memory"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 5 GB"), 1, "evaluation.batch_size"),
        (RecursionError("maximum"), 2, "nested too deeply"),
        (OverflowError("int too large"), 2, "too large"),
        (UserError("bad"), 2, "enmp x: bad"),
        (KeyboardInterrupt(), 130, "enmp x: interrupted"),
        (Stopped(signal.SIGHUP), 129, "ended by SIGHUP"),
        (ZeroDivisionError("0"), 1, "a fault of enmp-jax (ZeroDivisionError: 0): please report it with "),
    ],
)  # fmt: skip
def test_every_error_is_one_line(error, code, line, capsys):
    def work():
        raise error

    assert boundary.guarded("enmp x", work) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and line in said
    assert boundary.guarded("enmp x", work, debug=True) == code
    assert "Traceback" in capsys.readouterr().err
