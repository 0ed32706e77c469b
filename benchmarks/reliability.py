"""What a search survives: kills, damaged checkpoints, full disks, hostile files, long runs.

``python benchmarks/reliability.py [--only PART] [--scale 1.0]`` adds what is missing to
``benchmarks/results/reliability.json`` and writes the table ``reliability.md``; stop it at any time. The
search is the real one (directory, lock, history, checkpoints, strategy, compiled loop) of the packaged demo,
with a fitness that is a cheap function of the mask in place of the model's.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from reliability_fuzz import FUZZ, fuzz
from reliability_processes import devices, two_processes

from enmp_jax.cli.boundary import explained
from enmp_jax.config import run_file
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.loaded_run import LoadedRun, load
from enmp_jax.evaluation.population import EvalInputs
from enmp_jax.evaluation.racing import Details
from enmp_jax.evaluation.scoring import Scoring
from enmp_jax.io.progress import SILENT
from enmp_jax.runs import evolve
from enmp_jax.runs.directory import RunDirectory
from enmp_jax.search import device_memo

RESULTS = Path(__file__).parent / "results"
KEPT = Path(os.environ["KEPT"]) if os.environ.get("KEPT") else None
"""Where the part of two processes, which takes long, goes on from case to case if it was stopped."""
GENERATIONS = 6


class Killed(BaseException):
    """Stands for SIGKILL within a process."""


class Outcome(NamedTuple):
    """Cases tried and survived, and what went wrong in the others."""

    cases: int
    survived: int
    notes: list[str]


def cheap(evaluator: Evaluator, plan: Any) -> device_memo.Evaluate:
    """A fitness of masks with interactions, without a model."""

    def score(keep: jax.Array, scales: jax.Array, *_: Any) -> device_memo.Scored:
        bits = keep.reshape(len(keep), -1).astype(jnp.float32)
        weights = jnp.sin(jnp.arange(bits.shape[1], dtype=jnp.float32))
        fitness = bits @ weights / 10 + (bits[:, 1:] * bits[:, :-1]).mean(axis=1)
        ones = jnp.ones(len(keep))
        return device_memo.Scored(fitness, ones > 0, Details(ones, fitness, fitness))

    return device_memo.once(score, 4)


def problem(generations: int = GENERATIONS, checkpoint_every: int = 1) -> LoadedRun:
    """The demo's adapters with the examples of a batch; what is loaded once serves all cases."""
    run = run_file.load("demo")
    search = dataclasses.replace(
        run.search, strategy="snes", granularity="layer", population=4, generations=generations, seeds=1,
        checkpoint_every=checkpoint_every, fitness="log_likelihood", finalists=3, refine=None,
    )  # fmt: skip
    evaluation = dataclasses.replace(
        run.evaluation, batch_size=20, search_examples=4, selection_examples=4, test_examples=4
    )
    return load(dataclasses.replace(run, search=search, evaluation=evaluation))


def search(loaded: LoadedRun, out: Path, resume: bool = False) -> Any:
    """One search; returns all that must be the same: history lines, finalists, costs."""
    evaluator = Evaluator(loaded, lambda line: None)
    nothing = jnp.zeros(())  # the fitness reads the mask alone
    heads: Any = nothing
    inputs, scoring = EvalInputs(nothing, (), heads, ()), Scoring(*[nothing] * 4)
    with (
        mock.patch.object(evolve, "make_evaluate_new", cheap),
        RunDirectory(out, resume, say=lambda line: None) as directory,
    ):
        directory.start(loaded.run, {"the adapters": "same"})
        plan = evolve.ExecutionPlan(evaluator.merge, 4)
        with mock.patch.object(Evaluator, "plan", lambda *given: plan):
            found = evolve.evolve(evaluator, directory, SILENT, inputs, scoring, 0.5)
    lines = (out / "history.jsonl").read_text().splitlines()
    finalists = [(f.seed, f.keep.tolist(), f.scale, f.search) for f in found.finalists]
    return lines, finalists, {k: v for k, v in found.cost.items() if k != "masks_per_second"}


@contextlib.contextmanager
def at_call(number: int, action: Callable[[], None], seen: list[int]) -> Iterator[None]:
    """Do something instead of the ``number``-th rename, flush or removal of the process (0: only count)."""
    real = {name: getattr(os, name) for name in ("rename", "replace", "fsync")}

    def patched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(1)
            if len(seen) == number:
                action()
            return real[name](*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name in real:
            stack.enter_context(mock.patch.object(os, name, patched(name)))
        yield


def kill() -> None:
    """End the search as SIGKILL would: nothing is cleaned up behind it."""
    raise Killed


def renames(loaded: LoadedRun, scratch: Path, whole: Any, scale: float) -> Outcome:
    """A kill at every rename and every flush of a search, and before each of them; then a resume."""
    seen: list[int] = []
    with at_call(0, kill, seen):
        search(loaded, scratch / "count")
    notes, points = [], range(1, len(seen) + 1, max(1, round(1 / scale)))
    for point in points:
        out = scratch / f"rename{point}"
        careless = mock.patch.object(Path, "unlink", lambda *a, **k: None)  # the dead clean nothing up
        with contextlib.suppress(Killed), at_call(point, kill, []), careless:
            search(loaded, out)
        notes += same_after_resume(loaded, out, whole, f"rename or flush {point}")
        shutil.rmtree(out)
    return Outcome(len(points), len(points) - len(notes), notes)


def same_after_resume(loaded: LoadedRun, out: Path, whole: Any, case: str) -> list[str]:
    """Resume and compare; what differs or fails, in words."""
    try:
        again = search(loaded, out, resume=True)
    except Exception as error:
        return [f"{case}: {type(error).__name__}: {error}"]
    return [] if again == whole else [f"{case}: another result"]


def damaged(loaded: LoadedRun, scratch: Path, whole: Any, scale: float) -> Outcome:
    """The newest checkpoint damaged in many ways."""
    source = scratch / "whole-run"
    search(loaded, source)
    newest = max(
        (p for p in (source / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name)
    )
    files = [p.relative_to(newest) for p in sorted(newest.rglob("*")) if p.is_file()]
    rng, notes, count = random.Random(0), [], max(1, round(20 * scale))
    for case in range(count):
        out = scratch / f"damaged{case}"
        shutil.copytree(source, out)
        step, kind = out / "checkpoints" / newest.name, case % 5
        file = step / rng.choice(files)
        if kind == 0:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        elif kind == 1:
            file.write_bytes(b"")
        elif kind == 2:
            file.unlink()
        elif kind == 3:
            content = bytearray(file.read_bytes() or b"x")
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(bytes(content))
        else:
            (out / "checkpoints" / "99").mkdir()
        notes += same_after_resume(
            loaded, out, whole, f"damage {case} ({('cut', 'emptied', 'gone', 'bit', 'empty 99')[kind]})"
        )
        shutil.rmtree(out)
    return Outcome(count, count - len(notes), notes)


def faults(loaded: LoadedRun, scratch: Path, whole: Any, scale: float) -> Outcome:
    """ENOSPC, EIO and EACCES at every rename and flush: one clear line, and a resume to the same result."""
    seen: list[int] = []
    with at_call(0, kill, seen):
        search(loaded, scratch / "count-faults")
    notes, cases = [], 0
    for number in (errno.ENOSPC, errno.EIO, errno.EACCES):

        def fail(number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        for point in range(1, len(seen) + 1, max(1, round(3 / scale))):
            out, cases, case = scratch / "fault", cases + 1, f"{errno.errorcode[number]} at {point}"
            try:
                with at_call(point, fail, []):
                    search(loaded, out)
            except Exception as error:
                if not explained(error)[1]:
                    notes.append(f"{case}: {type(error).__name__}: {error}")
            notes += same_after_resume(loaded, out, whole, case)
            shutil.rmtree(out)
    return Outcome(cases, cases - len(notes), notes)


def full_disk(loaded: LoadedRun, scratch: Path, whole: Any, scale: float) -> Outcome:
    """Files may not grow beyond a limit (as on a full disk, also for what is written outside of Python)."""
    notes, limits = [], [0, 50, 200, 1000, 2000, 4000, 8000][:: max(1, round(1 / scale))]
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limit in limits:
        out = scratch / f"full{limit}"
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            search(loaded, out)
        except Exception as error:
            if not explained(error)[1]:
                notes.append(f"limit {limit}: {type(error).__name__}: {error}")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        notes += same_after_resume(loaded, out, whole, f"limit {limit}")
    signal.signal(signal.SIGXFSZ, before)
    return Outcome(len(limits), len(limits) - len(notes), notes)


def kills(loaded: LoadedRun, scratch: Path, whole: Any, scale: float) -> Outcome:
    """SIGKILL of a process of its own at random moments after its search has begun."""
    rng, notes, count = random.Random(1), [], max(1, round(50 * scale))
    for case in range(count):
        out = scratch / f"kill{case}"
        child = subprocess.Popen(
            [sys.executable, __file__, "--child", str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while child.poll() is None and not (out / "history.jsonl").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        child.kill()
        child.wait()
        notes += same_after_resume(loaded, out, whole, f"kill {case}")
        shutil.rmtree(out, ignore_errors=True)
    return Outcome(count, count - len(notes), notes)


def processes(loaded: LoadedRun, scratch: Path, whole: Any, scale: float) -> Outcome:
    """Real searches of two processes, one of which is killed."""
    place = (KEPT or scratch) / "processes"
    place.mkdir(parents=True, exist_ok=True)
    count = max(1, round(10 * scale))
    return Outcome(count, *two_processes(place, count))


def on_devices(loaded: LoadedRun, scratch: Path, whole: Any, scale: float) -> Outcome:
    """Real searches on 1, 4 and 8 devices."""
    place = scratch / "devices"
    place.mkdir()
    return Outcome(*devices(place, max(1, round(3 * scale))))


def soak(loaded: LoadedRun, scratch: Path, whole: Any, scale: float) -> Outcome:
    """Memory and open files over many generations: those of the second half against the first."""
    generations = max(20, round(1000 * scale))
    run = loaded.run
    settings = dataclasses.replace(run.search, generations=generations, checkpoint_every=50)
    long = dataclasses.replace(loaded, run=dataclasses.replace(run, search=settings))
    seen: list[tuple[int, int]] = []
    told = RunDirectory.append_history

    def append(directory: RunDirectory, record: dict[str, Any]) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append((pages * resource.getpagesize(), len(os.listdir("/proc/self/fd"))))
        told(directory, record)

    with mock.patch.object(RunDirectory, "append_history", append):
        search(long, scratch / "soak")
    half = seen[len(seen) // 2 :]
    grown = (half[-1][0] - half[0][0]) / 2**20
    files = half[-1][1] - half[0][1]
    note = f"{generations} generations: memory {grown:+.1f} MiB and {files:+d} files over the second half"
    return Outcome(1, int(grown < 20 and files <= 2), [note])


PARTS: dict[str, tuple[str, Callable[..., Outcome]]] = {
    "renames": ("killed at a rename or flush, resumed to the same history, finalists and costs", renames),
    "damaged": ("newest checkpoint damaged, resumed to the same", damaged),
    "faults": ("ENOSPC, EIO, EACCES injected: one line, resumed to the same", faults),
    "full_disk": ("no room for files (RLIMIT_FSIZE): one line, resumed to the same", full_disk),
    "soak": ("long search: flat memory and open files", soak),
    "kills": ("SIGKILL of the process at a random moment, resumed to the same", kills),
    "two_processes": (
        "SIGKILL of one of two processes: the other ends with one line; two, or one, resumed to the same",
        processes,
    ),
    "devices": ("the same seed on 4 and 8 devices: the mask of one device bit for bit", on_devices),
}


def run_parts(only: str | None, scale: float, results: dict[str, Any], save: Callable[[str], None]) -> None:
    """Do what is missing."""
    wanted = [
        p for p in (*PARTS, *(f"fuzz_{name}" for name in FUZZ)) if only in (None, p) and p not in results
    ]
    if not wanted:
        return
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if set(wanted) & set(PARTS):
            loaded = problem()
            whole = search(loaded, scratch / "undisturbed")
        for part in wanted:
            start = time.perf_counter()
            if part in PARTS:
                what, do = PARTS[part]
                outcome = do(loaded, scratch, whole, scale)
            else:
                what = f"fuzzed {part.removeprefix('fuzz_').replace('_', ' ')}: read or refused in one line"
                outcome = Outcome(*fuzz(part.removeprefix("fuzz_"), scale, scratch))
            results[part] = {"what": what, **outcome._asdict(), "seconds": time.perf_counter() - start}
            print(part, outcome, flush=True)
            save(part)


def table(results: dict[str, Any]) -> str:
    """The Markdown file."""
    rows = [
        f"| {r['what']} | {r['cases']} | {r['survived']} | {r['seconds']:.0f} |" for r in results.values()
    ]
    notes = [f"- {part}: {note}" for part, r in results.items() for note in r["notes"][:10]]
    return "\n".join(
        ["# What a search survives", "",
         "Made by `python benchmarks/reliability.py`; its docstring says how.", "",
         "| what | cases | survived | seconds |", "|---|---|---|---|", *rows, "", *notes, ""]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=[*PARTS, *(f"fuzz_{name}" for name in FUZZ)])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the cases")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        search(problem(), args.child)
        return
    path = RESULTS / "reliability.json"
    results = json.loads(path.read_text()) if path.exists() else {}

    def save(part: str) -> None:
        if path.exists():  # another process may do other parts
            results.update(json.loads(path.read_text()) | {part: results[part]})
        path.write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "reliability.md").write_text(table(results))

    run_parts(args.only, args.scale, results, save)


if __name__ == "__main__":
    main()
