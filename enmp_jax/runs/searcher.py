"""The searches of a run: genomes decoded, masks scored or remembered, checkpoints and history kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from enmp_jax.devices.distributed import put
from enmp_jax.evaluation.population import Fixed
from enmp_jax.evaluation.problem import Problem
from enmp_jax.io.progress import Reporter
from enmp_jax.runs.directory import Checkpoints, RunDirectory
from enmp_jax.search import device_memo, loop, strategies
from enmp_jax.search.device_memo import DeviceMemo
from enmp_jax.search.memo import Memo
from enmp_jax.evaluation.scoring import Scoring


class MemberScores(NamedTuple):
    """What the search records of every member of a generation."""

    fitness: Float[Array | np.ndarray, " member"]
    keep: Bool[Array, "member *module"]
    scale: Float[Array, " member"]
    evaluated: Bool[Array, " member"]
    """False where the memo knew the mask: no model was run for it."""


def make_fitness(problem: Problem, memo: bool = True) -> Callable[..., Any]:
    """The evaluation of a search, all of it compiled with it.

    ``(genomes [P, G], memo, fixed, scoring, scale) -> (MemberScores, memo)``: models are run only for
    masks that are neither in the memo nor twice in the generation. Without ``memo``, for all of them:
    ``(genomes, fixed, scoring, scale) -> MemberScores``.
    """
    evaluate, kind, spec = problem.evaluator(), problem.run.search.fitness, problem.mask_spec

    def decode(genomes: Array, scale: Array) -> tuple[Array, Array]:
        scales = jax.vmap(lambda genome: spec.decode_scale(genome, scale))(genomes)
        return jax.vmap(spec.decode)(genomes), scales

    def score(keep: Array, scales: Array, fixed: Fixed, scoring: Scoring) -> Array:
        return jnp.asarray(scoring.fitness(evaluate(fixed, keep, scales), kind))

    def plain(genomes: Array, fixed: Fixed, scoring: Scoring, scale: Array) -> MemberScores:
        keep, scales = decode(genomes, scale)
        return MemberScores(score(keep, scales, fixed, scoring), keep, scales, jnp.ones(len(keep), bool))

    def remembering(
        genomes: Array, known: DeviceMemo, fixed: Fixed, scoring: Scoring, scale: Array
    ) -> tuple[MemberScores, DeviceMemo]:
        chunk = problem.mesh.shape["population"] * problem.arrangement(problem.merge, fixed)[1]
        keep, scales = decode(genomes, scale)
        found, known = device_memo.remembering(score, chunk)(known, keep, scales, fixed, scoring)
        return MemberScores(found.fitness, keep, scales, found.evaluated), known

    return remembering if memo else plain


class Searcher:
    """Searches of one problem, one after the other, compiled once."""

    def __init__(self, problem: Problem, directory: RunDirectory, reporter: Reporter):
        search, spec = problem.run.search, problem.mask_spec
        self.problem, self.directory, self.reporter = problem, directory, reporter
        self.strategy = strategies.build(
            search.strategy, spec.genome_size, search.population, search.sigma0,
            threshold=search.threshold, free=int(search.search_scale),
        )  # fmt: skip
        self.fitness = make_fitness(problem)
        sharding = NamedSharding(problem.mesh, PartitionSpec())
        self.step = loop.make_step(self.strategy, self.fitness, search.generations_per_dispatch, sharding)
        self.sharding = sharding
        # Time and masks run of the dispatches after the first, which compiles.
        self.seconds, self.masks = 0.0, 0
        self.masks_run = 0
        # What earlier searches scored: the same masks, split and scale give the same fitness.
        self._scored: list[dict[str, np.ndarray]] = []
        self._given: tuple[Fixed, Scoring] | None = None

    def _memo(self, archive: dict[str, np.ndarray], start: int) -> DeviceMemo:
        """The device's memo of the earlier searches and the first ``start`` generations of this one."""
        search, shape = self.problem.run.search, self.problem.mask_spec.shape
        own = {name: rows[:start] for name, rows in archive.items()}
        earlier = self._scored[-(search.seeds - 1) :] if search.seeds > 1 else []  # there is room for those
        keep, scale, fitness = (
            np.concatenate([_flat(a[name]) for a in (*earlier, own)]) for name in ("keep", "scale", "fitness")
        )
        capacity = search.population * search.generations * search.seeds
        return device_memo.start(capacity, shape, keep, scale, fitness)

    def search(self, fixed: Fixed, scoring: Scoring, scale: float, seed: int) -> Memo:
        """One search; resumes from its newest checkpoint. Returns all masks that it scored."""
        given = self._given
        if given is None or given[0] is not fixed or given[1] is not scoring:
            self._given, self._scored = (fixed, scoring), []  # scores of other data say nothing here
        with Checkpoints(self.directory.path / "checkpoints" / f"seed-{seed}") as checkpoints:
            return self._search(fixed, scoring, scale, seed, checkpoints)

    def _search(
        self, fixed: Fixed, scoring: Scoring, scale: float, seed: int, checkpoints: Checkpoints
    ) -> Memo:
        search, spec, memo = self.problem.run.search, self.problem.mask_spec, Memo()
        key = jax.random.key(seed)
        mean = jnp.asarray(spec.start(search.x0, scale))
        archive = _empty_archive(search.generations, search.population, spec.shape)
        state, start, run = None, checkpoints.latest() or 0, 0
        if start:
            saved = checkpoints.restore(
                start, {"state": self.step.init(*put((key, mean), self.sharding)), "archive": archive}
            )
            state, archive = saved["state"], jax.tree.map(np.array, saved["archive"])
            for generation in range(start):
                _remember(memo, archive, generation, search.search_scale)
            run += int(archive["evaluated"][:start].sum())
            self.reporter.say(f"seed {seed}: goes on after generation {start}")
        self.directory.keep_history(seed, start)
        clock, counted = time.perf_counter(), run

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
            nonlocal clock, counted
            now = time.perf_counter()
            if self._compiled:
                self.seconds += now - clock
                self.masks += run - counted
            self._compiled, counted, clock = True, run, now  # the next dispatch runs meanwhile
            if done % search.checkpoint_every == 0 or done == search.generations:
                checkpoints.save(done, {"state": state, "archive": archive})

        loop.run(
            self.strategy, self.fitness, key, mean, search.generations,
            state=state, start=start, operands=(fixed, *put((scoring, np.float32(scale)), self.sharding)),
            on_generation=on_generation, on_dispatch=on_dispatch, sharding=self.sharding, step=self.step,
            memory=self._memo(archive, start),
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
