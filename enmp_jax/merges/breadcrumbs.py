"""Model Breadcrumbs: the sum of each task's entries of middling magnitude.

Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", ECCV
2024, section 3. The outliers (gamma) and the small entries are masked layer by layer.
"""

from __future__ import annotations

from enmp_jax.merges.base import LayerMethod
from enmp_jax.merges.dare import added
from enmp_jax.merges.entrywise import Entrywise, entrywise_in_space
from enmp_jax.merges.hyperparameters import PositiveShare, ProperShare


def breadcrumbs(space: str = "full", density: PositiveShare = 0.1, gamma: ProperShare = 0.01) -> LayerMethod:
    """Model Breadcrumbs.

    Dense in full space, where export as a PEFT adapter truncates; low-rank, and exported exactly, in the
    KnOTS and core spaces.

    Args:
        space: see ``SPACES``.
        density: share of entries kept of each task, the largest below the outliers.
        gamma: share of the largest entries dropped as outliers.
    """

    def counts(size: int) -> tuple[int, int]:
        top = int(size * gamma)
        return top, min(top + int(size * density), size)

    return entrywise_in_space(space, Entrywise(added, counts))
