"""The search: ask, evaluate, tell, compiled once, and the archive of all it saw.

The loop knows genomes and fitness, nothing of masks or models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from enmp_jax.devices.distributed import put
from enmp_jax.search.strategies import Genomes, State, Strategy


class Scores(Protocol):
    """What an evaluation returns: a pytree whose leaves have a leading member axis."""

    @property
    def fitness(self) -> Float[Array, " member"]:
        """Higher is better; NaN counts as the worst."""
        ...


Evaluate = Callable[..., Any]
"""``evaluate(genomes [member, gene], *operands) -> Scores``; with a memory, which the search carries from
generation to generation, ``evaluate(genomes, memory, *operands) -> (Scores, memory)``."""


class Result(NamedTuple):
    """The archive of a search.

    Attributes:
        genomes: all genomes, on the host.
        scores: what ``evaluate`` returned, numpy leaves with leading axes (generation, member).
        state: the strategy's state after the last generation.
        start: number of the first generation in the archive.
        memory: what the evaluation remembered, None without a memory.
    """

    genomes: Float[np.ndarray, "generation member gene"]
    scores: Any
    state: State
    start: int = 0
    memory: Any = None

    @property
    def generations(self) -> int:
        """Number of generations done, those before ``start`` included."""
        return self.start + len(self.genomes)


class Step(NamedTuple):
    """A compiled ask-evaluate-tell.

    ``init(key, mean) -> state``.
    ``advance(key, start, count, (state, memory), operands) -> ((state, memory), genomes, scores)`` does
    generations ``start .. start + count - 1``, ``count <= size``; genomes and scores have ``size`` rows,
    of which the first ``count`` are meant. The given state is donated: use the returned one.
    """

    init: Callable[[PRNGKeyArray, Float[Array, " gene"]], State]
    advance: Callable[..., tuple[tuple[State, Any], Float[Array, "row member gene"], Any]]
    size: int


@functools.lru_cache(maxsize=8)
def make_step(
    strategy: Strategy,
    evaluate: Evaluate,
    generations_per_dispatch: int = 1,
    sharding: jax.sharding.Sharding | None = None,
) -> Step:
    """Compile one dispatch of the search: no host transfer between ask, evaluate and tell.

    How many generations a dispatch does is an argument of the compiled function, so that the rest of
    a budget does not compile anew and the results do not depend on the dispatch size. The last few
    steps are remembered: further seeds of the same strategy and evaluation do not compile either.

    Args:
        strategy: what proposes genomes.
        evaluate: ``evaluate(genomes, *operands) -> Scores``; pure. Large arrays belong in the operands:
            closed over, they would become constants of the program.
        generations_per_dispatch: most generations in one dispatch.
        sharding: where states and results live, replicated over the mesh of ``evaluate``; None for
            one device.
    """
    score = jax.jit(evaluate)  # traced once, though its output shapes are asked for below

    def advance(
        key: PRNGKeyArray,
        start: Int[Array, ""],
        count: Int[Array, ""],
        state: tuple[State, Any],
        operands: tuple[Any, ...],
    ) -> tuple[tuple[State, Any], Array, Any]:
        def one(generation: Array, carried: tuple[State, Any]) -> tuple[tuple[State, Any], Genomes, Any]:
            state, memory = carried
            # keyed by the number of the generation: a resumed search draws the same members
            ask_key, tell_key = jax.random.split(jax.random.fold_in(key, generation))
            genomes, state = strategy.ask(ask_key, state)
            if memory is None:
                scores = score(genomes, *operands)
            else:
                scores, memory = score(genomes, memory, *operands)
            state = strategy.tell(tell_key, genomes, scores.fitness, state)
            return (state, memory), genomes, scores

        def body(i: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            state, archive = carry
            state, *seen = one(start + i, state)
            archive = jax.tree.map(lambda rows, row: rows.at[i].set(row), archive, tuple(seen))
            return state, archive

        _, *shapes = jax.eval_shape(one, start, state)
        archive = jax.tree.map(
            lambda x: jnp.zeros((generations_per_dispatch, *x.shape), x.dtype), tuple(shapes)
        )
        state, (genomes, scores) = jax.lax.fori_loop(0, count, body, (state, archive))
        return state, genomes, scores

    def init(key: PRNGKeyArray, mean: Float[Array, " gene"]) -> State:
        # copied: the state is donated later, and must not share a buffer with the mean
        return jax.tree.map(jnp.copy, strategy.init(key, mean))

    first = jax.jit(init, out_shardings=sharding)
    return Step(first, jax.jit(advance, donate_argnums=3, out_shardings=sharding), generations_per_dispatch)


def run(
    strategy: Strategy,
    evaluate: Evaluate,
    key: PRNGKeyArray,
    mean: Float[np.ndarray, " gene"] | Float[Array, " gene"],
    generations: int,
    *,
    generations_per_dispatch: int = 1,
    state: State | None = None,
    start: int = 0,
    operands: tuple[Any, ...] = (),
    on_generation: Callable[[int, np.ndarray, Any], None] | None = None,
    on_dispatch: Callable[[int, State], None] | None = None,
    sharding: jax.sharding.Sharding | None = None,
    step: Step | None = None,
    memory: Any = None,
) -> Result:
    """Search until ``generations`` generations are done.

    Args:
        strategy, evaluate, generations_per_dispatch, operands, sharding: see ``make_step``.
        key: everything random follows from it and the number of the generation.
        mean: the genome that the search starts from (not used when resuming).
        generations: how many in total, those before ``start`` included.
        state: state to resume from (it stays usable), with ``start``, the number of generations
            already done.
        on_generation: called for each generation with its number, genomes [member, gene] and scores
            (numpy leaves, leading member axis).
        on_dispatch: called for each dispatch, while the next one runs, with the number of generations done
            and a copy of the state. The place for checkpoints.
        step: what ``make_step`` returned for the same arguments; several searches then compile once.
        memory: a pytree of arrays for an evaluation that has one (see ``Evaluate``); it stays usable.

    Returns:
        The archive of the generations done by this call.

    Raises:
        ValueError: ``start`` and ``state`` not given together, or ``start`` beyond ``generations``.
    """
    if (state is None) != (start == 0):
        raise ValueError("resuming needs both the state and the number of generations done")
    if not 0 <= start <= generations or generations < 1:
        raise ValueError(f"cannot do generations {start}..{generations}")
    step = step or make_step(strategy, evaluate, generations_per_dispatch, sharding)
    # generations use fold_in(key, 0), fold_in(key, 1), ..: the initial state has its own stream
    init_key, key = jax.random.split(key)
    start_mean = jnp.asarray(mean, jnp.float32)
    if sharding is not None:
        init_key, start_mean = put((init_key, start_mean), sharding)
    if state is None:
        state = step.init(init_key, start_mean)
    else:
        state = jax.tree.map(jnp.copy, state)  # donated later: the caller's arrays live on
    carried = state, jax.tree.map(jnp.copy, memory)
    if sharding is not None:
        carried, key = put((carried, key), sharding)

    rows: list[tuple[np.ndarray, Any]] = []

    def keep_books(first: int, count: int, seen: list[Any], after: State) -> None:
        rows.append(_take(jax.tree.map(np.asarray, tuple(seen)), slice(count)))
        if on_generation is not None:
            for i in range(count):
                on_generation(first + i, *_take(rows[-1], i))
        if on_dispatch is not None:
            on_dispatch(first + count, after)

    books: tuple[Any, ...] | None = None
    for first in range(start, generations, step.size):
        count = min(step.size, generations - first)
        carried, *seen = step.advance(key, np.int32(first), np.int32(count), carried, operands)
        # copied before the next dispatch takes it: the host books this one while the device does the next
        after = jax.tree.map(jnp.copy, carried[0]) if on_dispatch is not None else None
        if books is not None:
            keep_books(*books)
        books = first, count, seen, after
    if books is not None:
        keep_books(*books)
    if not rows:  # resumed at the end
        shapes = jax.eval_shape(lambda c: step.advance(key, 0, 0, c, operands)[1:], carried)
        rows.append(jax.tree.map(lambda x: np.zeros((0, *x.shape[1:]), x.dtype), tuple(shapes)))
    genomes, scores = jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
    return Result(genomes, scores, carried[0], start, carried[1])


def _take(tree: Any, index: int | slice) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def join(earlier: Result, later: Result) -> Result:
    """The archive of a search that was interrupted and resumed.

    Raises:
        ValueError: the second does not start where the first ends.
    """
    if later.start != earlier.generations:
        raise ValueError(f"generation {later.start} does not follow {earlier.generations - 1}")
    genomes = np.concatenate([earlier.genomes, later.genomes])
    scores = jax.tree.map(lambda a, b: np.concatenate([a, b]), earlier.scores, later.scores)
    return Result(genomes, scores, later.state, earlier.start, later.memory)
