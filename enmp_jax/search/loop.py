"""The search: ask, evaluate, tell, compiled once, and the archive of all it saw.

The loop knows genomes and fitness, nothing of masks or models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from enmp_jax.devices.distributed import put
from enmp_jax.search.base import Genomes, Keys, State, Strategy


@runtime_checkable
class Scores(Protocol):
    """What an evaluation returns: a pytree whose leaves have a leading member axis."""

    @property
    def fitness(self) -> Float[Array, " member"]:
        """Higher is better; NaN counts as the worst."""
        ...


ScoreGenomes = Callable[..., tuple[Any, Any]]
"""``score(genomes [member, gene], memory, *operands) -> (Scores, memory)``: pure. The memory is a pytree
of arrays that the search carries from generation to generation; ``()`` where nothing is remembered."""


class Result(NamedTuple):
    """The archive of a search.

    Attributes:
        genomes: all genomes, on the host.
        scores: what the evaluation returned, numpy leaves with leading axes (generation, member).
        state: the strategy's state after the last generation.
        memory: what the evaluation remembered.
        start: number of the first generation in the archive.
    """

    genomes: Float[np.ndarray, "generation member gene"]
    scores: Any
    state: State
    memory: Any
    start: int = 0

    @property
    def generations(self) -> int:
        """Number of generations done, those before ``start`` included."""
        return self.start + len(self.genomes)


class Step(NamedTuple):
    """A compiled ask-evaluate-tell; several searches of one strategy and evaluation share it.

    ``init(key, mean) -> state``.
    ``advance(key, start, count, (state, memory), operands) -> ((state, memory), genomes, scores)`` does
    generations ``start .. start + count - 1``, ``count <= size``; genomes and scores have ``size`` rows,
    of which the first ``count`` are meant. The given state is donated: use the returned one.
    """

    init: Callable[[Keys, Float[Array, " gene"]], State]
    advance: Callable[..., tuple[tuple[State, Any], Float[Array, "row member gene"], Any]]
    size: int
    sharding: jax.sharding.Sharding | None


class Resume(NamedTuple):
    """Where an interrupted search stopped: after how many generations, in which state."""

    generations: int
    state: State


class Watch(NamedTuple):
    """Who is told, on the host, while the device goes on.

    ``on_generation(number, genomes [member, gene], scores)`` for each generation (numpy leaves);
    ``on_dispatch(generations done, state)`` for each dispatch, with a copy of the state: the place for
    checkpoints. ``stop()`` is asked before each dispatch, when all earlier ones were told; the device
    waits for that.
    """

    on_generation: Callable[[int, np.ndarray, Any], None] | None = None
    on_dispatch: Callable[[int, State], None] | None = None
    stop: Callable[[], bool] | None = None


def make_step(
    strategy: Strategy,
    score: ScoreGenomes,
    generations_per_dispatch: int = 1,
    sharding: jax.sharding.Sharding | None = None,
) -> Step:
    """Compile one dispatch of the search: no host transfer between ask, evaluate and tell.

    How many generations a dispatch does is an argument of the compiled function, so that the rest of
    a budget does not compile anew and the results do not depend on the dispatch size.

    Args:
        strategy: what proposes genomes.
        score: see ``ScoreGenomes``. Large arrays belong in the operands: closed over, they would become
            constants of the program.
        generations_per_dispatch: most generations in one dispatch.
        sharding: where states and results live, replicated over the mesh of the evaluation; None for
            one device.
    """
    traced_once = jax.jit(score)  # though its output shapes are asked for below

    def advance(
        key: Keys,
        start: Int[Array, ""],
        count: Int[Array, ""],
        carried: tuple[State, Any],
        operands: tuple[Any, ...],
    ) -> tuple[tuple[State, Any], Array, Any]:
        def one(generation: Array, carried: tuple[State, Any]) -> tuple[tuple[State, Any], Genomes, Any]:
            state, memory = carried
            # keyed by the number of the generation: a resumed search draws the same members
            ask_key, tell_key = _split(_fold_in(key, generation))
            genomes, state = strategy.ask(ask_key, state)
            scores, memory = traced_once(genomes, memory, *operands)
            state = strategy.tell(tell_key, genomes, scores.fitness, state)
            return (state, memory), genomes, scores

        def body(i: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            carried, archive = carry
            carried, *seen = one(start + i, carried)
            archive = jax.tree.map(lambda rows, row: rows.at[i].set(row), archive, tuple(seen))
            return carried, archive

        _, *shapes = jax.eval_shape(one, start, carried)
        archive = jax.tree.map(
            lambda x: jnp.zeros((generations_per_dispatch, *x.shape), x.dtype), tuple(shapes)
        )
        carried, (genomes, scores) = jax.lax.fori_loop(0, count, body, (carried, archive))
        return carried, genomes, scores

    def init(key: Keys, mean: Float[Array, " gene"]) -> State:
        # copied: the state is donated later, and must not share a buffer with the mean
        return jax.tree.map(jnp.copy, strategy.init(key, mean))

    return Step(
        jax.jit(init, out_shardings=sharding),
        jax.jit(advance, donate_argnums=3, out_shardings=sharding),
        generations_per_dispatch,
        sharding,
    )


def run(
    step: Step,
    key: Keys,
    mean: Float[np.ndarray, " gene"] | Float[Array, " gene"],
    generations: int,
    *,
    operands: tuple[Any, ...] = (),
    memory: Any = (),
    resume: Resume | None = None,
    watch: Watch = Watch(),  # noqa: B008, a tuple cannot change
) -> Result:
    """Search until ``generations`` generations are done.

    Args:
        step: see ``make_step``.
        key: everything random follows from it and the number of the generation; one key, or [seed] of
            a strategy that is several (see ``strategies.several``).
        mean: the genome that the search starts from (not used when resuming).
        generations: how many in total, those before a resume included.
        operands: further arguments of the evaluation.
        memory: what the evaluation remembers at the start (see ``ScoreGenomes``); it stays usable.
        resume: where an earlier call stopped; its state stays usable.
        watch: who is told.

    Returns:
        The archive of the generations done by this call.

    Raises:
        ValueError: more generations done already than asked for.
    """
    start = 0 if resume is None else resume.generations
    if not 0 <= start <= generations or generations < 1:
        raise ValueError(f"cannot do generations {start}..{generations}")
    # generations use fold_in(key, 0), fold_in(key, 1), ..: the initial state has its own stream
    init_key, key = _split(key)
    start_mean = jnp.asarray(mean, jnp.float32)
    if step.sharding is not None:
        init_key, start_mean = put((init_key, start_mean), step.sharding)
    # copied where given: donated later, and the caller's arrays live on
    state = step.init(init_key, start_mean) if resume is None else jax.tree.map(jnp.copy, resume.state)
    carried = state, jax.tree.map(jnp.copy, memory)
    if step.sharding is not None:
        carried, key = put((carried, key), step.sharding)

    rows: list[tuple[np.ndarray, Any]] = []

    def record(first: int, count: int, seen: list[Any], after: State) -> None:
        rows.append(_take(jax.tree.map(np.asarray, tuple(seen)), slice(count)))
        if watch.on_generation is not None:
            for i in range(count):
                watch.on_generation(first + i, *_take(rows[-1], i))
        if watch.on_dispatch is not None:
            watch.on_dispatch(first + count, after)

    pending: tuple[Any, ...] | None = None
    for first in range(start, generations, step.size):
        if watch.stop is not None:
            if pending is not None:
                record(*pending)
                pending = None
            if watch.stop():
                break
        count = min(step.size, generations - first)
        carried, *seen = step.advance(key, np.int32(first), np.int32(count), carried, operands)
        # copied before the next dispatch takes it: the host records this one while the device does the next
        after = jax.tree.map(jnp.copy, carried[0]) if watch.on_dispatch is not None else None
        if pending is not None:
            record(*pending)
        pending = first, count, seen, after
    if pending is not None:
        record(*pending)
    if not rows:  # resumed at the end
        shapes = jax.eval_shape(lambda c: step.advance(key, 0, 0, c, operands)[1:], carried)
        rows.append(jax.tree.map(lambda x: np.zeros((0, *x.shape[1:]), x.dtype), tuple(shapes)))
    genomes, scores = jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
    return Result(genomes, scores, carried[0], carried[1], start)


def _fold_in(key: Keys, number: Array) -> Keys:
    return (
        jax.vmap(jax.random.fold_in, (0, None))(key, number) if key.ndim else jax.random.fold_in(key, number)
    )


def _split(key: Keys) -> tuple[Keys, Keys]:
    pair = jax.vmap(jax.random.split)(key) if key.ndim else jax.random.split(key)
    return pair[..., 0], pair[..., 1]


def _take(tree: Any, index: int | slice) -> Any:
    return jax.tree.map(lambda x: x[index], tree)
