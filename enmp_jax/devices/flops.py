"""Floating point operations of a traced function: its matrix products and convolutions, loops unrolled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """FLOPs (a multiply-add is two) of the products in ``function(*arguments)``; nothing is run.

    A scan counts its body times its length (XLA's own cost analysis counts it once), a while loop its
    body once, a branch its costliest side. Elementwise work and factorisations are left out.

    Args:
        function: anything that can be traced.
        arguments: arrays or ``jax.ShapeDtypeStruct``.
    """
    return _count(jax.make_jaxpr(function)(*arguments))


def _count(closed: Any) -> int:
    jaxpr = getattr(closed, "jaxpr", closed)
    return sum(_one(equation) for equation in jaxpr.eqns)


def _one(equation: Any) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        features = kernel[parameters["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // features
    inner = [_parts(value) for value in parameters.values()]
    if name == "cond":
        return max((_count(part) for parts in inner for part in parts), default=0)
    times = parameters["length"] if name == "scan" else 1
    return times * sum(_count(part) for parts in inner for part in parts)


def _parts(value: Any) -> list[Any]:
    """The programs among an equation's parameters."""
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if hasattr(getattr(v, "jaxpr", v), "eqns")]
