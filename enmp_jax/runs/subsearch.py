"""A search that is one entry of a table: found and selected as ``enmp search`` does, nothing more."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from enmp_jax.devices.distributed import all_or_none
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.population import EvalInputs
from enmp_jax.io.progress import Reporter
from enmp_jax.runs.directory import RunDirectory
from enmp_jax.runs.finalists import Finalist, select, with_plain
from enmp_jax.runs.search import check_search, search


def search_and_select(
    evaluator: Evaluator, path: Path | None, reporter: Reporter, inputs: EvalInputs, scale: float
) -> dict[int, Finalist]:
    """What every seed of the run's search found, the selection split having chosen; the plain merge may win.

    Args:
        evaluator: of the run.
        path: directory for history and checkpoints, with which an interrupted search goes on; None: none.
        reporter: progress.
        inputs: of the search split.
        scale: merge coefficient.

    Raises:
        UserError: settings of the search that cannot work.
    """
    check_search(evaluator)
    with contextlib.ExitStack() as stack:
        if path is None:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="enmp-")))
        directory = stack.enter_context(
            all_or_none(lambda: RunDirectory(path, resume=True, say=reporter.say))
        )
        all_or_none(lambda: directory.start(evaluator.loaded.run))
        found = search(evaluator, directory, reporter, inputs, evaluator.scoring("search"), scale)
        return select(evaluator, with_plain(evaluator, found.finalists, scale))
