"""Two processes on this machine give the files that one process gives."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from enmp_jax.config.run_file import SUITES
from enmp_jax.devices.distributed import Job, find_job
from enmp_jax.errors import UserError

RUN = """
base: {{model: {suites}/demo/base, allow_mismatch: true}}
tasks:
{tasks}
merge: {{method: mean, scale: 0.5}}
search: {{population: 4, generations: {generations}, sigma0: 1.0, finalists: 2, checkpoint_every: 1,
         fitness: log_likelihood}}
evaluation: {{batch_size: 16, search_examples: 8, selection_examples: 8, test_examples: 8{mesh}}}
"""
TASK = """  - name: {name}
    adapter: {suites}/demo/adapters/{name}
    reference: 0.8
    data: {{source: "npz:{suites}/demo/digits.npz", search: search, selection: selection, test: test{more}}}
"""


def write_run(path, generations=2, mesh=""):
    tasks = "".join(
        TASK.format(name=name, suites=SUITES, more=more)
        for name, more in (("digit", ""), ("mirrored", ", transforms: [mirror]"))
    )
    path.write_text(RUN.format(suites=SUITES, tasks=tasks, generations=generations, mesh=mesh))
    return path


def search(run, out, processes=1, extra=()):
    return launch(["search", str(run), "--out", str(out), *extra], processes)


def launch(arguments, processes=1, by_environment=False):
    """Exit codes and outputs of all processes, told of each other by flags or by their environment."""
    started = start(arguments, processes, by_environment)
    outputs = [process.communicate(timeout=240)[0] for process in started]
    return [process.returncode for process in started], outputs


def start(arguments, processes=1, by_environment=False):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "XLA_FLAGS"))}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    # nearly all of the time is compiling: quickly, and each program once
    environment |= {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command, started = [sys.executable, "-m", "enmp_jax.cli", *arguments], []
    for i in range(processes):
        job = {"coordinator": f"127.0.0.1:{port}", "processes": str(processes), "process-id": str(i)}
        job = job if processes > 1 else {}
        flags = [] if by_environment else [part for k, v in job.items() for part in (f"--{k}", v)]
        named = {f"ENMP_{k.replace('-', '_').upper()}": v for k, v in job.items()} if by_environment else {}
        started.append(
            subprocess.Popen(
                [*command, *flags], env=environment | named,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    return started


def start_code(code, *arguments):
    """Two processes of a program that is told the coordinator and its number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, address, str(i), *arguments], text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip


def contents(out):
    scores = json.loads((out / "scores.json").read_text())
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return json.loads((out / "mask.json").read_text()), scores, history


def assert_close(a, b):
    """Equal, floats to 1e-5; times left out."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a.keys() - {"masks_per_second", "seconds"}:
            assert_close(a[name], b[name])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_close(x, y)
    elif isinstance(a, float):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    else:
        assert a == b


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    path = tmp_path_factory.mktemp("alone")
    codes, outputs = search(write_run(path / "run.yaml"), path / "out")
    assert codes == [0], outputs
    return path / "out"


def test_two_processes_write_what_one_writes(alone, tmp_path):
    """Examples divided over the two; then again from the checkpoint of the first generation."""
    run = write_run(tmp_path / "run.yaml", mesh=", mesh: {population: 1, data: 2}")
    codes, outputs = search(run, tmp_path / "out", processes=2)
    assert codes == [0, 0], outputs
    said = [line for line in outputs[1].splitlines() if line and not line.startswith("[Gloo]")]
    assert said == []  # process 0 alone speaks
    for a, b in zip(contents(alone), contents(tmp_path / "out"), strict=True):
        assert_close(a, b)
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "2")
    (tmp_path / "out" / "scores.json").unlink()
    codes, outputs = search(run, tmp_path / "out", processes=2, extra=["--resume"])
    assert codes == [0, 0] and "goes on after generation 1" in outputs[0], outputs
    for a, b in zip(contents(alone), contents(tmp_path / "out"), strict=True):
        assert_close(a, b)
    assert json.loads((tmp_path / "out" / "environment.json").read_text())["processes"] == 2
    files = {str(p.relative_to(alone)) for p in alone.rglob("*") if "checkpoints" not in p.parts}
    assert files == {
        str(p.relative_to(tmp_path / "out"))
        for p in (tmp_path / "out").rglob("*")
        if "checkpoints" not in p.parts
    }


@pytest.mark.parametrize(
    ("number", "own", "other"),
    [(signal.SIGKILL, -9, 1), (signal.SIGTERM, 143, 143)],
)
def test_one_of_two_ends_and_so_does_the_other(tmp_path, number, own, other):
    """Within a minute and with one line; one process alone then finishes the search."""
    run, out = write_run(tmp_path / "run.yaml", 60, ", mesh: {population: 1, data: 2}"), tmp_path / "out"
    processes = start(["search", str(run), "--out", str(out)], 2)
    deadline = time.monotonic() + 240
    saved = out / "checkpoints"
    while not any(p.name.isdigit() for p in saved.glob("*")) and time.monotonic() < deadline:
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.05)
    processes[1].send_signal(number)
    clock = time.monotonic()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert time.monotonic() - clock < 60
    assert [process.returncode for process in processes] == [other, own], outputs
    said = [line for line in outputs[0].splitlines() if line.startswith("enmp search: ")]
    assert len(said) == 1 and "--resume" in said[0] and "Traceback" not in outputs[0], outputs[0]
    codes, outputs = search(write_run(tmp_path / "run.yaml", 60), out, extra=["--resume"])
    assert codes == [0] and "goes on after generation" in outputs[0], outputs
    assert len((out / "history.jsonl").read_text().splitlines()) == 60


WAITS = """
import sys, time
from enmp_jax.cli import boundary
from enmp_jax.devices import distributed

def work():
    distributed.initialize(distributed.Job(sys.argv[1], 2, int(sys.argv[2])))
    distributed.barrier("both are here")
    print("here", flush=True)
    if sys.argv[2:] == ["1", "collective"]:
        distributed.barrier("the other does not come")
    time.sleep(60)

boundary.guarded("enmp search", work)
"""


@pytest.mark.parametrize("doing", ["collective", "own work"])
def test_without_the_coordinator_the_other_ends_with_a_line(doing):
    """In a collective it raises, elsewhere jaxlib aborts: either may be first."""
    started = start_code(WAITS, doing)
    for process in started:
        assert "here\n" in iter(process.stdout.readline, "")
    started[0].kill()
    error = started[1].communicate(timeout=50)[1]
    started[0].communicate()
    said = [line for line in error.splitlines() if line.startswith("enmp search: another process has ended")]
    assert started[1].returncode == 1 and len(said) == 1, error


def test_two_processes_evaluate_as_one(alone, tmp_path):
    arguments = ["evaluate", "--split", "selection", "--mask", str(alone / "mask.json"), "--json"]
    codes, outputs = launch([*arguments, str(write_run(tmp_path / "one.yaml"))])
    assert codes == [0], outputs
    run = write_run(tmp_path / "two.yaml", mesh=", mesh: {population: 1, data: 2}")
    codes, both = launch([*arguments, str(run)], 2, by_environment=True)
    assert codes == [0, 0], both
    assert_close(*(json.loads(text[text.index("{\n") :]) for text in (outputs[0], both[0])))
    assert "{" not in both[1]  # process 0 alone answers


def test_bad_input_stops_all_processes_with_a_line(alone, tmp_path):
    codes, outputs = search(write_run(tmp_path / "run.yaml"), alone, processes=2)
    assert codes == [2, 2], outputs
    assert "is not empty" in outputs[0]


FAILS = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from enmp_jax.devices.distributed import all_or_none

def work():
    if jax.process_index() == 1:
        raise OSError("no space left on device")

try:
    all_or_none(work)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_an_oserror_on_one_process_stops_the_other():
    said = [process.communicate(timeout=120)[0] for process in start_code(FAILS)]
    assert "UserError process 1 stopped: its own message says why" in said[0]
    assert "OSError no space left on device" in said[1]


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, None),
        ({"ENMP_COORDINATOR": "h:1", "ENMP_PROCESSES": "4", "ENMP_PROCESS_ID": "3"}, Job("h:1", 4, 3)),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "2"}, Job()),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "8"}, None),  # an allocation, but not started by srun
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, Job()),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"ENMP_DISTRIBUTED": "1"}, Job()),
    ],
)
def test_which_job_the_environment_names(environment, job):
    assert find_job(environment=environment) == job


def test_flags_win_over_the_environment():
    environment = {"ENMP_COORDINATOR": "h:1", "ENMP_PROCESSES": "4", "ENMP_PROCESS_ID": "3"}
    assert find_job("other:2", None, 0, environment) == Job("other:2", 4, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h:1", None, None), "needs --processes and --process-id too"),
        (("h:1", 2, 2), r"process-id 2 is not in 0\.\.1"),
        (("h", 2, 1), "must be HOST:PORT"),
    ],
)
def test_jobs_that_cannot_be(arguments, message):
    with pytest.raises(UserError, match=message):
        find_job(*arguments, environment={})
