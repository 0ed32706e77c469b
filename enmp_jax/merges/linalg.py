"""Decompositions that are right in float32 and never hang, on every platform.

On CPUs a batch is decomposed one matrix at a time (see ``batching``); it costs nothing: 48 float32
SVDs of side 128 on two busy cores took 116 ms one by one and 160 ms as a batch. On accelerators
batches stay batches, and polar factors are made of matrix products alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from enmp_jax.merges.batching import one_by_one

Svd = tuple[Float[Array, "p k"], Float[Array, " k"], Float[Array, "k q"]]
_QUINTIC = (3.4445, -4.7750, 2.0315)  # steep at zero; maps (0, 1] to (0, 1.21], large values near 1
_QUINTIC_STEPS = 16
_CUBIC_STEPS = 8


def _lapack_svd(matrix: Float[Array, "p q"]) -> Svd:
    """Divide and conquer (gesdd); QR iteration (gesvd), four times slower, for what it fails on.

    gesdd returns NaN now and then for a rank-deficient float32 matrix (seen: one of 768 of side 128).
    """
    found = _svd_by(None)(matrix)
    by_qr = _svd_by(jax.lax.linalg.SvdAlgorithm.QR)
    return jax.lax.cond(jnp.isnan(found[1][0]), lambda: by_qr(matrix), lambda: found)


def _svd_by(algorithm: jax.lax.linalg.SvdAlgorithm | None) -> Callable[[Float[Array, "p q"]], Svd]:
    return lambda matrix: tuple(jax.lax.linalg.svd(matrix, full_matrices=False, algorithm=algorithm))


_svd = one_by_one(_lapack_svd, _svd_by(None))
_precise_svd = one_by_one(_svd_by(jax.lax.linalg.SvdAlgorithm.QR), _svd_by(None))
_qr = one_by_one(lambda m: tuple(jnp.linalg.qr(m)), lambda m: tuple(jnp.linalg.qr(m)))


@jax.custom_jvp
def svd(matrix: Float[Array, "p q"]) -> Svd:
    """Thin SVD through which no derivative passes: singular vectors have none at repeated values.

    Singular values to about ``2e-6`` of the largest in float32. Batch it with ``jax.vmap``.
    """
    return _svd(matrix)


@svd.defjvp
def _svd_jvp(primals: tuple, tangents: tuple) -> tuple[Svd, Svd]:
    out = svd(*primals)
    return out, jax.tree.map(jnp.zeros_like, out)


def svd_by_qr(matrix: Float[Array, "p q"]) -> Svd:
    """``svd`` by QR iteration on CPUs: four times slower, twice as exact where it was needed.

    For the KnOTS basis, whose rounding CART magnifies 1000 times between nearly equal singular values
    (the golden case that suffers most: 5.6e-5 this way, 1.2e-4 by divide and conquer).
    """
    return _precise_svd(jax.lax.stop_gradient(matrix))


def qr(matrix: Float[Array, "m n"]) -> tuple[Float[Array, "m k"], Float[Array, "k n"]]:
    """Thin QR; ``q`` orthonormal to about 1e-7 in float32, and ``r = q^T matrix``."""
    q = orthonormal(_qr(matrix)[0])
    return q, q.T @ matrix


def orthonormal(q: Float[Array, "m k"]) -> Float[Array, "m k"]:
    """One Newton step: float32 QR and SVD leave columns orthonormal to about 1e-6, this to 1e-7."""
    return 1.5 * q - 0.5 * q @ (q.T @ q)


def polar_by_products(matrix: Float[Array, "p q"], cut: Float[Array, ""] | float) -> Float[Array, "p q"]:
    """``sum u_i v_i^T`` over the singular triplets with ``s_i > cut``, by matrix products alone.

    Newton-Schulz makes an isometry W of ``matrix``; ``H = W^T matrix`` then has the singular values
    as eigenvalues, and ``(I + sign(H - cut I)) / 2``, the sign by Newton-Schulz again, is the
    projector on those above the cut (the way QDWH-SVD goes: Nakatsukasa and Higham, 2013). What W is
    on directions below the cut, where it depends on rounding, is thereby of no consequence. Zero
    columns (of the longer-sided way up) stay exactly zero.

    In float32 the relative error against a float64 SVD of the same matrix was 7e-7 for well-conditioned and
    rank-deficient matrices of side 24 and 1.6e-6 at a condition number of 1000 (by float32 SVD: 7e-7
    and 2.3e-6). Wanted: full float32 products (``jax.default_matmul_precision("highest")``).
    """
    if matrix.shape[0] < matrix.shape[1]:
        return polar_by_products(matrix.T, cut).T
    whole = _newton_schulz(matrix)
    hermitian = whole.T @ matrix
    hermitian = (hermitian + hermitian.T) / 2
    identity = jnp.eye(matrix.shape[1], dtype=matrix.dtype)
    sign = _newton_schulz(hermitian - cut * identity)
    return whole @ (identity + (sign + sign.T) / 2) / 2


_EASY_STEPS = (4, 9)  # four steps enlarge what is small at least nine times
_EASY_RATIO = 0.25  # smallest to largest singular value that the first steps are the best for


def polar_if_easy(matrix: Float[Array, "p q"]) -> tuple[Float[Array, "p q"], Bool[Array, ""]]:
    """``U V^T`` of a matrix whose singular values are zero or not far apart, and whether it was one.

    Newton-Schulz steps scaled for a ratio of 0.25 (Chen and Chow, "A stable scaling of Newton-Schulz",
    2014), up to nine of them. It checks itself: once a step changes little, every singular value is one,
    or was below ``eps * max(p, q) * |matrix|_F``, which is what rounding makes of a zero, and is small
    still. Side 128 on two CPU cores: 0.6 ms, where an SVD takes 1.4.

    Relative Frobenius error in float32 where it says yes: 2e-7 (side 128, ratios down to 0.15), 4e-5 with
    singular values just below rounding. Where it says no, the first result means nothing.
    """
    norm = jnp.linalg.norm(matrix)
    x = matrix / jnp.where(norm > 0, norm, 1)
    # an upper bound of the largest singular value: above sqrt(3) the steps would turn signs round
    bound = jnp.sqrt(jnp.max(jnp.sum(jnp.abs(x.T @ x), axis=1)))
    x = x / jnp.where(bound > 0, bound, 1)
    # the convergence is quadratic: after a change of 5e-4 (float32, side 128) the error is below 1e-6
    small = 3 * jnp.finfo(x.dtype).eps * max(x.shape) * jnp.linalg.norm(x)
    least, most = _EASY_STEPS

    def going(carry: tuple) -> Bool[Array, ""]:
        step, _, _, change = carry
        return (step < least) | ((step < most) & (change > small))  # NaN, where it diverges, ends it too

    def improve(carry: tuple) -> tuple:
        step, x, low, _ = carry
        rho = jnp.sqrt(3 / (1 + low + low * low))
        x = x * rho
        change = 0.5 * (x - x @ (x.T @ x))
        return step + 1, x + change, 0.5 * rho * low * (3 - (rho * low) ** 2), jnp.linalg.norm(change)

    start = (0, x, jnp.asarray(_EASY_RATIO, x.dtype), jnp.zeros((), x.dtype))
    _, x, _, change = jax.lax.while_loop(going, improve, start)
    return x, change <= small


def _newton_schulz(matrix: Float[Array, "p q"]) -> Float[Array, "p q"]:
    """The polar factor, of singular values down to about 1e-8 of the Frobenius norm.

    Quintic steps (Jordan et al., "Muon", 2024) bring small singular values up to about one, by a factor of
    3.4 each; cubic steps, ``1.5 x - 0.5 x x^T x``, make them one.
    """
    norm = jnp.linalg.norm(matrix)
    x = matrix / jnp.where(norm > 0, norm, 1)
    a, b, c = _QUINTIC
    twice = 2 if matrix.dtype == jnp.float64 else 1  # twice the digits, twice the steps

    def quintic(_: Any, x: Array) -> Array:
        gram = x.T @ x
        return a * x + x @ (b * gram + c * (gram @ gram))

    def cubic(_: Any, x: Array) -> Array:
        return 1.5 * x - 0.5 * x @ (x.T @ x)

    x = jax.lax.fori_loop(0, _QUINTIC_STEPS * twice, quintic, x)
    return jax.lax.fori_loop(0, _CUBIC_STEPS, cubic, x)
