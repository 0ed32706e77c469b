"""Model Breadcrumbs: the sum of each task's entries of middling magnitude.

Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", ECCV
2024, section 3. The outliers (gamma) and the small entries are masked layer by layer.
"""

from __future__ import annotations

from enmp_jax.merges.base import LayerMethod
from enmp_jax.merges.dare import added
from enmp_jax.merges.entrywise import Entrywise, in_space


def breadcrumbs(space: str = "full", density: float = 0.1, gamma: float = 0.01) -> LayerMethod:
    """Model Breadcrumbs.

    Args:
        space: see ``SPACES``.
        density: share of entries kept of each task, the largest below the outliers.
        gamma: share of the largest entries dropped as outliers.
    """

    def counts(size: int) -> tuple[int, int]:
        top = int(size * gamma)
        return top, min(top + int(size * density), size)

    return in_space(space, Entrywise(added, counts))
