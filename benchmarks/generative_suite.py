"""Searches on llm-small, over methods and seeds that draw other data; everything in one process.

    python benchmarks/generative_suite.py --out FILE.jsonl [--methods tsv ties] [--columns weights paper ...]
        [--seeds 3] [--examples 8] [--test 32] [--steps 6] [--generations 2] [--dtype float32]
    python benchmarks/generative_suite.py --table FILE.jsonl

One line of JSON a row: seed x method x column; rows that are there are not made again, and rows of other
experts are refused. A seed draws its own search and selection splits; the test split is the same for all, and
read once a row. Columns:

    plain    the merge as it is, at the scale of the run file's grid that is best on the search split
    paper    CMA-ES, 16 masks of layers a generation, by accuracy (of a completion: the likelihood), with
             the best mask on the search split
    random   two random masks with as many pruned modules as the paper's, their mean
    weights  weights of all projections by the gradient of ``log_likelihood``, stopped by the selection split
    weights, probability   the same by ``probability``, the mean likelihood of single tokens
    weights, no labels     the same by ``expert_kl``

``base`` and ``experts`` are scored once a file.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from evidence_report import read
from scipy import stats

from enmp_jax.adapters.recipe import sha256
from enmp_jax.config import run_file
from enmp_jax.config.schema import parse
from enmp_jax.config.sections import MergeConfig, SearchConfig
from enmp_jax.data import redraw
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.loaded_run import LoadedRun, load
from enmp_jax.io.progress import SILENT
from enmp_jax.masks import MaskSpec
from enmp_jax.runs.climb import STEP_COST
from enmp_jax.runs.directory import environment
from enmp_jax.search import controls, gradient, strategies

FITNESS = {
    "weights": "log_likelihood", "weights, probability": "probability", "weights, no labels": "expert_kl",
}  # fmt: skip
POPULATION, RANDOM = 16, 2


class Found(NamedTuple):
    """What a column found: masks or weights, and its example-evaluations."""

    keep: np.ndarray
    cost: float
    extra: dict[str, Any]


class Bench:
    """The suite, loaded once, under every method and on every draw."""

    def __init__(self, args: argparse.Namespace):
        over = {"base": {"dtype": args.dtype}, "evaluation": {"batch_size": args.batch_size}}
        self.args, run = args, run_file.load(args.suite, over)
        evaluation = dataclasses.replace(
            run.evaluation, search_examples=None, selection_examples=None, test_examples=args.test
        )
        self.loaded: LoadedRun = load(dataclasses.replace(run, evaluation=evaluation), reporter=SILENT)
        stack, share = self.loaded.stack, run.search.max_pruned
        self.layers, self.projections = (
            MaskSpec.of(stack, granularity, share) for granularity in ("layer", "projection")
        )
        self.gradients: dict[Any, gradient.Ascent] = {}

    def adapters(self) -> str:
        """A hash of the experts: trained again elsewhere they are others."""
        known = self.loaded.adapters.adapters
        return hashlib.sha256("".join(sha256(known[task]) for task in self.loaded.tasks).encode()).hexdigest()

    @functools.cache  # noqa: B019 (lives as long as the process)
    def whole(self, method: str, fitness: str) -> Evaluator:
        """Under a method and fitness, on the splits as they are."""
        run = self.loaded.run
        search = {"fitness": fitness, "granularity": "projection", "population": POPULATION}
        merge = {"method": method, "scale_grid": list(run.merge.scale_grid)}
        settings = dataclasses.replace(
            run, merge=parse(MergeConfig, merge, "merge"), search=parse(SearchConfig, search, "search")
        )
        return Evaluator(dataclasses.replace(self.loaded, run=settings))

    @functools.cache  # noqa: B019
    def drawn(self, method: str, fitness: str, seed: int) -> Evaluator:
        """The same on a seed's search and selection splits."""
        tasks = {
            task: {split: found[i] for split, found in self.loaded.examples.items()}
            for i, task in enumerate(self.loaded.tasks)
        }
        n = self.args.examples
        made = redraw(tasks, seed + 1, {"search": n, "selection": n})
        examples: dict[Any, Any] = {
            split: [made[task][split] for task in self.loaded.tasks] for split in self.loaded.examples
        }
        return self.whole(method, fitness).on(examples)

    @functools.cache  # noqa: B019
    def scale(self, method: str, seed: int) -> float:
        """Of the grid, the best for the plain merge on the search split."""
        evaluator = self.drawn(method, "log_likelihood", seed)
        grid = np.asarray(evaluator.loaded.run.merge.scale_grid, np.float32)
        keep = np.repeat(self.projections.all_kept()[None], len(grid), axis=0)
        found = evaluator.fitness_of(evaluator.inputs("search"), evaluator.scoring("search"), keep, grid)
        return float(grid[int(np.nanargmax(found))])

    def wide(self, keep: np.ndarray) -> np.ndarray:
        """Layer masks for every projection."""
        return np.repeat(keep[:, :, None], len(self.projections.projections), axis=2)

    def plain(self, method: str, seed: int, rows: dict[str, Any]) -> Found:
        """Nothing pruned."""
        return Found(self.projections.all_kept()[None], 0, {})

    def random(self, method: str, seed: int, rows: dict[str, Any]) -> Found:
        """As many modules as the paper's search."""
        count = len(rows["paper"]["pruned"]) or self.layers.max_count
        found = controls.random_masks(jax.random.key(seed), self.layers, count, RANDOM)
        return Found(self.wide(found), 0, {"count": count})

    def paper(self, method: str, seed: int, rows: dict[str, Any]) -> Found:
        """CMA-ES as in the paper, with fewer generations."""
        evaluator, spec, scale = self.drawn(method, "accuracy", seed), self.layers, self.scale(method, seed)
        strategy = strategies.build(
            "cma_es", spec.genome_size, POPULATION, 0.5, threshold=spec.threshold, max_count=spec.max_count
        )
        keys = jax.random.split(jax.random.key(seed), 1 + 2 * self.args.generations)
        state = strategy.init(keys[0], jnp.full(spec.genome_size, -1.0))
        inputs, scoring = evaluator.inputs("search"), evaluator.scoring("search")
        best, fittest, decode = spec.all_kept(), -np.inf, jax.vmap(spec.decode)
        for i in range(self.args.generations):
            genomes, state = strategy.ask(keys[1 + 2 * i], state)
            keep = np.asarray(decode(genomes))
            fitness = evaluator.fitness_of(inputs, scoring, self.wide(keep), scale)
            state = strategy.tell(keys[2 + 2 * i], genomes, jnp.asarray(fitness), state)
            if fitness.max() > fittest:
                best, fittest = keep[int(fitness.argmax())], float(fitness.max())
        masks = POPULATION * self.args.generations
        cost = masks * float(evaluator.loaded.sizes("search").sum())
        pruned = np.argwhere(~best).tolist()
        return Found(self.wide(best[None]), cost, {"fitness": fittest, "masks": masks, "pruned": pruned})

    def weights(self, method: str, seed: int, rows: dict[str, Any], column: str = "weights") -> Found:
        """Gradient ascent, stopped early."""
        evaluator = self.drawn(method, fitness := FITNESS[column], seed)
        if (method, fitness) not in self.gradients:
            settings = gradient.Settings(self.args.steps)
            self.gradients[method, fitness] = gradient.make_ascent(evaluator.relaxed_fitness(), settings)
        ascent, scale = self.gradients[method, fitness], self.scale(method, seed)
        present = self.projections.present()
        selection, scoring = evaluator.inputs("selection"), evaluator.scoring("selection")

        def look(weights: np.ndarray) -> float:
            return float(evaluator.fitness_of(selection, scoring, weights[None], scale)[0])

        operands = (
            evaluator.spread(evaluator.inputs("search")),
            evaluator.scoring("search"),
            np.float32(scale),
        )
        state, fold = ascent.init(jax.random.key(seed), present), gradient.Fold(operands, look)
        looks = gradient.run(ascent, [state], present, [fold], [])
        best, sizes = gradient.best(looks), evaluator.loaded.sizes
        cost = STEP_COST * looks[-1].step * sizes("search").sum() + len(looks) * sizes("selection").sum()
        extra = {
            "step": best.step,
            "selection": [x.value for x in looks],
            "fitness": [x.fitness for x in looks],
        }
        return Found(best.weights[None], float(cost), extra)

    def measure(self, method: str, seed: int, column: str, rows: dict[str, Any]) -> dict[str, Any]:
        """One row, the test split read once."""
        start = time.perf_counter()
        kind = column.partition(",")[0]
        more = {"column": column} if kind == "weights" else {}
        found = getattr(self, kind)(method, seed, rows, **more)
        searched, scale = time.perf_counter() - start, self.scale(method, seed)
        evaluator = self.whole(method, "log_likelihood")
        scoring, scales = evaluator.scoring("test"), np.full(len(found.keep), scale, np.float32)
        counts = evaluator.score(evaluator.inputs("test"), np.asarray(found.keep, np.float32), scales)
        tests = np.asarray(scoring.scores(counts)).mean(0)
        return {
            "test": float(np.asarray(scoring.normalised(counts)).mean()), "scale": scale,
            "example_evaluations": found.cost, "scores": tests.tolist(),
            "loss": np.asarray(scoring.loss(counts)).mean(0).tolist(), **found.extra,
            "seconds": searched,
        }  # fmt: skip

    def references(self) -> dict[str, Any]:
        """The base and the experts on the test split."""
        evaluator = self.whole("sum", "log_likelihood")
        scoring = evaluator.scoring("test")
        base = evaluator.score_base("test")
        return {
            "tasks": list(self.loaded.tasks), "examples": self.loaded.sizes("test").tolist(),
            "experts": np.asarray(scoring.reference).tolist(),
            "base": np.asarray(scoring.scores(base)).tolist(),
            "loss": {
                "experts": evaluator.expert_losses("test").tolist(),
                "base": np.asarray(scoring.loss(base)).tolist(),
            },
        }  # fmt: skip


def planned(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows that are asked for."""
    yield {"seed": None, "method": None, "column": "references"}
    for seed in range(args.seeds):
        for method in args.methods:
            for column in args.columns:
                yield {"seed": seed, "method": method, "column": column}


def run(args: argparse.Namespace) -> None:
    """Do what is not done."""
    keys = ("seed", "method", "column")
    named = ("suite", "dtype", "examples", "test", "steps", "generations")
    settings = {name: getattr(args, name) for name in named}
    bench, done = Bench(args), read(args.out) if args.out.exists() else []
    settings["adapters"] = bench.adapters()
    if any(row["settings"] != settings for row in done):
        raise SystemExit(
            f"generative_suite: {args.out} has rows of other settings or adapters: write to another file"
        )
    made = {name: environment()[name] for name in ("date", "commit", "python", "packages")}
    for row in planned(args):
        if any(all(old[k] == row[k] for k in keys) for old in done):
            continue
        own = {o["column"]: o for o in done if (o["seed"], o["method"]) == (row["seed"], row["method"])}
        refers = row["column"] == "references"
        found = (
            bench.references() if refers else bench.measure(row["method"], row["seed"], row["column"], own)
        )
        row |= {"settings": settings, **found, "environment": made}
        done.append(row)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            *(row[k] for k in keys), f"{row.get('test', 0):.4f} ({row.get('seconds', 0):.0f} s)", flush=True
        )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: scores and losses of every task, then columns over seeds."""
    (known,) = (row for row in rows if row["column"] == "references")
    tasks = known["tasks"]
    lines = ["| model | " + " | ".join(tasks) + " | mean normalised |", "|" + "---|" * (len(tasks) + 2)]
    searched = [row for row in rows if row is not known]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in searched:
        groups.setdefault((row["method"], row["column"]), []).append(row)
    experts = np.asarray(known["experts"])
    models = {"experts": experts, "base": np.asarray(known["base"])}
    models |= {f"{m}, {c}": np.mean([r["scores"] for r in found], axis=0) for (m, c), found in groups.items()}
    for name, scores in models.items():
        each = " | ".join(f"{x:.3f}" for x in scores)
        lines.append(f"| {name} | {each} | {(scores / experts).mean():.3f} |")
    lines += [
        "",
        "| merge | column | seeds | test | gain over plain | 95 % | example-evaluations | seconds |",
    ]
    lines += ["|" + "---|" * 8]
    for (method, column), found in groups.items():
        plain = {row["seed"]: row["test"] for row in groups.get((method, "plain"), [])}
        test, n = np.array([row["test"] for row in found]), len(found)
        gain = np.array([row["test"] - plain.get(row["seed"], np.nan) for row in found])
        half = f"{stats.t.ppf(0.975, n - 1) * gain.std(ddof=1) / n**0.5:.3f}" if n > 1 else ""
        cost, seconds = (np.mean([row[name] for row in found]) for name in ("example_evaluations", "seconds"))
        lines.append(
            f"| {method} | {column} | {n} | {test.mean():.3f} | {gain.mean():+.3f} | {half} | "
            f"{cost:,.0f} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--suite", default="llm-small")
    parser.add_argument("--dtype", default="bfloat16", help="of the base; float32 on CPUs that lack bfloat16")
    parser.add_argument("--batch-size", type=int, default=16, help="of evaluation: memory")
    parser.add_argument("--methods", nargs="+", default=["tsv", "ties"])
    columns = ["plain", "weights", "paper", "random", "weights, probability", "weights, no labels"]
    parser.add_argument("--columns", nargs="+", choices=columns, default=columns[:4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=8, help="per task, to search and as many to select")
    parser.add_argument("--test", type=int, default=32, help="examples per task")
    parser.add_argument("--steps", type=int, default=6, help="of the gradient")
    parser.add_argument(
        "--generations", type=int, default=2, help=f"of {POPULATION} masks, of the paper's search"
    )
    args = parser.parse_args()
    if args.table:
        print(table(read(args.table)))
    elif args.out:
        run(args)
    else:
        parser.error("give --out FILE.jsonl or --table FILE.jsonl")


if __name__ == "__main__":
    main()
