"""What the host keeps of the mask searches while the device goes on: archive, memos, history, checkpoints."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from enmp_jax.devices.distributed import told_to_end
from enmp_jax.errors import Stopped, UserError, one_line
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.io.checkpoints import Checkpoints
from enmp_jax.io.progress import Progress, Reporter
from enmp_jax.runs.directory import RunDirectory
from enmp_jax.runs.finalists import Finalist, Searched, finite_or_none
from enmp_jax.search import device_memo, loop
from enmp_jax.search.device_memo import DeviceMemo
from enmp_jax.search.memo import Candidate, Memo, front

SAVE_SECONDS = 60.0
"""A checkpoint is saved at least so often, whatever ``search.checkpoint_every`` says."""


class MemberScores(NamedTuple):
    """What a search records of every member of a generation."""

    fitness: Float[Array | np.ndarray, " member"]
    keep: Bool[Array, "member *module"]
    scale: Float[Array, " member"]
    evaluated: Bool[Array, " member"]
    """False where the memo knew the mask: no model was run for it."""
    final: Bool[Array, " member"]
    """False where a mask dropped out of a race: its fitness is an estimate."""
    cost: Float[Array, " member"]
    """Share of the search split that was run; 0 where not evaluated."""
    mean: Float[Array, " member"]
    """Of the tasks' normalised values; NaN where not evaluated on the whole search split."""
    worst: Float[Array, " member"]
    """Of the tasks' normalised values, likewise."""


class Record:
    """Of the searches of all seeds."""

    def __init__(
        self,
        evaluator: Evaluator,
        directory: RunDirectory,
        reporter: Reporter,
        checkpoints: Checkpoints,
        passes: int,
    ):
        self.search, self.spec = evaluator.loaded.run.search, evaluator.loaded.mask_spec
        self.examples = int(evaluator.loaded.sizes("search").sum())
        self.before = passes * self.examples  # what each search paid for its warm start
        self.directory, self.reporter, self.checkpoints = directory, reporter, checkpoints
        self.seeds = range(self.search.seed, self.search.seed + self.search.seeds)
        members = len(self.seeds) * self.search.population
        rows = self.search.generations, members
        self.archive = {
            "fitness": np.full(rows, np.nan, np.float32),
            "keep": np.ones((*rows, *self.spec.shape), bool),
            "scale": np.zeros(rows, np.float32),
            "evaluated": np.zeros(rows, bool),
            "final": np.zeros(rows, bool),
            "cost": np.zeros(rows, np.float32),
            "mean": np.full(rows, np.nan, np.float32),
            "worst": np.full(rows, np.nan, np.float32),
        }
        self.memos = [Memo() for _ in self.seeds]
        self.run_examples = [0 for _ in self.seeds]
        self.improved = 0  # the last generation in which any seed found a better mask
        self.start = self.saved_at = 0
        self.saved_time = time.perf_counter()
        self.failed = 0  # masks whose fitness is no finite number
        self.clock: float | None = None
        # time and masks run of the dispatches after the first, which compiles
        self.seconds, self.masks, self.counted = 0.0, 0, 0

    def restore(self, state: Any) -> loop.Resume | None:
        """Where an interrupted search goes on; None for a new one."""
        found = self.checkpoints.latest({"state": state, "archive": self.archive})
        self.start = self.saved_at = found.step if found else 0
        if found:
            self.archive = jax.tree.map(np.array, found.tree["archive"])
            for generation in range(found.step):
                self._remember(generation)
            self.counted = int(self.archive["evaluated"][: found.step].sum())
            self.reporter.say(f"goes on after generation {found.step}")
        self.directory.keep_history(self.start)
        return loop.Resume(found.step, found.tree["state"]) if found else None

    def device_memo(self) -> DeviceMemo:
        """The device's memo of what was scored before a resume."""
        final = self.archive["final"][: self.start]
        keep, scale, fitness = (
            self.archive[name][: self.start][final] for name in ("keep", "scale", "fitness")
        )
        return device_memo.start(self.archive["fitness"].size, self.spec.shape, keep, scale, fitness)

    def watch(self) -> loop.Watch:
        """For the loop; it waits for the host only where something may stop it."""
        limited = self.search.budget is not None or self.search.patience is not None
        return loop.Watch(self._on_generation, self._on_dispatch, self._stop if limited else None)

    def searched(self, scale: float) -> Searched:
        """The best distinct masks of every seed."""
        finalists = [
            Finalist(seed, c.keep, scale if c.scale is None else c.scale, c.fitness)
            for seed, memo in zip(self.seeds, self.memos, strict=True)
            for c in memo.finalists(self.search.finalists)
        ]
        cost = {
            "masks_evaluated": sum(memo.evaluated for memo in self.memos),
            "distinct_masks": sum(len(memo) for memo in self.memos),
            "masks_run": int(self.archive["evaluated"].sum()),
            "masks_failed": self.failed,
            "masks_per_second": self.masks / self.seconds if self.masks else None,
            "example_evaluations": sum(self._spent(i) for i in range(len(self.seeds))),
        }
        if self.search.objective == "pareto":
            every = [c for memo in self.memos for c in memo.candidates()]
            cost["pareto"] = [self._on_front(c, scale) for c in front(every)]
        return Searched(finalists, cost)

    def _on_front(self, candidate: Candidate, scale: float) -> dict[str, Any]:
        return {
            "mean": candidate.mean,
            "worst": candidate.worst,
            "pruned": [list(module) for module in self.spec.pruned_modules(candidate.keep)],
            "scale": scale if candidate.scale is None else candidate.scale,
        }

    def _spent(self, i: int) -> int:
        """Example-evaluations of one seed: its warm start and its races; without races its distinct masks,
        which another seed may have paid for."""
        if self.search.fidelity == "racing":
            return self.before + self.run_examples[i]
        return self.before + len(self.memos[i]) * self.examples

    def _rows(self, i: int) -> slice:
        return slice(i * self.search.population, (i + 1) * self.search.population)

    def _remember(self, generation: int) -> None:
        for i, memo in enumerate(self.memos):
            rows = self._rows(i)
            before, seen = memo.best, {name: x[generation, rows] for name, x in self.archive.items()}
            fitness = np.where(seen["final"], seen["fitness"], np.nan)  # estimates are not remembered
            scale = seen["scale"] if self.search.search_scale else None
            memo.add(seen["keep"], fitness, scale, seen["mean"], seen["worst"])
            self.run_examples[i] += int(np.rint(seen["cost"] * self.examples).sum())
            if memo.best > before:
                self.improved = generation
        self.failed += int(
            (self.archive["evaluated"] & ~np.isfinite(self.archive["fitness"]))[generation].sum()
        )

    def _on_generation(self, generation: int, genomes: np.ndarray, scores: MemberScores) -> None:
        for name, value in scores._asdict().items():
            self.archive[name][generation] = value
        failed, none = self.failed, np.isnan(scores.fitness).all()
        self._remember(generation)
        if self.failed > failed == 0 and not none:
            self.reporter.say(
                f"generation {generation}: {self.failed} masks have no finite fitness; they rank last and "
                "are counted in scores.json (masks_failed)"
            )
        for i, (seed, memo) in enumerate(zip(self.seeds, self.memos, strict=True)):
            rows = self._rows(i)
            fitness = scores.fitness[rows]
            some = ~np.isnan(fitness)
            self.directory.append_history({
                "seed": seed, "generation": generation, "masks_evaluated": memo.evaluated,
                "distinct_masks": len(memo), "example_evaluations": self._spent(i),
                "best": finite_or_none(memo.best),
                "mean": float(fitness[some].mean()) if some.any() else None,
                "fitness": [finite_or_none(f) for f in fitness.tolist()],
                "pruned": [self.spec.n_pruned(mask) for mask in scores.keep[rows]],
                "scale": [float(s) for s in scores.scale[rows]],
            })  # fmt: skip
        if none:
            raise UserError(self._all_failed(generation, scores.keep))
        done = generation + 1
        self.reporter.advance(
            Progress(
                done, self.search.generations, max(memo.best for memo in self.memos),
                mean=float(np.nanmean(scores.fitness)),
                masks=int(self.archive["evaluated"][:done].sum()),
                examples=sum(self.run_examples),
                spent=max(map(self._spent, range(len(self.seeds)))),
                budget=self.search.budget,
            )
        )  # fmt: skip

    def _all_failed(self, generation: int, keep: Any) -> str:
        masks = {str(self.spec.pruned_modules(mask)): None for mask in keep}
        shown = "; ".join(one_line(mask, 200) for mask in list(masks)[:3])
        more = f" and {len(masks) - 3} more" if len(masks) > 3 else ""
        return (
            f"no mask of generation {generation} has a finite fitness: check merge.scale, the adapters and "
            f"base.dtype; the masks prune {shown}{more}"
        )

    def _on_dispatch(self, done: int, state: Any) -> None:
        now, run = time.perf_counter(), int(self.archive["evaluated"][:done].sum())
        if self.clock is not None:
            self.seconds += now - self.clock
            self.masks += run - self.counted
        self.clock, self.counted = now, run  # the next dispatch runs meanwhile
        every = self.search.checkpoint_every
        told = told_to_end(done)
        # no more than one slow generation is lost; several processes must agree, and their clocks do not
        late = jax.process_count() == 1 and now - self.saved_time > SAVE_SECONDS
        if done // every > self.saved_at // every or done == self.search.generations or late or told:
            self.directory.flush_history()
            best = max(memo.best for memo in self.memos)
            self.checkpoints.save(done, {"state": state, "archive": self.archive}, {}, best)
            self.saved_at, self.saved_time = done, now
        if told:
            raise Stopped(told)

    def _stop(self) -> bool:
        """Whether another dispatch might go over the budget, or nothing better comes any more."""
        search, done = self.search, max(memo.evaluated for memo in self.memos) // self.search.population
        if search.patience is not None and done - 1 - self.improved >= search.patience:
            return True
        if search.budget is None:
            return False
        most = search.population * search.generations_per_dispatch
        return max(map(self._spent, range(len(self.seeds)))) + most * self.examples > search.budget
