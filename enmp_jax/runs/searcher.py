"""The searches of a run: genomes decoded, masks scored or remembered, checkpoints and history kept."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from enmp_jax.devices.distributed import put
from enmp_jax.evaluation.evaluator import Evaluator, ExecutionPlan
from enmp_jax.evaluation.population import EvalInputs
from enmp_jax.evaluation.scoring import Scoring
from enmp_jax.io.progress import Reporter
from enmp_jax.runs.directory import Checkpoints, RunDirectory
from enmp_jax.search import device_memo, loop, strategies
from enmp_jax.search.device_memo import DeviceMemo
from enmp_jax.search.memo import Memo


class MemberScores(NamedTuple):
    """What the search records of every member of a generation."""

    fitness: Float[Array | np.ndarray, " member"]
    keep: Bool[Array, "member *module"]
    scale: Float[Array, " member"]
    evaluated: Bool[Array, " member"]
    """False where the memo knew the mask: no model was run for it."""


def make_score(evaluator: Evaluator, plan: ExecutionPlan) -> loop.ScoreGenomes:
    """The evaluation of a search, all of it compiled with it.

    ``(genomes [P, G], memo, inputs, scoring, scale) -> (MemberScores, memo)``: models are run only for
    masks that are neither in the memo nor twice in the generation; with ``()`` for a memo, for all of them.
    """
    evaluate, kind, spec = evaluator.evaluate(plan), evaluator.loaded.run.search.fitness, evaluator.loaded.mask_spec
    chunk = evaluator.mesh.shape["population"] * plan.member_chunk

    def fitness(keep: Array, scales: Array, inputs: EvalInputs, scoring: Scoring) -> Array:
        return jnp.asarray(scoring.fitness(evaluate(inputs, keep, scales), kind))

    def score(
        genomes: Array, memo: DeviceMemo | tuple[()], inputs: EvalInputs, scoring: Scoring, scale: Array
    ) -> tuple[MemberScores, DeviceMemo | tuple[()]]:
        scales = jax.vmap(lambda genome: spec.decode_scale(genome, scale))(genomes)
        keep = jax.vmap(spec.decode)(genomes)
        if not isinstance(memo, DeviceMemo):
            every = jnp.ones(len(keep), bool)
            return MemberScores(fitness(keep, scales, inputs, scoring), keep, scales, every), memo
        found, memo = device_memo.remembering(fitness, chunk)(memo, keep, scales, inputs, scoring)
        return MemberScores(found.fitness, keep, scales, found.evaluated), memo

    return score


class Searcher:
    """Searches of one loaded run, one after the other, compiled once."""

    def __init__(self, evaluator: Evaluator, directory: RunDirectory, reporter: Reporter):
        search, spec = evaluator.loaded.run.search, evaluator.loaded.mask_spec
        self.evaluator, self.directory, self.reporter = evaluator, directory, reporter
        self.strategy = strategies.build(
            search.strategy, spec.genome_size, search.population, search.sigma0,
            threshold=search.threshold, free=int(search.search_scale),
        )  # fmt: skip
        self.sharding = NamedSharding(evaluator.mesh, PartitionSpec())
        # Time and masks run of the dispatches after the first, which compiles.
        self.seconds, self.masks = 0.0, 0
        self.masks_run = 0
        # What earlier searches scored: the same masks, split and scale give the same fitness.
        self._scored: list[dict[str, np.ndarray]] = []
        self._given: tuple[EvalInputs, Scoring] | None = None
        self._steps: dict[ExecutionPlan, loop.Step] = {}

    def _step(self, inputs: EvalInputs) -> loop.Step:
        plan = self.evaluator.plan(inputs)
        if plan not in self._steps:
            per_dispatch = self.evaluator.loaded.run.search.generations_per_dispatch
            score = make_score(self.evaluator, plan)
            self._steps[plan] = loop.make_step(self.strategy, score, per_dispatch, self.sharding)
        return self._steps[plan]

    def _memo(self, archive: dict[str, np.ndarray], start: int) -> DeviceMemo:
        """The device's memo of the earlier searches and the first ``start`` generations of this one."""
        search, shape = self.evaluator.loaded.run.search, self.evaluator.loaded.mask_spec.shape
        own = {name: rows[:start] for name, rows in archive.items()}
        earlier = self._scored[-(search.seeds - 1) :] if search.seeds > 1 else []  # there is room for those
        keep, scale, fitness = (
            np.concatenate([_flat(a[name]) for a in (*earlier, own)]) for name in ("keep", "scale", "fitness")
        )
        capacity = search.population * search.generations * search.seeds
        return device_memo.start(capacity, shape, keep, scale, fitness)

    def search(self, inputs: EvalInputs, scoring: Scoring, scale: float, seed: int) -> Memo:
        """One search; resumes from its newest checkpoint. Returns all masks that it scored."""
        given = self._given
        if given is None or given[0] is not inputs or given[1] is not scoring:
            self._given, self._scored = (inputs, scoring), []  # scores of other data say nothing here
        with Checkpoints(self.directory.path / "checkpoints" / f"seed-{seed}") as checkpoints:
            return self._search(inputs, scoring, scale, seed, checkpoints)

    def _search(
        self, inputs: EvalInputs, scoring: Scoring, scale: float, seed: int, checkpoints: Checkpoints
    ) -> Memo:
        search, spec, memo = self.evaluator.loaded.run.search, self.evaluator.loaded.mask_spec, Memo()
        key = jax.random.key(seed)
        mean = jnp.asarray(spec.start(search.x0, scale))
        archive = _empty_archive(search.generations, search.population, spec.shape)
        step, resume, start, run = self._step(inputs), None, checkpoints.latest() or 0, 0
        if start:
            saved = checkpoints.restore(
                start, {"state": step.init(*put((key, mean), self.sharding)), "archive": archive}
            )
            resume, archive = loop.Resume(start, saved["state"]), jax.tree.map(np.array, saved["archive"])
            for generation in range(start):
                _remember(memo, archive, generation, search.search_scale)
            run += int(archive["evaluated"][:start].sum())
            self.reporter.say(f"seed {seed}: goes on after generation {start}")
        self.directory.keep_history(seed, start)
        clock, counted, saved_at = time.perf_counter(), run, start

        def on_generation(generation: int, genomes: np.ndarray, scores: MemberScores) -> None:
            nonlocal run
            for name, value in scores._asdict().items():
                archive[name][generation] = value
            _remember(memo, archive, generation, search.search_scale)
            run += int(scores.evaluated.sum())
            best = float(np.nanmax(archive["fitness"][: generation + 1]))
            self.directory.append_history({
                "seed": seed, "generation": generation, "masks_evaluated": memo.evaluated,
                "distinct_masks": len(memo), "masks_run": run, "best": best,
                "mean": float(np.nanmean(scores.fitness)),
                "fitness": [float(f) for f in scores.fitness],
                "pruned": [spec.n_pruned(mask) for mask in scores.keep],
                "scale": [float(s) for s in scores.scale],
            })  # fmt: skip
            self.reporter.advance(generation + 1, search.generations, best)

        def on_dispatch(done: int, state: Any) -> None:
            nonlocal clock, counted, saved_at
            now = time.perf_counter()
            if self._compiled:
                self.seconds += now - clock
                self.masks += run - counted
            self._compiled, counted, clock = True, run, now  # the next dispatch runs meanwhile
            if done // search.checkpoint_every > saved_at // search.checkpoint_every or done == search.generations:
                checkpoints.save(done, {"state": state, "archive": archive})
                saved_at = done

        operands = (inputs, *put((scoring, np.float32(scale)), self.sharding))
        loop.run(
            step, key, mean, search.generations,
            operands=operands, memory=self._memo(archive, start), resume=resume,
            watch=loop.Watch(on_generation, on_dispatch),
        )  # fmt: skip
        self.masks_run += run
        self._scored.append(archive)
        return memo

    _compiled = False


def _empty_archive(generations: int, population: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {
        "fitness": np.full((generations, population), np.nan, np.float32),
        "keep": np.ones((generations, population, *shape), bool),
        "scale": np.zeros((generations, population), np.float32),
        "evaluated": np.zeros((generations, population), bool),
    }


def _flat(rows: np.ndarray) -> np.ndarray:
    return rows.reshape(-1, *rows.shape[2:])


def _remember(memo: Memo, archive: dict[str, np.ndarray], generation: int, with_scale: bool) -> None:
    scale = archive["scale"][generation] if with_scale else None
    memo.add(archive["keep"][generation], archive["fitness"][generation], scale)
