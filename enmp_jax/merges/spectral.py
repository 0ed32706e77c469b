"""Functions of singular values: polar factors, isotropic matrices, truncation.

Derivatives are those of the matrix function (Daleckii-Krein), finite for zero, repeated and
missing singular values, where differentiating through an SVD is not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Svd = tuple[Float[Array, "*batch p k"], Float[Array, "*batch k"], Float[Array, "*batch k q"]]


@jax.custom_jvp
def svd(matrix: Float[Array, "*batch p q"]) -> Svd:
    """Thin SVD through which no derivative passes: singular vectors have none at repeated values.

    On CPUs by QR iteration (gesvd): LAPACK's divide and conquer, two to four times faster, now and
    then returns NaN for a rank-deficient float32 matrix (seen: one of 768 of side 128, jax 0.10).
    """
    by_qr = _by(jax.lax.linalg.SvdAlgorithm.QR)
    return jax.lax.platform_dependent(matrix, cpu=by_qr, default=_by(None))


@svd.defjvp
def _svd_jvp(primals: tuple, tangents: tuple) -> tuple[Svd, Svd]:
    out = svd(*primals)
    return out, jax.tree.map(jnp.zeros_like, out)


def _by(algorithm: jax.lax.linalg.SvdAlgorithm | None) -> Callable[[Float[Array, "*batch p q"]], Svd]:
    return lambda matrix: tuple(jax.lax.linalg.svd(matrix, full_matrices=False, algorithm=algorithm))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _function(
    matrix: Float[Array, "p q"], flat: bool, cut: Float[Array, ""], count: Int[Array, ""]
) -> Float[Array, "p q"]:
    """``sum f(s_i) u_i v_i^T`` over the first ``count`` triplets above ``cut``; f(s) = 1 if flat else s."""
    u, s, vt = svd(matrix)
    return jnp.matmul(u * _values(s, flat, cut, count), vt)


def _values(s: Float[Array, " k"], flat: bool, cut: Float[Array, ""], count: Int[Array, ""]) -> Array:
    kept = (s > cut) & (jnp.arange(s.shape[0]) < count)
    return jnp.where(kept, jnp.ones_like(s) if flat else s, 0)


@_function.defjvp
def _function_jvp(flat: bool, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    matrix, cut, count = primals
    tangent = tangents[0]
    u, s, vt = svd(matrix)
    f = _values(s, flat, cut, count)
    kept = (s > cut) & (jnp.arange(s.shape[0]) < count)

    def ratio(numerator: Array, denominator: Array, otherwise: Array | float) -> Array:
        tiny = jnp.finfo(s.dtype).eps * s[0]
        safe = jnp.abs(denominator) > tiny
        return jnp.where(safe, numerator / jnp.where(safe, denominator, 1), otherwise)

    inner = u.T @ tangent @ vt.T
    slope = jnp.zeros_like(inner) if flat else (kept[:, None] & kept).astype(s.dtype)
    difference = ratio(f[:, None] - f, s[:, None] - s, slope)
    total = ratio(f[:, None] + f, s[:, None] + s, 0.0)
    middle = difference * (inner + inner.T) / 2 + total * (inner - inner.T) / 2
    gain = ratio(f, s, 0.0)
    # what the tangent does outside the spans of u and v (empty for the larger-side basis)
    left = (tangent @ vt.T - u @ inner) * gain
    right = gain[:, None] * (u.T @ tangent - inner @ vt)
    return (u * f) @ vt, u @ middle @ vt + left @ vt + u @ right


def truncate(matrix: Float[Array, "p q"], count: Int[Array, ""] | int) -> Float[Array, "p q"]:
    """The best approximation of rank ``count``."""
    return _function(matrix, False, jnp.zeros((), matrix.dtype), jnp.asarray(count))


def polar(matrix: Float[Array, "p q"], cut: Float[Array, ""] | float | None = None) -> Float[Array, "p q"]:
    """``sum u_i v_i^T`` over the singular triplets with ``s_i > cut``.

    The default cut is what rounding makes of a zero: ``eps * max(p, q) * |matrix|_F``.
    """
    if cut is None:
        eps = jnp.finfo(matrix.dtype).eps
        cut = jax.lax.stop_gradient(eps * max(matrix.shape) * jnp.linalg.norm(matrix))
    return _function(matrix, True, jnp.asarray(cut, matrix.dtype), jnp.asarray(min(matrix.shape)))


def isotropic(matrix: Float[Array, "p q"], cut: float = 5e-5) -> Float[Array, "p q"]:
    """Replace the singular values above ``cut`` by their mean and the others by zero.

    ``polar(C) * trace(polar(C)^T C) / rank(C)``.
    """
    factor = polar(matrix, cut)
    rank = jax.lax.stop_gradient(jnp.sum(factor * factor))  # one per kept triplet
    return factor * (jnp.sum(factor * matrix) / jnp.maximum(jnp.round(rank), 1))
