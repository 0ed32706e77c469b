"""Searches in processes of their own for ``reliability.py``.

One of two is killed, the other ends, two or one go on. One process with several devices finds what it
finds with one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GENERATIONS = 30
SECONDS = 1800.0
"""Given up after so long; a survivor has a minute."""
SETTINGS = {
    "search.strategy": "snes", "search.granularity": "layer", "search.population": 4, "search.seeds": 1,
    "search.generations": GENERATIONS, "search.generations_per_dispatch": 1, "search.checkpoint_every": 1,
    "search.fitness": "log_likelihood", "search.finalists": 2, "evaluation.batch_size": 8,
    "evaluation.search_examples": 4, "evaluation.selection_examples": 4, "evaluation.test_examples": 4,
    "evaluation.mesh": "{population: 2}", "merge.scale": 0.5,
}  # fmt: skip


def start(
    out: Path, count: int = 2, resume: bool = False, devices: int = 2, changes: Mapping[str, Any] = {}
) -> list[subprocess.Popen[str]]:
    """``enmp search demo`` by one process that pretends to have all the devices, or two with half of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices // count)}
    environment |= {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(out.parent / f"programs{count}-{devices}"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "enmp_jax.cli", "search", "demo", "--out", str(out)]
    command += [
        word for key, value in {**SETTINGS, **changes}.items() for word in ("--set", f"{key}={value}")
    ]
    command += ["--resume"] if resume else []
    job = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count), "--process-id"]
    return [
        subprocess.Popen(
            [*command, *([*job, str(i)] if count > 1 else [])],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for i in range(count)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit codes, and what was said on standard error. One that hangs is killed."""
    ends = []
    for process in processes:
        try:
            error = process.communicate(timeout=SECONDS)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            error = process.communicate()[1]
        ends.append((process.returncode, error))
    return ends


def failed(out: Path, whole: Path | None = None, **how: Any) -> str:
    """Search, and compare with the undisturbed search; what went wrong, or nothing."""
    ends = ended(start(out, **how))
    if any(code for code, _ in ends):
        last = [(code, error.strip().rpartition("\n")[2][-200:]) for code, error in ends]
        return f"exit codes and last lines {last}"
    return "another result" if whole and found(out) != found(whole) else ""


def found(out: Path) -> Any:
    """What must be the same: history, mask, and scores."""
    scores = json.loads((out / "scores.json").read_text())
    scores.pop("masks_per_second", None)
    return (out / "history.jsonl").read_text().splitlines(), (out / "mask.json").read_text(), scores


def two_processes(scratch: Path, count: int) -> tuple[int, list[str]]:
    """Kill one of two at a random moment of the search, resume with two, and from the same state with one.

    Args:
        scratch: cases that were done here are not done again.
        count: of cases.

    Returns:
        In how many cases the survivor ended within a minute with one line and exit code 1 and both resumed
        to the same; and notes: what went wrong in the others, how the survivors ended.
    """
    whole, record = scratch / "undisturbed", scratch / "cases.jsonl"
    if not (whole / "scores.json").exists() and (wrong := failed(whole)):
        return 0, [f"undisturbed: {wrong}"]
    record.touch()
    for case in range(len(record.read_text().splitlines()), count):
        shutil.rmtree(scratch / "disturbed", ignore_errors=True)
        line = json.dumps(one_killed(scratch, random.Random(case)))
        with record.open("a") as file:
            file.write(line + "\n")
        print(f"case {case}: {line}", flush=True)
    cases = [json.loads(line) for line in record.read_text().splitlines()]
    notes = [f"case {i}: {'; '.join(case['wrong'])}" for i, case in enumerate(cases) if case["wrong"]]
    ends = ", ".join(case["survivor"] for case in cases)
    return count - len(notes), [*notes, f"exit codes of the survivors: {ends}"]


def one_killed(scratch: Path, rng: random.Random) -> dict[str, Any]:
    """One case: how the survivor ended, and all that went wrong."""
    whole, out, kept = scratch / "undisturbed", scratch / "disturbed", scratch / "kept"
    processes, deadline = start(out), time.monotonic() + SECONDS
    history = out / "history.jsonl"
    while not (history.exists() and history.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1))
    killed = rng.randrange(2)
    processes[killed].kill()
    clock = time.monotonic()
    code, error = ended(processes)[1 - killed]
    seconds = time.monotonic() - clock
    survivor = f"{code} after {seconds:.0f} s (killed: {killed})"
    said = [line for line in error.splitlines() if line.startswith("enmp search: ")]
    wrong = [] if code == 1 and seconds < 60 and len(said) == 1 else [f"{survivor} with {said}"]
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(out, kept)
    for again in (2, 1):
        if what := failed(out, whole, count=again, resume=True):
            wrong.append(f"resumed with {again}: {what}")
        shutil.rmtree(out)
        shutil.copytree(kept, out)
    return {"survivor": survivor, "wrong": wrong}


def devices(scratch: Path, seeds: int) -> tuple[int, int, list[str]]:
    """Searches of the same seed on 4 and 8 devices, divided by members and by examples.

    Returns:
        How many there were, how many found the mask of one device bit for bit, and notes.
    """
    cases, good, exact, notes = 0, 0, 0, []
    for seed in range(seeds):
        changes = {"search.seed": seed, "search.population": 8, "search.generations": 10}
        whole = scratch / f"{seed}-1-1"
        for members, examples in ((1, 1), (4, 1), (1, 4), (8, 1), (2, 4)):
            out, n = scratch / f"{seed}-{members}-{examples}", members * examples
            mesh = {"evaluation.mesh": f"{{population: {members}, data: {examples}}}"}
            wrong = failed(out, count=1, devices=n, changes=changes | mesh)
            if not wrong and n > 1:
                (history, mask, _), (expected, expected_mask, _) = found(out), found(whole)
                wrong = "" if mask == expected_mask else "another mask"
                exact += list(map(_fitness, history)) == list(map(_fitness, expected))
            if wrong:
                notes.append(f"seed {seed} on {n} devices ({members} x {examples}): {wrong}")
            cases, good = cases + (n > 1), good + (n > 1 and not wrong)
    return cases, good, [*notes, f"{exact} of {cases} have every fitness of the history bit for bit too"]


def _fitness(line: str) -> list[float]:
    """Of all members, from a line of the history."""
    return json.loads(line)["fitness"]
