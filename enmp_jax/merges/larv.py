"""LARV: layers scaled by how structured their updates are and how well these agree with the base's weights.

Wang et al., "LARV: Data-Free Layer-wise Adaptive Rescaling Veneer for Model Merging", arXiv 2602.09413. Of a
base weight W and a task's delta D:

- contrast: ``r(W) / r(D)``, r the effective rank ``exp(-sum p log p)`` of the shares p of the squared
  singular values;
- conflict: ``|W D^T - D W^T| / (|W| |D|)`` and ``|W^T D - D^T W| / (|W| |D|)``, averaged;
- score of layer l of L (Eq. 8): ``contrast * (l / L)^(1/2) / (softplus(z) + 1)``, z the conflict standardised
  over layers.

Scores become scales by tiers. What the paper's tiers are worth could not be read, so they are the caller's;
its continuous form, ``1 + tanh(3 (score - 1)) / 2``, is close to 1.5 in every layer of a LoRA, whose
effective rank is at most r, far below that of the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_DEPTH = 0.5  # the paper's rho; its eta is 1


class Alignment(NamedTuple):
    """The tasks' deltas against the base weight that they change."""

    contrast: Float[Array, " task"]
    conflict: Float[Array, " task"]


@jax.jit
def alignment(
    weight: Float[Array, "out in"], a: Float[Array, "task rank in"], b: Float[Array, "task out rank"]
) -> Alignment:
    """Contrast and conflict of each ``b @ a``, none of which may be zero, with a base weight.

    Args:
        weight: of the base.
        a: LoRA's A of every task.
        b: LoRA's B, alpha / r in it or not.
    """

    def one(a: Float[Array, "rank in"], b: Float[Array, "out rank"]) -> tuple[Array, Array]:
        # singular values of b a are those of the product of two triangles of side r
        own = jnp.linalg.svd(jnp.linalg.qr(b)[1] @ jnp.linalg.qr(a.T)[1].T, compute_uv=False)
        gram_a, gram_b = a @ a.T, b.T @ b
        left, right = weight @ a.T, b.T @ weight  # W D^T = left b^T; W^T D = right^T a
        # |X - X^T|^2 = 2 (|X|^2 - tr X X)
        first = jnp.sum((left.T @ left) * gram_b) - _trace_of_square(b.T @ left)
        second = jnp.sum((right @ right.T) * gram_a) - _trace_of_square(right @ a.T)
        sizes = jnp.sum(weight**2) * jnp.sum(own**2)
        conflict = sum(jnp.sqrt(2 * jnp.maximum(x, 0) / sizes) for x in (first, second)) / 2
        return _effective_rank(own**2), jnp.asarray(conflict)

    with jax.default_matmul_precision("highest"):
        narrow = weight if weight.shape[0] < weight.shape[1] else weight.T
        base = _effective_rank(jnp.linalg.eigvalsh(narrow @ narrow.T))
        ranks, conflict = jax.vmap(one)(a, b)
    return Alignment(base / ranks, conflict)


def scores(
    contrast: Float[np.ndarray, " layer"], conflict: Float[np.ndarray, " layer"]
) -> Float[np.ndarray, " layer"]:
    """Score of every layer, in order from the input (Eq. 8).

    Args:
        contrast: of every layer, averaged over its modules and tasks.
        conflict: likewise.
    """
    spread = np.std(conflict)
    standard = (conflict - np.mean(conflict)) / (spread if spread > 0 else 1)
    depth = np.arange(1, len(contrast) + 1) / len(contrast)
    return contrast * depth**_DEPTH / (np.logaddexp(0, standard) + 1)


def tiered(score: Float[np.ndarray, " layer"], tiers: Sequence[float]) -> list[float]:
    """Scale of every layer: as many quantiles of the scores as there are tiers, the lowest first.

    Args:
        score: of every layer.
        tiers: scales, of the lowest scores first.
    """
    cuts = np.quantile(score, np.arange(1, len(tiers)) / len(tiers))
    return [float(tiers[i]) for i in np.searchsorted(cuts, score)]


def _effective_rank(energies: Float[Array, " k"]) -> Float[Array, ""]:
    share = jnp.maximum(energies, 0)
    share = share / jnp.sum(share)
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share, share)))


def _trace_of_square(matrix: Float[Array, "r r"]) -> Float[Array, ""]:
    return jnp.sum(matrix * matrix.T)
