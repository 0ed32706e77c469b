"""ENMP in JAX: find and prune the negative modules of LoRA adapters before merging them.

The names in ``__all__`` are the public API (documented in ``enmp_jax.api``); everything else is internal
and may change. The pieces compose from left to right::

    adapters -> LoraStack -> prepare -> (masks -> merge -> deltas -> backbone -> scores) -> mask

Importing this package imports neither JAX nor numpy: a public name is loaded when it is first used.
"""

import importlib
import os
import sys
import types
import warnings
from typing import TYPE_CHECKING, Any

from enmp_jax.errors import UserError
from enmp_jax.version import __version__

if TYPE_CHECKING:  # what type checkers see of the names that __getattr__ loads
    from enmp_jax import merges
    from enmp_jax.api import (
        MaskSpec,
        Result,
        compare,
        controls,
        evaluate,
        export_peft,
        load_adapters,
        load_run,
        refine,
        search,
    )
else:

    def __getattr__(name: str) -> Any:
        """Load a public name (PEP 562)."""
        if name == "merges":
            return importlib.import_module("enmp_jax.merges")
        if name in __all__:
            return getattr(importlib.import_module("enmp_jax.api"), name)
        raise AttributeError(f"module 'enmp_jax' has no attribute {name!r}")


__all__ = [
    "MaskSpec", "Result", "UserError", "__version__", "compare", "controls", "evaluate", "export_peft",
    "load_adapters", "load_run", "merges", "refine", "search",
]  # fmt: skip

# One BLAS thread: XLA's CPU thread pool calls LAPACK from several threads at once, and BLAS threads
# fighting for the same cores slow batched SVDs down. JAX's LAPACK is scipy's, which reads the variable when
# scipy.linalg is imported; JAX itself does that at its first decomposition.
if "OPENBLAS_NUM_THREADS" not in os.environ:
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    if "scipy.linalg" in sys.modules:
        warnings.warn(
            "scipy.linalg was imported before enmp_jax, with several BLAS threads, which slow JAX down on "
            "CPUs: import enmp_jax first, or set OPENBLAS_NUM_THREADS=1 before Python starts",
            stacklevel=2,
        )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """This package; ``search`` is the public function even after the room of that name was imported.

    Importing a submodule binds its name in the package, which would hide the function. Internal code
    imports from the room (``from enmp_jax.search.loop import run``), which does not look here.
    """

    @property
    def search(self) -> Any:
        return importlib.import_module("enmp_jax.api").search

    @search.setter
    def search(self, room: types.ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package
