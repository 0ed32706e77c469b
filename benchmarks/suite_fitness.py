"""Is a suite fit for use? Base, every adapter alone and plain merges at their best scales, per task.

    python benchmarks/suite_fitness.py vision-small [--run RUN.yaml] [--methods sum ties tsv iso]

Scales are chosen on the search split by mean normalised accuracy; all columns are of that split, so that
the test split is left for searches. A suite is fit when the experts clearly beat the base and the best plain
merge lies between them.
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np

from enmp_jax.config import run_file
from enmp_jax.config.schema import parse
from enmp_jax.config.sections import MergeConfig
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.loaded_run import load
from enmp_jax.evaluation.scoring import Counts
from enmp_jax.runs.directory import environment

METHODS = {
    "sum": {"method": "sum"},
    "ties": {"method": "ties", "density": 0.4},
    "tsv": {"method": "tsv"},
    "iso": {"method": "iso"},
}
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.2, 1.6, 2.0)


def best_merge(evaluator: Evaluator) -> tuple[float, float, np.ndarray]:
    """Best scale, its mean normalised accuracy, and its accuracies by task, all on the search split."""
    scoring = evaluator.scoring("search")
    keep = np.repeat(evaluator.loaded.mask_spec.all_kept()[None], len(SCALES), axis=0)
    counts: Counts = evaluator.score(evaluator.inputs("search"), keep, np.asarray(SCALES, np.float32))
    normalised = np.asarray(scoring.normalised(counts))
    best = int(np.argmax(normalised))
    return SCALES[best], float(normalised[best]), np.asarray(scoring.accuracy(counts))[best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    args = parser.parse_args()
    run = run_file.load(args.suite)
    columns: dict[str, np.ndarray] = {}
    means: dict[str, float] = {}
    for name in args.methods:
        merge = parse(MergeConfig, METHODS[name], name)
        evaluator = Evaluator(load(dataclasses.replace(run, merge=merge), ("search",)))
        if not columns:
            sizes = evaluator.loaded.sizes("search")
            expert = evaluator.expert_scores("search")
            columns["base"] = np.asarray(evaluator.score_base("search").correct) / sizes
            columns["expert"] = expert
            means |= {"base": float((columns["base"] / expert).mean()), "expert": 1.0}
        scale, mean, accuracy = best_merge(evaluator)
        columns[f"{name} {scale:g}"], means[f"{name} {scale:g}"] = accuracy, mean
        print(f"{name}: scale {scale:g}, {mean:.4f}", flush=True)
    found = environment()
    print(
        f"\n{found['date']}, commit {found['commit']}, jax {found['packages']['jax']}, {found['devices']}\n"
    )
    print("| task | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for i, task in enumerate(evaluator.loaded.tasks):
        print(f"| {task} | " + " | ".join(f"{column[i]:.3f}" for column in columns.values()) + " |")
    print("| mean normalised | " + " | ".join(f"{means[name]:.3f}" for name in columns) + " |")


if __name__ == "__main__":
    main()
