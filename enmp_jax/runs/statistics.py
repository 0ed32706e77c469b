"""``enmp statistics``: what regmean and fisher need to know of the tasks' data, as a file."""

from __future__ import annotations

from pathlib import Path

from enmp_jax.config.run_file import RunConfig
from enmp_jax.data import Split
from enmp_jax.errors import UserError
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.loaded_run import load
from enmp_jax.evaluation.statistics import measure
from enmp_jax.io.progress import Reporter
from enmp_jax.io.writing import check_unused
from enmp_jax.merges.statistics import Kind, write_statistics


def write_run_statistics(
    run: RunConfig, out: Path, kind: Kind, split: Split, reporter: Reporter
) -> dict[str, int]:
    """Measure and write them; returns the examples of every task.

    Args:
        run: base, adapters and data; its merge method does not matter.
        out: file to make.
        kind: see ``evaluation.statistics.measure``.
        split: whose examples.
        reporter: takes lines of what is done.

    Raises:
        UserError: bad input, a file that is there already, or a base that is divided over devices.
    """
    check_unused(out)
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: give the file a name that ends in .safetensors")
    loaded = load(run, (split,), reporter=reporter)
    found = measure(Evaluator(loaded, reporter.say), kind, split, lambda task: reporter.say(f"{task}: done"))
    stack, matrices = loaded.stack, {}
    for i, task in enumerate(loaded.tasks):
        matrices[task] = {
            path: found[task][name][layer]
            for name, pair in stack.pairs.items()
            for layer, path in enumerate(stack.paths(name))
            if pair.present[layer, i]
        }
    spelling = {
        own: path
        for name, files in loaded.adapters.names.items()
        for own, path in zip(files, stack.paths(name), strict=True)
        if own != path
    }
    write_statistics(out, kind, matrices, spelling)
    return {task: int(n) for task, n in zip(loaded.tasks, loaded.sizes(split), strict=True)}
