"""Products of activations with weights kept [out, in], in the form that each backend runs fastest."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def bfloat16_on_cpu(dtype: jnp.dtype) -> bool:
    """Whether products of this type must ask for float32 results to be fast.

    XLA's bfloat16 kernels for CPUs take only products that ask for a float32 result and have no transposed
    operand; of all others both sides are converted to float32 first.
    """
    return dtype == jnp.bfloat16 and jax.default_backend() == "cpu"


def times_transposed(
    x: Float[Array, "*batch in"], weight: Float[Array, "out in"], result: Any = None
) -> Float[Array, "*batch out"]:
    """``x weight^T``.

    Args:
        x: activations.
        weight: of the type of ``x``.
        result: type of the product; default: that of ``x``.
    """
    result = result or x.dtype
    wanted = jnp.float32 if bfloat16_on_cpu(x.dtype) else result
    contracted = ((x.ndim - 1,), (1,))
    return lax.dot_general(x, weight, (contracted, ((), ())), preferred_element_type=wanted).astype(result)
