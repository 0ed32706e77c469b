"""Statistics of data that some methods weigh the tasks' deltas by: a file of one matrix a task and module.

``enmp statistics`` measures them (``evaluation.statistics``); here they are found again for the modules of a
stack.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from enmp_jax.errors import UserError, one_line, suggestion
from enmp_jax.io.reading import open_tensors, read_float
from enmp_jax.io.writing import write_tensors
from enmp_jax.lora import LoraStack

Kind = Literal["gram", "fisher"]
"""gram: second moments of a module's inputs, [in, in]; fisher: of the gradient of the log-likelihood with
respect to its weight, [out, in]."""
_FORMAT = "enmp-statistics 1"


def write_statistics(
    path: Path,
    kind: Kind,
    matrices: Mapping[str, Mapping[str, Float[np.ndarray, "_ _"]]],
    spelling: Mapping[str, str],
) -> None:
    """Write ``{task: {module path: matrix}}``.

    Args:
        path: the file to write.
        kind: what the matrices are.
        matrices: float32.
        spelling: module path as the adapters' files have it -> in ``matrices``, where they differ.

    Raises:
        UserError: NaN or Inf in a matrix, or the file cannot be written.
    """
    tensors = {f"{task}/{module}": m for task, own in matrices.items() for module, m in own.items()}
    metadata = {"format": _FORMAT, "kind": kind, "spelling": json.dumps(dict(spelling))}
    write_tensors(path, tensors, metadata)


def read_statistics(
    path: Path, kind: Kind, stack: LoraStack
) -> dict[str, Float[np.ndarray, "layer task _ _"]]:
    """The matrices of every projection of a stack; zeros where a task has no LoRA.

    Args:
        path: a file of ``write_statistics``.
        kind: what they have to be.
        stack: the adapters; modules in its spelling or in that of the adapters' files.

    Raises:
        UserError: no such file, another kind, or a task or module that it lacks.
    """
    with open_tensors(path) as handle:
        said = handle.metadata() or {}
        if said.get("format") != _FORMAT:
            raise UserError(f"{path} holds no statistics: make them by enmp statistics RUN.yaml")
        if said["kind"] != kind:
            raise UserError(
                f"{path} holds {said['kind']} statistics, and {kind} is needed: enmp statistics --kind {kind}"
            )
        spelling, known = json.loads(said["spelling"]), set(handle.keys())
        found = {}
        for name, pair in stack.pairs.items():
            out, inner = pair.shape
            shape = (inner, inner) if kind == "gram" else (out, inner)
            stacked = np.zeros((*pair.present.shape, *shape), np.float32)
            for (layer, task), there in np.ndenumerate(pair.present):
                if not there:
                    continue
                module, owner = stack.paths(name)[layer], stack.tasks[task]
                key = f"{owner}/{spelling.get(module, module)}"
                if key not in known:
                    tasks = sorted({k.partition("/")[0] for k in known})
                    hint = f"measured for other adapters ({suggestion(owner, tasks, 'its tasks')})"
                    raise UserError(f"{path} says nothing of {one_line(module)} of {owner!r}: {hint}")
                matrix = read_float(handle, key, path)
                if matrix.shape != shape:
                    raise UserError(
                        f"{path}: {one_line(key)} is {matrix.shape}, not {shape}: measured for another base"
                    )
                stacked[layer, task] = matrix
            found[name] = stacked
    return found
