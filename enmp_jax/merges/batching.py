"""``vmap`` that is a loop on CPUs and a batch elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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
        members = tuple(
            x if mapped else jnp.broadcast_to(x, (size, *x.shape)) for x, mapped in zip(arrays, is_batched)
        )
        out = jax.lax.platform_dependent(
            *members, cpu=lambda *xs: jax.lax.map(lambda x: single(*x), xs), default=jax.vmap(batched)
        )
        return out, jax.tree.map(lambda _: True, out)

    return single
