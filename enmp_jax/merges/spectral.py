"""Functions of singular values: polar factors, isotropic matrices, truncation.

Derivatives are those of the matrix function (Daleckii-Krein), finite for zero, repeated and
missing singular values, where differentiating through an SVD is not.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from enmp_jax.merges.batching import one_by_one, one_by_one_differentiable
from enmp_jax.merges.linalg import polar_by_products, polar_if_easy, svd

ISOTROPIC_CUT = 5e-5  # the reference's
SpectralFunction = Literal["polar", "easy polar", "truncated"]


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _function(
    matrix: Float[Array, "p q"],
    function: SpectralFunction,
    cut: Float[Array, ""],
    count: Int[Array, ""],
    wanted: Bool[Array, ""] | bool,
) -> Float[Array, "p q"]:
    """``sum f(s_i) u_i v_i^T``: f is 1 above ``cut``, or s for the first ``count`` triplets.

    An "easy" polar factor is one that matrix products are likely to find. A result that is not ``wanted``
    (its derivative may be) is zeros on CPUs.
    """
    return _FUNCTIONS[function](matrix, cut, count, jnp.asarray(wanted))


def _by_svd(
    flat: bool, matrix: Float[Array, "p q"], cut: Array, count: Array, _: Array
) -> Float[Array, "p q"]:
    u, s, vt = svd(matrix)
    return jnp.matmul(u * _values(s, flat, cut, count), vt)


def _by_products(matrix: Float[Array, "p q"], cut: Array, *_: Array) -> Float[Array, "p q"]:
    return polar_by_products(matrix, cut)


def _easy_polar(matrix: Float[Array, "p q"], *others: Array) -> Float[Array, "p q"]:
    factor, easy = polar_if_easy(matrix)
    return jax.lax.cond(easy, lambda: factor, lambda: _by_svd(True, matrix, *others))


def _truncated(matrix: Float[Array, "p q"], *others: Array) -> Float[Array, "p q"]:
    return jax.lax.cond(others[-1], lambda: _by_svd(False, matrix, *others), lambda: jnp.zeros_like(matrix))


# side 128 on two CPU cores: 1.4 ms by SVD, 7 ms by the products that always work
_FUNCTIONS = {
    "polar": one_by_one(partial(_by_svd, True), _by_products),
    "easy polar": one_by_one(_easy_polar, _by_products),
    "truncated": one_by_one(_truncated, partial(_by_svd, False)),
}


def _values(s: Float[Array, " k"], flat: bool, cut: Float[Array, ""], count: Int[Array, ""]) -> Array:
    return jnp.where(_kept(s, flat, cut, count), jnp.ones_like(s) if flat else s, 0)


def _kept(s: Float[Array, " k"], flat: bool, cut: Float[Array, ""], count: Int[Array, ""]) -> Array:
    return s > cut if flat else (s > cut) & (jnp.arange(s.shape[0]) < count)


@_function.defjvp
def _function_jvp(function: SpectralFunction, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    matrix, cut, count, _ = primals
    flat, tangent = function != "truncated", tangents[0]
    u, s, vt = svd(matrix)
    f = _values(s, flat, cut, count)
    kept = _kept(s, flat, cut, count)

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


def truncate(
    matrix: Float[Array, "p q"], count: Int[Array, ""] | int, wanted: Bool[Array, ""] | bool = True
) -> Float[Array, "p q"]:
    """The best approximation of rank ``count``; anything where it is not ``wanted``."""
    return _function(matrix, "truncated", jnp.zeros((), matrix.dtype), jnp.asarray(count), wanted)


def polar(matrix: Float[Array, "p q"], cut: Float[Array, ""] | float | None = None) -> Float[Array, "p q"]:
    """``sum u_i v_i^T`` over the singular triplets with ``s_i > cut``.

    The default cut is what rounding makes of a zero: ``eps * max(p, q) * |matrix|_F``; it is the faster
    way where the other singular values are not far apart.
    """
    function = "polar" if cut is not None else "easy polar"
    if cut is None:
        eps = jnp.finfo(matrix.dtype).eps
        cut = jax.lax.stop_gradient(eps * max(matrix.shape) * jnp.linalg.norm(matrix))
    return _function(matrix, function, jnp.asarray(cut, matrix.dtype), jnp.asarray(min(matrix.shape)), True)


def isotropic(matrix: Float[Array, "p q"], cut: float = ISOTROPIC_CUT) -> Float[Array, "p q"]:
    """Replace the singular values above ``cut`` by their mean and the others by zero.

    ``polar(C) * trace(polar(C)^T C) / rank(C)``.
    """
    factor = polar(matrix, cut)
    rank = jax.lax.stop_gradient(jnp.sum(factor * factor))  # one per kept triplet
    return factor * (jnp.sum(factor * matrix) / jnp.maximum(jnp.round(rank), 1))


def _decomposed(u: Float[Array, "p k"], s: Float[Array, " k"], v: Float[Array, "q k"]) -> Float[Array, "p q"]:
    return isotropic((polar(u) * s) @ polar(v).T)


def _decomposed_if_needed(
    u: Float[Array, "p k"], s: Float[Array, " k"], v: Float[Array, "q k"]
) -> Float[Array, "p q"]:
    left, right = polar(u), polar(v)
    rank = jnp.sum(s > 0)
    kept = s > ISOTROPIC_CUT
    mean = jnp.sum(s * kept) / jnp.maximum(jnp.sum(kept), 1)
    independent = [jnp.abs(jnp.sum(factor * factor) - rank) < 0.5 for factor in (left, right)]
    return jax.lax.cond(
        independent[0] & independent[1],
        lambda: (left * jnp.where(kept, mean, 0)) @ right.T,
        lambda: isotropic((left * s) @ right.T),
    )


_isotropic_product = one_by_one_differentiable(_decomposed_if_needed, _decomposed)


def isotropic_product(
    u: Float[Array, "p k"], s: Float[Array, " k"], v: Float[Array, "q k"]
) -> Float[Array, "p q"]:
    """``isotropic(polar(u) diag(s) polar(v)^T)``; ``u`` and ``v`` are zero where ``s`` is.

    With independent columns that product is an SVD already; CPUs then leave out its own.
    """
    return _isotropic_product(u, s, v)
