"""``enmp search``: from a run file to a mask, its scores on the test split, a report and exports."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from enmp_jax import distributed
from enmp_jax.adapters.peft_export import export_adapters, export_peft
from enmp_jax.adapters.recipe import Recipe
from enmp_jax.config import RunConfig
from enmp_jax.distributed import put
from enmp_jax.errors import UserError
from enmp_jax.population import Fixed
from enmp_jax.problem import Problem, load
from enmp_jax.progress import Reporter
from enmp_jax.runs import Checkpoints, RunDirectory
from enmp_jax.search import device_memo, loop, strategies
from enmp_jax.search.device_memo import DeviceMemo
from enmp_jax.search.memo import Memo
from enmp_jax.tasks import Scoring, by_task


class MemberScores(NamedTuple):
    """What the search records of every member of a generation."""

    fitness: Float[Array | np.ndarray, " member"]
    keep: Bool[Array, "member *module"]
    scale: Float[Array, " member"]
    evaluated: Bool[Array, " member"]
    """False where the memo knew the mask: no model was run for it."""


@dataclass
class Finalist:
    """A mask that the selection split decided on."""

    seed: int
    keep: Bool[np.ndarray, "*module"]
    scale: float
    search: float | None  # fitness on the search split; None: the search never scored it
    selection: float = float("nan")


def search_run(run: RunConfig, out: Path, reporter: Reporter, resume: bool = False) -> dict[str, Any]:
    """Search, choose, test once, and write the run directory; returns the content of ``scores.json``.

    Raises:
        UserError: bad input; nothing has been written by then.
    """
    directory = distributed.together(lambda: RunDirectory(out, resume))
    reporter.say(f"loading {run.base.model} and {len(run.tasks)} adapters")
    problem = distributed.together(lambda: load(run, reporter=reporter))
    searcher = Searcher(problem, directory, reporter)
    distributed.together(lambda: directory.start(run))

    fixed, scoring = problem.fixed("search"), problem.scoring("search")
    scale, grid = choose_scale(problem, fixed, scoring)
    reporter.say(f"plain merge: scale {scale:g}, fitness {grid[scale]:.4f} on the search split")
    memos = {
        seed: searcher.search(fixed, scoring, scale, seed)
        for seed in range(run.search.seed, run.search.seed + run.search.seeds)
    }
    candidates = [f for seed, memo in memos.items() for f in finalists(problem, memo, seed, scale)]
    winners = select(problem, candidates)
    best = max(winners.values(), key=_rank)
    scores = test(problem, best, winners, scale) | {
        "masks_evaluated": sum(memo.evaluated for memo in memos.values()),
        "distinct_masks": sum(len(memo) for memo in memos.values()),
        "masks_run": searcher.masks_run,
        "masks_per_second": searcher.masks / searcher.seconds if searcher.masks else None,
        "scale_grid": {f"{value:g}": fitness for value, fitness in grid.items()},
        "modules": problem.mask_spec.n_modules,
        "splits": {which: by_task(problem.tasks, problem.sizes(which)) for which in problem.examples},
    }
    directory.write_json("mask.json", problem.mask_spec.to_json(best.keep, best.scale))
    directory.write_json("scores.json", scores)
    if directory.writes:
        export(problem, best, scores, out, reporter)
        from enmp_jax.report import write_plots, write_report  # matplotlib is slow to import

        write_plots(out)
        write_report(out)
        reporter.say(f"report: {out / 'report.html'}")
    distributed.barrier("results are written")
    return scores


def choose_scale(problem: Problem, fixed: Fixed, scoring: Scoring) -> tuple[float, dict[float, float]]:
    """The merge coefficient of the plain merge, and the fitness of all tried.

    The same coefficient serves the pruned model: a gain over an untuned baseline would be none.
    """
    merge = problem.run.merge
    values = merge.scale_grid if merge.scale == "auto" else (float(merge.scale),)
    keep = np.repeat(problem.mask_spec.all_kept()[None], len(values), axis=0)
    counts = problem.score(fixed, keep, np.asarray(values, np.float32))
    fitness = np.asarray(scoring.fitness(counts, problem.run.search.fitness))
    return values[int(np.argmax(fitness))], dict(zip(values, map(float, fitness), strict=True))


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


def finalists(problem: Problem, memo: Memo, seed: int, scale: float) -> list[Finalist]:
    """The best distinct masks of a search, and the plain merge: pruning must win its place."""
    found = [
        Finalist(seed, c.keep, scale if c.scale is None else c.scale, c.fitness)
        for c in memo.finalists(problem.run.search.finalists)
    ]
    plain = problem.mask_spec.all_kept()
    if not any(f.keep.all() and f.scale == scale for f in found):
        found.append(Finalist(seed, plain, scale, None))
    return found


def select(problem: Problem, candidates: list[Finalist]) -> dict[int, Finalist]:
    """Score finalists on the selection split; the best of every seed (ties: better on the search split)."""
    scoring = problem.scoring("selection")
    keep = np.stack([f.keep for f in candidates])
    counts = problem.score(
        problem.fixed("selection"), keep, np.asarray([f.scale for f in candidates], np.float32)
    )
    fitness = np.asarray(scoring.fitness(counts, problem.run.search.fitness))
    winners: dict[int, Finalist] = {}
    for candidate, value in zip(candidates, fitness, strict=True):
        candidate.selection = float(value)
        known = winners.get(candidate.seed)
        if known is None or _rank(candidate) > _rank(known):
            winners[candidate.seed] = candidate
    return winners


def _rank(finalist: Finalist) -> tuple[float, float]:
    return finalist.selection, -np.inf if finalist.search is None else finalist.search


def test(problem: Problem, best: Finalist, winners: Mapping[int, Finalist], scale: float) -> dict[str, Any]:
    """The one look at the test split: experts, base, plain merge and the winner of every seed."""
    scoring, fixed, spec = problem.scoring("test"), problem.fixed("test"), problem.mask_spec
    masks = [spec.all_kept(), best.keep, *(f.keep for f in winners.values())]
    scales = np.asarray([scale, best.scale, *(f.scale for f in winners.values())], np.float32)
    counts = problem.score(fixed, np.stack(masks), scales)
    accuracy, normalised = np.asarray(scoring.accuracy(counts)), np.asarray(scoring.normalised(counts))
    base = np.asarray(problem.score_base("test").correct) / problem.sizes("test")
    gains = normalised[2:] - normalised[0]
    return {
        "split": "test",
        "tasks": list(problem.tasks),
        "reference": by_task(problem.tasks, np.asarray(scoring.reference)),
        "base": by_task(problem.tasks, base),
        "merged": by_task(problem.tasks, accuracy[0]),
        "enmp": by_task(problem.tasks, accuracy[1]),
        "mean_normalised": {"merged": float(normalised[0]), "enmp": float(normalised[1])},
        "seeds": [
            {
                "seed": seed, "mean_normalised": float(normalised[2 + i]), "gain": float(gains[i]),
                "pruned": len(spec.pruned_modules(f.keep)), "search": f.search, "selection": f.selection,
            }
            for i, (seed, f) in enumerate(winners.items())
        ],
        "gain": {"mean": float(gains.mean()), "std": float(gains.std(ddof=1)) if len(gains) > 1 else None},
        "pruned": [list(module) for module in spec.pruned_modules(best.keep)],
        "scale": best.scale,
        "seed": best.seed,
    }  # fmt: skip


def export(
    problem: Problem, best: Finalist, scores: Mapping[str, Any], out: Path, reporter: Reporter
) -> None:
    """Write what there is to take away: the pruned adapters, and the merge of them as one adapter."""
    merge = problem.run.merge
    recipe = Recipe(
        merge={
            "method": merge.method, "space": merge.space, "scale": best.scale, "isotropize": merge.isotropize,
            **merge.hyperparameters(),
        },
        pruned=scores["pruned"],
        seed=best.seed,
        scores=scores,
    )  # fmt: skip
    loaded = problem.adapters
    deltas = jax.jit(problem.merge.merge)(problem.ingredients, jnp.asarray(best.keep), best.scale)
    for name, write in {
        "pruned adapters": lambda: export_adapters(out / "adapters", loaded, best.keep, recipe),
        "merged adapter": lambda: export_peft(out / "merged", loaded, deltas, recipe),
    }.items():
        try:
            write()
        except UserError as error:
            # The search is done and paid for: say what could not be written, lose nothing else.
            reporter.say(f"{name} not written: {error}")
