"""Weights kept in 8 or 4 bits on the device and dequantised in the product: half or a quarter of the memory.

Only weights are quantised (weight-only), symmetrically and without calibration: the nearest multiple of a
scale. ``int8`` has one scale per output channel. ``int4`` has one per 32 inputs, as llama.cpp's Q4_0;
two values share a byte (``jnp.int4`` would be unpacked for all layers at once on CPUs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Shaped, UInt8

from enmp_jax.errors import UserError
from enmp_jax.models.parameters import Axes, Declared, Param, flatten, is_stacked, unflatten

GROUP = 32
"""Inputs that share a scale in ``int4``."""
KINDS = ("int8", "int4")


@flax.struct.dataclass
class Quantised:
    """A quantised weight in place of an array.

    Attributes:
        values: int8, or two 4-bit values with 8 added in each byte, the first in the lower half.
        scale: what each group of values along the last axis is multiplied by.
        dtype: of the dequantised weight.
    """

    values: Int8[Array, "*out in"] | UInt8[Array, "*out half"]
    scale: Float[Array, "*out group"]
    dtype: Any = flax.struct.field(pytree_node=False)

    def dequantise(self) -> Float[Array, "*out in"]:
        """The weight in full."""
        values, scale = self.values, self.scale.astype(jnp.float32)
        if values.dtype == jnp.uint8:
            halves = jnp.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], -1)
            values = halves.astype(jnp.int8) - 8
        grouped = values.reshape(*scale.shape, -1).astype(jnp.float32) * scale[..., None]
        return grouped.reshape(values.shape).astype(self.dtype)

    def __getitem__(self, rows: Any) -> Float[Array, "*row in"]:
        """Some rows of a table (embeddings of tokens)."""
        return Quantised(self.values[rows], self.scale[rows], self.dtype).dequantise()


def dense(weight: Array | Quantised) -> Array:
    """A weight as an array."""
    return weight.dequantise() if isinstance(weight, Quantised) else weight


def quantise(weight: Float[Array, "*out in"], kind: str, dtype: Any) -> Quantised:
    """The nearest weight that ``kind`` can hold.

    Args:
        weight: the last axis is summed over in the product.
        kind: ``int8`` or ``int4``.
        dtype: of what ``dequantise`` gives.
    """
    groups = 1 if kind == "int8" else weight.shape[-1] // GROUP
    grouped = weight.astype(jnp.float32).reshape(*weight.shape[:-1], groups, -1)
    largest = 127 if kind == "int8" else 7
    # the scale is rounded first, so that rounding it costs nothing but the values at the very edge
    scale = (jnp.max(jnp.abs(grouped), -1) / largest).astype(jnp.float32 if kind == "int8" else jnp.bfloat16)
    divisor = jnp.where(scale > 0, scale, 1).astype(jnp.float32)[..., None]
    values = jnp.clip(jnp.round(grouped / divisor), -largest, largest).astype(jnp.int8).reshape(weight.shape)
    if kind == "int4":
        raised = (values + 8).astype(jnp.uint8).reshape(*weight.shape[:-1], -1, 2)
        values = raised[..., 0] | (raised[..., 1] << 4)
    return Quantised(values, scale, jnp.dtype(dtype))


def declare(declared: Declared, kind: str) -> Declared:
    """The same parameters with the layers' matrices quantised, and in 8 bits the tables of the vocabulary.

    Raises:
        UserError: a matrix with a number of inputs that ``int4`` cannot hold.
    """

    def one(path: str, p: Param) -> Param:
        if is_stacked(path) and len(p.shape) == 3:
            if kind == "int4" and p.shape[-1] % GROUP:
                raise UserError(
                    f"base.quantization int4: {p.name} has {p.shape[-1]} inputs, not a multiple of {GROUP}: "
                    "take int8"
                )
            return replace(p, quantization=kind)
        return replace(p, quantization="int8") if p.axes == ("vocab", "embed") else p

    return unflatten({path: one(path, p) for path, p in flatten(declared).items()})


def arrays(p: Param, make: Callable[[tuple[int, ...], Any, Axes], Any]) -> Any:
    """``make(shape, dtype, axes)`` of the parameter's array, or of the arrays of its quantised weight."""
    if p.quantization is None:
        return make(p.shape, p.dtype, p.axes)
    whole = jax.ShapeDtypeStruct(p.shape, p.dtype)
    shapes = jax.eval_shape(lambda w: quantise(w, p.quantization or "", p.dtype), whole)
    return jax.tree.map(lambda a: make(a.shape, a.dtype, p.axes), shapes)


def store(value: Shaped[Array, "..."], dtype: Any, kind: str | None) -> Array | Quantised:
    """A parameter's value in the form in which the device keeps it (``Param.quantization``)."""
    return value.astype(dtype) if kind is None else quantise(value, kind, dtype)
