"""ENMP in JAX: find and prune the negative modules of LoRA adapters before merging them.

The pieces compose from left to right::

    adapters -> LoraStack -> prepare -> (masks -> merge -> deltas -> backbone -> scores) -> mask

See the README for the command line and ``enmp_jax.merges`` for the merge methods.
"""

import os as _os

# One BLAS thread: XLA's CPU thread pool calls LAPACK from several threads at once, and BLAS
# threads fighting for the same cores made batched SVDs 100 times slower. Must precede numpy.
_os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from enmp_jax.version import __version__

__all__ = ["__version__"]
