"""Two processes of one search for ``reliability.py``: one is killed, the other ends, both go on together."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

GENERATIONS = 30
SECONDS = 300.0
"""Given up after so long."""
SETTINGS = {
    "search.strategy": "snes", "search.granularity": "layer", "search.population": 4, "search.seeds": 1,
    "search.generations": GENERATIONS, "search.generations_per_dispatch": 1, "search.checkpoint_every": 1,
    "search.fitness": "log_likelihood", "search.finalists": 2, "evaluation.batch_size": 8,
    "evaluation.search_examples": 4, "evaluation.selection_examples": 4, "evaluation.test_examples": 4,
    "evaluation.mesh": "{population: 2}", "merge.scale": 0.5,
}  # fmt: skip


def start(out: Path, resume: bool = False) -> list[subprocess.Popen[str]]:
    """Both processes of ``enmp search demo``, on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    environment |= {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(out.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "enmp_jax.cli", "search", "demo", "--out", str(out)]
    command += [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    command += ["--coordinator", f"127.0.0.1:{port}", "--processes", "2"]
    return [
        subprocess.Popen(
            [*command, "--process-id", str(i), *(["--resume"] if resume else [])],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen[str]]) -> list[int]:
    """Exit codes; the output is read away."""
    for process in processes:
        process.communicate(timeout=SECONDS)
    return [process.returncode for process in processes]


def found(out: Path) -> Any:
    """What must be the same: history, mask, and scores."""
    scores = json.loads((out / "scores.json").read_text())
    scores.pop("masks_per_second", None)
    return (out / "history.jsonl").read_text().splitlines(), (out / "mask.json").read_text(), scores


def two_processes(scratch: Path, count: int) -> tuple[int, list[str]]:
    """Kill one of two at a random moment of the search, resume with two.

    Returns:
        How many resumed to the same, and notes: what went wrong in the others, how the survivors ended.
    """
    rng, notes, same, ends = random.Random(2), [], 0, []
    whole, out = scratch / "undisturbed", scratch / "disturbed"
    if codes := [code for code in ended(start(whole)) if code]:
        return 0, [f"undisturbed: exit codes {codes}"]
    for case in range(count):
        processes, deadline = start(out), time.monotonic() + SECONDS
        history = out / "history.jsonl"
        while not (history.exists() and history.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1))
        killed = rng.randrange(2)
        processes[killed].kill()
        clock = time.monotonic()
        code = ended(processes)[1 - killed]
        seconds = time.monotonic() - clock
        ends.append(f"{code} after {seconds:.0f} s")
        if (codes := ended(start(out, resume=True))) != [0, 0]:
            notes.append(f"case {case}: resumed with exit codes {codes}")
        elif found(out) != found(whole):
            notes.append(f"case {case}: another result")
        else:
            same += 1
        shutil.rmtree(out, ignore_errors=True)
    return same, [*notes, f"exit codes of the survivors: {', '.join(ends)}"]
