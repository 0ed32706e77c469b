"""``enmp search --dry-run``: everything of a search that can go wrong before it starts, and its cost."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np

from enmp_jax.config.run_file import RunConfig
from enmp_jax.errors import UserError
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.loaded_run import LoadedRun, load
from enmp_jax.evaluation.population import EvalInputs
from enmp_jax.io.progress import Reporter
from enmp_jax.masks import MaskSpec
from enmp_jax.runs.climb import step_cost
from enmp_jax.runs.search import check_search


def dry_run(run: RunConfig, reporter: Reporter) -> list[str]:
    """Load a run, compile its evaluation, score the first batch under the empty mask.

    No run directory is made; preprocessed examples may be cached, as by any command.

    Returns:
        Lines that say what a search would do.

    Raises:
        UserError: as ````enmp search````; or the scores are not finite.
    """
    reporter.say(f"loading {run.base.model} and {len(run.tasks)} adapters")
    loaded = load(run, reporter=reporter)
    evaluator, spec = Evaluator(loaded), loaded.mask_spec
    check_search(evaluator)
    inputs = evaluator.inputs("search")
    one = _one_batch(inputs)
    scale = run.merge.scale_grid[0] if run.merge.scale == "auto" else float(run.merge.scale)
    keep, scales = jnp.asarray(spec.all_kept()[None]), jnp.full(1, scale, jnp.float32)
    reporter.say("compiling")
    clock = time.perf_counter()
    compiled = jax.jit(evaluator.evaluate(evaluator.plan(one))).lower(one, keep, scales).compile()
    compiling, clock = time.perf_counter() - clock, time.perf_counter()
    counts = compiled(one, keep, scales)
    correct = np.asarray(counts.correct)[0]
    seconds = time.perf_counter() - clock
    if not np.isfinite(np.asarray(counts.log_likelihood)).all():
        raise UserError(
            "the plain merge gives log-likelihoods that are not finite: check merge.scale, the adapters' "
            "heads and base.dtype"
        )
    scored = int(np.asarray(one.batches[0].mask).sum())
    return [
        *_describe(loaded, spec),
        f"one batch of {scored} examples under one mask: {correct.sum():.0f} right, {seconds:.2f} s, "
        f"compiled in {compiling:.1f} s",
        *_plan(run, inputs),
    ]


def _one_batch(inputs: EvalInputs) -> EvalInputs:
    first = jax.tree.map(lambda x: x[:1], inputs.batches[0])
    return inputs._replace(batches=(first,))


def _describe(loaded: LoadedRun, spec: MaskSpec) -> list[str]:
    run, lines = loaded.run, []
    for i, (task, config) in enumerate(zip(loaded.tasks, run.tasks, strict=True)):
        classes = int(np.asarray(loaded.heads.allowed[i]).sum())
        sizes = ", ".join(f"{len(e[i].labels)} {split}" for split, e in loaded.examples.items())
        what = f"{classes} classes" if loaded.kinds[i] == "classification" else f"{loaded.kinds[i]}s"
        lines.append(f"{task}: {config.adapter}, {what}, {sizes}")
    merge = run.merge
    options = "".join(f", {name} {value}" for name, value in merge.arguments().items())
    isotropic = ", isotropized" if merge.isotropize else ""
    lines.append(
        f"merge: {merge.method} in {merge.space} space, scale {merge.scale}{options}{isotropic}; "
        f"{spec.n_modules} modules, at most {run.search.max_pruned:.0%} pruned"
    )
    return lines


def _plan(run: RunConfig, inputs: EvalInputs) -> list[str]:
    search = run.search
    batches = sum(b.label.shape[0] for b in inputs.batches)
    rows = sorted({b.label.shape[1] for b in inputs.batches})
    data = f"{batches} batch{'es' * (batches != 1)} of {' or '.join(map(str, rows))}"
    seeds = f"{search.seeds} seed{'s' * (search.seeds != 1)}"
    if search.strategy == "gradient":
        work = (
            f"{search.generations} steps, {seeds}: the price of {step_cost(search):g} masks a step x {data}"
        )
    else:
        masks = search.population * search.generations * search.seeds
        work = f"{search.population} x {search.generations} masks, {seeds}: {masks} masks x {data}"
    return [f"would search: {search.strategy}, {work}", "nothing was written"]
