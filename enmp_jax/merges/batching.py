"""``vmap`` that is a loop on CPUs and a batch elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.custom_batching import custom_vmap
from jaxtyping import Array


def one_by_one(
    function: Callable[..., Any], elsewhere: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """``function`` of arrays, which under ``vmap`` runs one member at a time on CPUs.

    There a loop keeps the temporaries of one member in the cache, its conditionals are real branches, and
    jaxlib's batched LAPACK calls are avoided: those split the batch over XLA's thread pool and wait
    inside that pool, so that two of them side by side can wait for each other for ever (seen with two
    QRs on two cores, jax 0.10). Only for what no derivative passes through.

    Args:
        function: of arrays, to a pytree of arrays.
        elsewhere: what to use on accelerators, batched; default: the same.
    """
    batched = function if elsewhere is None else elsewhere

    @custom_vmap
    def single(*arrays: Array) -> Any:
        return jax.lax.platform_dependent(*arrays, cpu=function, default=batched)

    @single.def_vmap
    def _(size: int, is_batched: list[bool], *arrays: Array) -> tuple[Any, Any]:
        members = [x for x, mapped in zip(arrays, is_batched, strict=True) if mapped]
        shared = [x for x, mapped in zip(arrays, is_batched, strict=True) if not mapped]

        def ordered(members: Sequence[Array], shared: Sequence[Array]) -> list[Array]:
            of_member, of_all = iter(members), iter(shared)
            return [next(of_member if mapped else of_all) for mapped in is_batched]

        def loop(members: Sequence[Array], shared: Sequence[Array]) -> Any:
            return jax.lax.map(lambda own: single(*ordered(own, shared)), members)

        def batch(members: Sequence[Array], shared: Sequence[Array]) -> Any:
            axes = [0 if mapped else None for mapped in is_batched]
            return jax.vmap(batched, axes)(*ordered(members, shared))

        out = jax.lax.platform_dependent(members, shared, cpu=loop, default=batch)
        return out, jax.tree.map(lambda _: True, out)

    return single


def one_by_one_differentiable(
    function: Callable[..., Any], elsewhere: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """``one_by_one`` whose derivatives are those of ``elsewhere``, batched on every platform."""
    looped, plain = one_by_one(function, elsewhere), function if elsewhere is None else elsewhere

    @jax.custom_jvp
    def single(*arrays: Array) -> Any:
        return looped(*arrays)

    @single.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
        return jax.jvp(plain, primals, tangents)

    return single
