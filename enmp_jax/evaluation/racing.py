"""Racing: a mask is run on more of the search split only while it may still be the best of its generation.

All masks of a generation are run on the same first batches (``data.batch(order="stratified")``: a random
sample of every task in proportion), those that stay in the race on more, the best on all. A mask drops out
when it is behind the leader by more than ``Z`` standard errors of their paired difference: both answer the
same examples, so that what makes an example easy or hard for every mask cancels out. The idea is that of
Hoeffding races (Maron and Moore, NIPS 1993) and F-Race (Birattari et al., GECCO 2002).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from enmp_jax.data.batches import Batches
from enmp_jax.evaluation.fitness import Fitness, normalised, objective
from enmp_jax.evaluation.kinds import option_log_probabilities
from enmp_jax.evaluation.population import EvalInputs
from enmp_jax.evaluation.scoring import Scoring
from enmp_jax.merges.base import Merge
from enmp_jax.models.base import Backbone
from enmp_jax.search.device_memo import Evaluate, New, Rows, Scored, in_chunks

Z = 3.0
"""Standard errors behind the leader at which a mask drops out."""
LEAST_EXAMPLES = 8
"""Of every task that has more, before anything drops out: a standard error of fewer says little."""

ROUNDING = 1e-5
"""Relative difference of two sums that may be equal."""


class Details(NamedTuple):
    """What a search records of masks beside their fitness."""

    cost: Float[Array, " member"]
    """Share of the search split that was run for a member: 0 for copies and remembered masks."""
    mean: Float[Array, " member"]
    """Of the normalised values of all tasks, weighted."""
    worst: Float[Array, " member"]
    """Normalised value of the worst task."""


Values = tuple[Float[Array, "member batches batch"], ...]
"""Fitness values of examples, one array per bucket; 0 for padding and what was not run yet."""


def stops(batches: Sequence[Batches], rungs: Sequence[float]) -> Int[np.ndarray, "rung bucket"]:
    """How many batches of each bucket have been run after each rung; rungs that add none are left out."""
    sizes = [bucket.label.shape[0] for bucket in batches]
    # rounded first: 0.1 * 30 is a little above 3
    found = [tuple(math.ceil(round(share * n, 6)) for n in sizes) for share in rungs]
    return np.asarray(list(dict.fromkeys(found)), np.int32)


def make_race(
    backbone: Backbone,
    merge: Merge,
    n_tasks: int,
    mesh: Mesh,
    member_chunk: int,
    kind: Fitness,
    rungs: Sequence[float],
    searches: int = 1,
    z: float = Z,
) -> Evaluate:
    """Build ``race(new, keep [P, ...], scale [P], inputs, scoring) -> Scored`` with ``Details``.

    The fitness is that of the objective ``mean``. That of masks which dropped out is an estimate, below
    that of all that stayed in longer, so that ranks are right.

    Args:
        backbone: the base model.
        merge: the merge method.
        n_tasks: number of tasks T.
        mesh: devices.
        member_chunk: members evaluated together on a device.
        kind: the fitness; not ``calibrated``.
        rungs: shares of the search split, rising to 1.
        searches: how many independent searches the P members belong to, one after the other, each with a race
            of its own.
        z: see ``Z``.
    """
    run = _make_run(backbone, merge, mesh, kind)
    chunk = mesh.shape["population"] * member_chunk

    def race(new: New, keep: Array, scale: Array, inputs: EvalInputs, scoring: Scoring) -> Scored:
        size, stop = len(keep), stops(inputs.batches, rungs)
        start = np.concatenate([np.zeros_like(stop[:1]), stop[:-1]])
        groups = jnp.arange(size) // (size // searches)

        def rung(carry: tuple[Values, Array, Array], bounds: tuple[Array, Array]) -> tuple[tuple, tuple]:
            values, alive, examples = carry
            # copies of a mask share its row: it is run while any of them is alive
            wanted = jnp.zeros(size, bool).at[new.first].max(alive)

            def step(rows: Rows, values: Values) -> Values:
                found = run(inputs, keep[rows.members], scale[rows.members], *bounds)
                return jax.tree.map(lambda x, new: x.at[rows.place].add(new, mode="drop"), values, found)

            values = in_chunks(step, wanted, chunk, values)
            seen = Seen.of(inputs.batches, bounds[1], n_tasks)
            before = Seen.of(inputs.batches, bounds[0], n_tasks)
            examples = examples + wanted * (seen.examples.sum() - before.examples.sum())
            rows = jnp.concatenate([v[new.first].reshape(size, -1) for v in values], axis=1)
            total = seen.totals(rows)
            own = normalised(total / jnp.maximum(seen.examples, 1), scoring.expert, kind)
            estimate = objective(own, "mean", scoring.importance)
            stays = alive & ~jnp.isnan(total).any(1)
            leader = _leaders(jnp.where(stays, estimate, -jnp.inf), groups, searches)
            error = standard_errors(rows, total, own, leader, seen, scoring, kind)
            # nothing drops out for what rounding makes of equals; not even a leader that is rounded twice
            equal = (new.first == new.first[leader]) | jnp.isclose(estimate, estimate[leader], ROUNDING)
            behind = ~equal & (estimate - estimate[leader] < -z * error)
            enough = ((seen.examples >= LEAST_EXAMPLES) | (seen.share == 1)).all()
            stays &= ~(behind & enough)
            return (values, stays, examples), (alive, estimate, own)

        values = tuple(jnp.zeros((size, *bucket.label.shape), jnp.float32) for bucket in inputs.batches)
        begin = values, new.wanted, jnp.zeros(size, jnp.float32)
        bounds = jnp.asarray(start), jnp.asarray(stop)
        (_, _, examples), (alive, estimate, own) = jax.lax.scan(rung, begin, bounds)
        through = jnp.zeros(size, bool).at[new.first].max(alive[-1])[new.first]
        fitness = _ranked(estimate, alive, through, groups, searches)
        # no number on some examples is none on all
        final = through | jnp.isnan(fitness)
        cost = examples / scoring.examples.sum()
        return Scored(fitness, final, Details(cost, estimate[-1], own[-1].min(-1)))

    return race


def _make_run(backbone: Backbone, merge: Merge, mesh: Mesh, kind: Fitness) -> Callable[..., Values]:
    """``run(inputs, keep [C, ...], scale [C], start [bucket], stop [bucket]) -> Values`` of batches
    ``start .. stop - 1``; C is a multiple of the mesh axis ``population``."""

    def member(
        inputs: EvalInputs, keep: Array, scale: Array, start: Array, stop: Array
    ) -> tuple[Float[Array, "batches batch"], ...]:
        deltas = merge.merge(inputs.ingredients, keep, scale)

        def of_bucket(bucket: Batches, first: Array, end: Array) -> Array:
            def step(i: Array, values: Array) -> Array:
                batch = jax.tree.map(lambda x: x[i], bucket)
                scores = option_log_probabilities(backbone, inputs.params, inputs.heads, batch, deltas)
                found = kind.value(scores, batch.label, batch.expert)
                return values.at[i].set(jnp.where(batch.mask, found, 0.0))

            return jax.lax.fori_loop(first, end, step, jnp.zeros(bucket.label.shape, jnp.float32))

        return tuple(of_bucket(*given) for given in zip(inputs.batches, start, stop, strict=True))

    def shard(inputs: EvalInputs, keep: Array, scale: Array, start: Array, stop: Array) -> Values:
        return jax.vmap(member, (None, 0, 0, None, None))(inputs, keep, scale, start, stop)

    members, replicated = PartitionSpec("population"), PartitionSpec()
    specs = EvalInputs(replicated, replicated, replicated, PartitionSpec(None, "data"))  # type: ignore[arg-type]

    def run(inputs: EvalInputs, keep: Array, scale: Array, start: Array, stop: Array) -> Values:
        values = jax.shard_map(
            shard,
            mesh=mesh,
            in_specs=(specs, members, members, replicated, replicated),
            out_specs=PartitionSpec("population", None, "data"),
            axis_names={"population", "data"},
            check_vma=False,  # as in population.make_evaluate
        )(inputs, keep, scale, start, stop)
        return jax.lax.with_sharding_constraint(values, NamedSharding(mesh, replicated))

    return run


class Seen(NamedTuple):
    """The examples of the first batches."""

    member: Float[Array, "row task"]
    """1 where a row is an example of a task that has been run."""
    examples: Float[Array, " task"]
    share: Float[Array, " task"]
    """Of all examples of the task."""

    @staticmethod
    def of(batches: Sequence[Batches], stop: Int[Array, " bucket"], n_tasks: int) -> Seen:
        """The examples of batches before ``stop``."""
        member, run = [], []
        for bucket, end in zip(batches, stop, strict=True):
            member.append(
                (jax.nn.one_hot(bucket.task, n_tasks) * bucket.mask[..., None]).reshape(-1, n_tasks)
            )
            run.append(jnp.repeat(jnp.arange(len(bucket.label)) < end, bucket.label.shape[1]))
        every, ran = jnp.concatenate(member), jnp.concatenate(run)[:, None]
        examples = (every * ran).sum(0)
        return Seen(every * ran, examples, examples / every.sum(0))

    def totals(self, rows: Float[Array, "member row"]) -> Float[Array, "member task"]:
        """Sums per task; accelerators would round the values in an ordinary product."""
        return jnp.matmul(rows, self.member, precision="highest")


def standard_errors(
    rows: Float[Array, "member row"],
    total: Float[Array, "member task"],
    own: Float[Array, "member task"],
    leader: Int[Array, " member"],
    seen: Seen,
    scoring: Scoring,
    kind: Fitness,
) -> Float[Array, " member"]:
    """Standard error of each member's difference in fitness to its leader.

    By the delta method: an example moves the fitness by its value times the derivative of the fitness with
    respect to the mean of its task. What is estimated is the fitness on the whole search split, which is
    finite: the more of it is run, the smaller the error.
    """
    slope = own if kind.logarithmic else 1 / scoring.expert
    slope = slope * scoring.importance / scoring.importance.sum()
    mean = total / jnp.maximum(seen.examples, 1)
    # of every row, the mean and the slope of its task
    mean, slope = (
        jnp.matmul(x, seen.member.T, precision="highest") for x in (mean, jnp.broadcast_to(slope, own.shape))
    )
    moved = (rows - mean) * slope
    variance = seen.totals((moved - moved[leader]) ** 2) / jnp.maximum(seen.examples - 1, 1)
    return jnp.sqrt((variance / jnp.maximum(seen.examples, 1) * (1 - seen.share)).sum(-1))


def _leaders(
    fitness: Float[Array, " member"], groups: Int[Array, " member"], searches: int
) -> Int[Array, " member"]:
    """Number of the best member of everyone's own search."""
    size = len(fitness) // searches
    best = jnp.nan_to_num(fitness, nan=-jnp.inf).reshape(searches, size).argmax(1)
    return (best + jnp.arange(searches) * size)[groups]


def _ranked(
    estimate: Float[Array, "rung member"],
    alive: Bool[Array, "rung member"],
    through: Bool[Array, " member"],
    groups: Int[Array, " member"],
    searches: int,
) -> Float[Array, " member"]:
    """Fitness: of members that came through the last one; of others their estimate when they dropped out,
    all that dropped out together lowered by the same amount if one of them is not below those that stayed.

    Args:
        estimate: at every rung.
        alive: who was run on the batches of each rung.
        through: whose mask was run on all.
        groups: the search of each member.
        searches: number of searches.
    """

    def most(x: Array, where: Array) -> Array:
        x = jnp.where(where & ~jnp.isnan(x), x, -jnp.inf)
        return x.reshape(searches, -1).max(1)[groups]

    fitness = estimate[-1]
    for before, after, value in zip(alive[-2::-1], alive[:0:-1], estimate[-2::-1], strict=True):
        dropped = before & ~after & ~through
        below = jnp.nextafter(-most(-fitness, after), -jnp.inf)  # inf where none stayed
        excess = jnp.maximum(most(value, dropped) - below, 0.0)
        fitness = jnp.where(dropped, jnp.minimum(value - excess, below), fitness)
    return fitness
