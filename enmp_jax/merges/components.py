"""Adapters taken apart into their singular components, the unit that AdaRank prunes.

Lee et al., "AdaRank: Adaptive Rank Pruning for Enhanced Model Merging", arXiv 2503.22178: a binary mask
over the singular components of every task's update, trained on the entropy of unlabelled inputs.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from enmp_jax.lora import LoraStack
from enmp_jax.merges.linalg import qr, svd


def singular_components(stack: LoraStack) -> LoraStack:
    """The adapters as ``task * rank`` adapters of rank 1, task after task, largest singular value first.

    Their sum is the sum of the adapters, so with the methods that only add (``sum``) a mask of these
    "tasks" is a mask of components. Tasks of smaller rank, or without a LoRA on a module, lack some.
    """
    ranks = max(pair.a.shape[2] for pair in stack.pairs.values())
    pairs = {}
    for name, pair in stack.pairs.items():
        a, b = jax.vmap(jax.vmap(_components, (0, 0)), (0, 0))(pair.a, pair.b)
        layers, n_tasks, own, _ = pair.a.shape
        rank = tuple(tuple(int(k < r) for r in row for k in range(ranks)) for row in pair.rank)
        a, b = (jnp.pad(x, ((0, 0), (0, 0), (0, ranks - own), (0, 0))) for x in (a, b))
        shape = layers, n_tasks * ranks
        own_a, own_b = a.reshape(*shape, 1, -1), b.reshape(*shape, -1, 1)
        pairs[name] = dataclasses.replace(pair, a=own_a, b=own_b, rank=rank)
    tasks = tuple(f"{task}#{k}" for task in stack.tasks for k in range(ranks))
    return dataclasses.replace(stack, pairs=pairs, tasks=tasks)


def _components(
    a: Float[Array, "rank in"], b: Float[Array, "out rank"]
) -> tuple[Float[Array, "rank in"], Float[Array, "rank out"]]:
    """Right and left singular vectors of ``b @ a`` as rows, the singular values in the left ones."""
    (left, core_left), (right, core_right) = qr(b), qr(a.T)
    u, s, vt = svd(core_left @ core_right.T)
    return vt @ right.T, ((left @ u) * s).T
