"""The spaces a method can work in, and the coordinates of the tasks in them.

With thin QR ``[B_1 .. B_T] = Q_B R_B`` and ``[A_1; ..; A_T]^T = Q_A R_A`` every delta is
``Q_B (left_i right_i) Q_A^T`` with matrices of side T * rank; only those are touched per mask.

- full: the deltas themselves.
- knots: Stoica et al., "Model Merging with SVD to Tie the Knots", ICLR 2025: the SVD
  ``[D_1 .. D_T] = U S [V_1 .. V_T]`` of what is kept; methods act on the ``V_i``. In the
  reference: ``get_knots_components``, which drops singular values up to 1e-5; so does this.
- core: Panariello et al., "Accurate and Efficient Low-Rank Model Merging in Core Space", NeurIPS
  2025: methods act on ``U_B^T D_i V_A``, in the singular bases of what is kept of B and A. In the
  reference: ``get_core_matrices``.

"Kept" is a yes or no for bases and sizes (weight above zero); a relaxed mask weighs tasks only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from enmp_jax.deltas import LowRank
from enmp_jax.merges.base import LayerInputs, LayerMethod
from enmp_jax.merges.linalg import orthonormal, qr, svd, svd_by_qr

KNOTS_CUT = 1e-5
SPACES = ("full", "knots", "core")


class Size(NamedTuple):
    """Rows and columns of the space, of which there is one pair for each value of ``index``."""

    table: tuple[tuple[int, int], ...]
    index: Int[Array, ""] | int  # pyright: ignore[reportIncompatibleMethodOverride]

    def lookup(self, function: Callable[[int, int], int]) -> Int[Array, ""]:
        """``function(rows, columns)``, computed exactly on the host for every possible size."""
        return jnp.asarray([function(*size) for size in self.table], jnp.int32)[self.index]


class Coordinates(NamedTuple):
    """The tasks in a space: ``left_i right_i``, whose right factors have orthonormal rows."""

    left: Float[Array, "task p rank"]
    right: Float[Array, "task rank q"]

    def matrices(self) -> Float[Array, "task p q"]:
        """The products."""
        return jnp.matmul(self.left, self.right)


class QrFactors(NamedTuple):
    """QR of the stacked and of the single LoRA factors: what no mask changes."""

    q_b: Float[Array, "out p"]
    q_a: Float[Array, "in q"]
    r_b: Float[Array, "task p rank"]  # R_B, by task
    r_a: Float[Array, "task q rank"]  # R_A, by task
    own_a: Float[Array, "task in rank"]  # Q_i of A_i^T = Q_i R_i
    left: Float[Array, "task p rank"]  # R_B,i R_i^T
    right: Float[Array, "task rank q"]  # Q_i^T Q_A
    rank: Int[Array, " task"]


class MatrixMethod(NamedTuple):
    """A method that commutes with rotations of the space: ``combine(prepare(c), weights, size)``."""

    prepare: Callable[[Coordinates], Any]
    combine: Callable[[Any, Float[Array, " task"], Size], Float[Array, "p q"]]
    # see ``LayerMethod.isotropic``
    combine_isotropic: Callable[[Any, Float[Array, " task"], Size], Float[Array, "p q"]] | None = None


def qr_factors(inputs: LayerInputs) -> QrFactors:
    """The QR factors of one projection in one layer."""
    tasks, out, rank = inputs.b.shape
    q_b, r_b = qr(jnp.moveaxis(inputs.b, 0, 1).reshape(out, tasks * rank))
    q_a, r_a = qr(inputs.a.reshape(tasks * rank, -1).T)
    own_a, own_r = jax.vmap(lambda a: qr(a.T))(inputs.a)
    r_b, r_a = (jnp.moveaxis(r.reshape(-1, tasks, rank), 1, 0) for r in (r_b, r_a))
    left = jnp.matmul(r_b, jnp.swapaxes(own_r, 1, 2))
    return QrFactors(q_b, q_a, r_b, r_a, own_a, left, jnp.matmul(jnp.swapaxes(own_a, 1, 2), q_a), inputs.rank)


def matrix_method_in_space(space: str, method: MatrixMethod, sequential: bool = False) -> LayerMethod:
    """A rotation-invariant method in any space.

    Full and core space then differ in their size only, and ``method.prepare`` runs once; in the
    KnOTS space it runs per mask.
    """

    def prepare(inputs: LayerInputs) -> tuple[QrFactors, Any]:
        factors = qr_factors(inputs)
        return factors, method.prepare(Coordinates(factors.left, factors.right))

    def merge(ingredients: tuple[QrFactors, Any], weights: Float[Array, " task"]) -> LowRank:
        factors, prepared = ingredients
        if space == "knots":
            basis, coordinates, size = knots(factors, weights)
            core = basis @ method.combine(method.prepare(coordinates), weights, size)
        else:
            core = method.combine(prepared, weights, _size(space, factors, weights))
        return LowRank(factors.q_b, core, factors.q_a.T)

    combine_isotropic = method.combine_isotropic
    if space == "knots" or combine_isotropic is None:
        return LayerMethod(prepare, merge, sequential)

    def isotropic(ingredients: tuple[QrFactors, Any], weights: Float[Array, " task"]) -> LowRank:
        factors, prepared = ingredients
        core = combine_isotropic(prepared, weights, _size(space, factors, weights))
        return LowRank(factors.q_b, core, factors.q_a.T)

    return LayerMethod(prepare, merge, sequential, isotropic)


def knots(
    factors: QrFactors, weights: Float[Array, " task"], precise: bool = True
) -> tuple[Float[Array, "p k"], Coordinates, Size]:
    """``U S`` in the coordinates of ``Q_B``, the ``V_i`` in those of ``Q_A``, and their size.

    ``precise`` for methods that magnify rounding (see ``svd_by_qr``).
    """
    tasks, p, rank = factors.left.shape
    kept = jax.lax.stop_gradient((weights > 0).astype(weights.dtype))
    stacked = jnp.moveaxis(factors.left * kept[:, None, None], 0, 1).reshape(p, tasks * rank)
    _, s, vt = svd_by_qr(stacked) if precise else svd(stacked)
    # in float32 a zero singular value comes out as some eps times the largest
    valid = s > jnp.maximum(KNOTS_CUT, 10 * jnp.finfo(s.dtype).eps * s[0])
    vt = jnp.where(valid[:, None], vt, 0)
    # twice: CART truncates between nearly equal singular values, which magnifies rounding 1000 times
    vt = orthonormal(orthonormal(vt.T)).T
    v = jnp.moveaxis(vt.reshape(-1, tasks, rank), 1, 0)
    columns = factors.own_a.shape[1]
    table = tuple((k, columns) for k in range(s.shape[0] + 1))
    # U S as a product with V: rounding that mixes neighbouring V cancels in what it gives back
    return stacked @ vt.T, Coordinates(v, factors.right), Size(table, jnp.sum(valid))


def core_bases(
    factors: QrFactors, weights: Float[Array, " task"]
) -> tuple[Float[Array, "p k"], Float[Array, "q j"], Size]:
    """Left singular vectors of ``R_B`` and ``R_A``, pruned tasks left out; zero beyond the size."""
    kept = jax.lax.stop_gradient((weights > 0).astype(weights.dtype))
    size = _size("core", factors, weights)

    def basis(r: Float[Array, "task p rank"], count: Int[Array, ""]) -> Float[Array, "p k"]:
        stacked = jnp.moveaxis(r * kept[:, None, None], 0, 1).reshape(r.shape[1], -1)
        u = svd(stacked)[0]
        return jnp.where(jnp.arange(u.shape[1]) < count, u, 0)

    rows, columns = size.lookup(lambda rows, _: rows), size.lookup(lambda _, columns: columns)
    return basis(factors.r_b, rows), basis(factors.r_a, columns), size


def _size(space: str, factors: QrFactors, weights: Float[Array, " task"]) -> Size:
    rows, columns = factors.q_b.shape[0], factors.q_a.shape[0]
    if space == "full":
        return Size(((rows, columns),), 0)
    tasks, _, rank = factors.left.shape
    table = tuple((min(rows, k), min(columns, k)) for k in range(tasks * rank + 1))
    return Size(table, jnp.sum(jnp.where(weights > 0, factors.rank, 0)))
