"""The mask searches of a run: all seeds in one compiled loop, masks scored or remembered."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from enmp_jax.devices.distributed import put
from enmp_jax.evaluation.evaluator import Evaluator, ExecutionPlan
from enmp_jax.evaluation.fitness import objective
from enmp_jax.evaluation.population import EvalInputs
from enmp_jax.evaluation.racing import Details, make_race, stops
from enmp_jax.evaluation.scoring import Scoring
from enmp_jax.io import signals
from enmp_jax.io.checkpoints import Checkpoints
from enmp_jax.io.progress import Reporter
from enmp_jax.runs.directory import RunDirectory
from enmp_jax.runs.evolve_record import MemberScores, Record
from enmp_jax.runs.finalists import Searched
from enmp_jax.search import device_memo, loop, strategies
from enmp_jax.search.device_memo import DeviceMemo


class WarmStart(NamedTuple):
    """What a search of masks knows beforehand: what pruning each module alone does to the fitness (NaN where
    there is none), and how many forward passes of the search split that cost."""

    effects: Float[np.ndarray, "*module"]
    passes: int


def make_score(evaluator: Evaluator, plan: ExecutionPlan) -> loop.ScoreGenomes:
    """The evaluation of a search, all of it compiled with it.

    ``(genomes [P, G], memo, inputs, scoring, scale) -> (MemberScores, memo)``: models are run only for
    masks that are neither in the memo nor twice in the generation.
    """
    spec = evaluator.loaded.mask_spec
    remembering = device_memo.remembering(make_evaluate_new(evaluator, plan))

    def score(
        genomes: Array, memo: DeviceMemo, inputs: EvalInputs, scoring: Scoring, scale: Array
    ) -> tuple[MemberScores, DeviceMemo]:
        scales = jax.vmap(lambda genome: spec.decode_scale(genome, scale))(genomes)
        keep = jax.vmap(spec.decode)(genomes)
        found, memo = remembering(memo, keep, scales, inputs, scoring)
        details: Details = found.details
        cost = jnp.where(found.evaluated, details.cost, 0.0)
        whole = found.evaluated & found.final
        fitness = jnp.where(jnp.isfinite(found.fitness), found.fitness, jnp.nan)  # Inf is no better than NaN
        mean, worst = (jnp.where(whole, x, jnp.nan) for x in (details.mean, details.worst))
        return MemberScores(
            fitness, keep, scales, found.evaluated, found.final, cost, mean, worst
        ), memo  # fmt: skip

    return score


def make_evaluate_new(evaluator: Evaluator, plan: ExecutionPlan) -> device_memo.Evaluate:
    """How masks that the memo does not know are scored: all on the whole search split, or in a race."""
    search, kind, mesh = evaluator.loaded.run.search, evaluator.kind, evaluator.mesh
    if search.fidelity == "racing":
        return make_race(
            evaluator.loaded.backbone, plan.merge, len(evaluator.loaded.tasks), mesh, plan.member_chunk,
            kind, search.rungs, search.seeds,
        )  # fmt: skip
    evaluate = evaluator.evaluate(plan)

    def score(keep: Array, scales: Array, inputs: EvalInputs, scoring: Scoring) -> device_memo.Scored:
        counts = evaluate(inputs, keep, scales)
        values = scoring.task_values(counts, kind)
        mean, worst = (objective(values, name, scoring.importance) for name in ("mean", "worst"))
        details = Details(jnp.ones(len(keep)), mean, worst)
        fitness = scoring.fitness(counts, kind, search.objective)
        return device_memo.Scored(fitness, jnp.ones(len(keep), bool), details)

    return device_memo.once(score, mesh.shape["population"] * plan.member_chunk)


def evolve(
    evaluator: Evaluator,
    directory: RunDirectory,
    reporter: Reporter,
    inputs: EvalInputs,
    scoring: Scoring,
    scale: float,
    known: WarmStart | None = None,
) -> Searched:
    """Search masks with every seed of the run at once; resumes from the newest checkpoint.

    Args:
        evaluator: of the run.
        directory: where history and checkpoints go.
        reporter: progress.
        inputs: of the search split.
        scoring: of the search split.
        scale: merge coefficient (where it is not searched).
        known: for a warm start.

    Returns:
        The best distinct masks of every seed, and what they cost.
    """
    search = evaluator.loaded.run.search
    if search.fidelity == "racing" and len(stops(inputs.batches, search.rungs)) == 1:
        reporter.say(
            "racing saves nothing: the search split is a single batch; set a smaller evaluation.batch_size"
        )
    strategy, mean = make_strategy(evaluator, scale, known)
    sharding = NamedSharding(evaluator.mesh, PartitionSpec())
    keys = jnp.stack([jax.random.key(search.seed + i) for i in range(search.seeds)])
    operands = (inputs, *put((scoring, np.float32(scale)), sharding))

    def searched(plan: ExecutionPlan) -> Searched:
        step = loop.make_step(
            strategy, make_score(evaluator, plan), search.generations_per_dispatch, sharding
        )
        path = directory.path / "checkpoints"
        with Checkpoints(path, directory.fingerprint, say=reporter.say) as checkpoints, signals.saving():
            record = Record(evaluator, directory, reporter, checkpoints, known.passes if known else 0)
            resume = record.restore(step.init(*put((keys, mean), sharding)))
            loop.run(
                step, keys, mean, search.generations,
                operands=operands, memory=record.device_memo(), resume=resume, watch=record.watch(),
            )  # fmt: skip
        return record.searched(scale)

    return evaluator.bearing(evaluator.plan(inputs), searched)


def make_strategy(
    evaluator: Evaluator, scale: float, known: WarmStart | None = None
) -> tuple[strategies.Strategy, Float[np.ndarray, " gene"]]:
    """The strategy of a run for all its seeds, and the genome that it starts from.

    Raises:
        UserError: an unknown strategy, or settings that it cannot work with.
    """
    search, spec = evaluator.loaded.run.search, evaluator.loaded.mask_spec
    effects = None if known is None else known.effects.reshape(-1)[list(spec.slots)]
    free = int(search.search_scale)
    space = strategies.Space(
        spec.genome_size, search.population, search.sigma0, search.threshold, free, spec.max_count, effects
    )
    built = strategies.build(
        search.strategy, spec.genome_size, search.population, search.sigma0,
        threshold=search.threshold, free=free, max_count=spec.max_count, effects=effects,
    )  # fmt: skip
    start = spec.start(strategies.start_mean(space, search.x0), scale)
    return strategies.several(built, search.seeds), start
