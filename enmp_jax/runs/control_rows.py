"""The rows of ``enmp controls``: what a found mask must be compared with, each scored once on the test split.

A row gives the scores of every example of the test split under one model, or under several that differ in
their seed alone. Nothing is chosen on the test split: what a control has to choose, it chooses on the
search split, as the search does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from enmp_jax import merges
from enmp_jax.config.sections import RefineConfig, SearchConfig
from enmp_jax.deltas import Deltas
from enmp_jax.devices.mesh import replicate
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.fitness import get as fitness_kind
from enmp_jax.evaluation.loaded_run import Split
from enmp_jax.runs.control_bench import Bench, Scored
from enmp_jax.runs.evolve import make_strategy
from enmp_jax.runs.finalists import Finalist
from enmp_jax.runs.refine import merged_deltas
from enmp_jax.runs.search import choose_scale
from enmp_jax.runs.subsearch import search_and_select
from enmp_jax.runs.tuning import candidates, tune
from enmp_jax.search import controls, geometry
from enmp_jax.training.refine import refine

TRANSFER = ("sum", "ties", "tsv", "iso")
"""Methods that a found mask is tried with, in the run's own space."""

Make = Callable[[Bench], Scored]


class Kind(NamedTuple):
    """A kind of control.

    Attributes:
        rows: the rows that it has for a bench, by name.
        splits: what they look at.
        settings: attributes of the bench that its rows depend on.
    """

    rows: Callable[[Bench], dict[str, Make]]
    splits: tuple[Split, ...] = ("search", "test")
    settings: tuple[str, ...] = ()


def _random(bench: Bench) -> Scored:
    keep = controls.random_masks(
        jax.random.key(0), bench.evaluator.loaded.mask_spec, bench.count, bench.masks
    )
    return bench.score(keep, pruned=bench.count)


def _shuffled(bench: Bench) -> Scored:
    spec = bench.evaluator.loaded.mask_spec
    return bench.score(controls.shuffled(jax.random.key(1), spec, bench.found.keep, bench.masks))


def _leave_one_out(bench: Bench) -> Scored:
    evaluator, spec = bench.evaluator, bench.evaluator.loaded.mask_spec

    def score(keep: np.ndarray) -> np.ndarray:
        counts = evaluator.score_from(bench.inputs, spec.all_kept(), keep, bench.found.scale)
        return evaluator.fitness_from(bench.scoring, counts)

    effects = controls.leave_one_out(score, spec)[0]
    keep = controls.prune_largest(effects, spec, bench.count)
    found = {"fitness": evaluator.kind.name, "effects": spec.named(effects)}
    return bench.score(keep[None], pruned=spec.n_pruned(keep), masks=spec.n_modules + 1, **found)


def _first_order(bench: Bench) -> Scored:
    spec, (effects, kind) = bench.evaluator.loaded.mask_spec, bench.first_order
    keep = controls.prune_largest(effects, spec, bench.count)
    return bench.score(keep[None], pruned=spec.n_pruned(keep), fitness=kind, effects=spec.named(effects))


def _greedy(bench: Bench) -> Scored:
    """With as many masks as one seed of the search paid for, the likeliest first."""
    spec, width = bench.evaluator.loaded.mask_spec, bench.evaluator.loaded.run.search.population
    found = controls.greedy_removal(bench.fitness, spec, bench.masks_paid, width, bench.first_order[0])
    return bench.score(found.keep[None], pruned=spec.n_pruned(found.keep), masks=found.evaluations)


def _one_shot(values: Callable[[Any, Any], np.ndarray], low: str, high: str) -> Make:
    """Prune those of the lowest or of the highest values, whichever the search split likes better."""

    def make(bench: Bench) -> Scored:
        spec, stack = bench.evaluator.loaded.mask_spec, bench.evaluator.loaded.stack
        slots = np.asarray(spec.slots, int)
        order = slots[np.argsort(values(stack, spec).reshape(-1)[slots], kind="stable")]
        keep = np.ones((2, np.prod(spec.shape)), bool)
        keep[0, order[: bench.count]] = False
        keep[1, order[len(order) - bench.count :]] = False
        keep = keep.reshape(2, *spec.shape)
        best = int(np.argmax(bench.fitness(keep)))
        return bench.score(keep[best][None], pruned=bench.count, note=(low, high)[best])

    return make


def _transfers(bench: Bench) -> dict[str, Make]:
    run = bench.evaluator.loaded.run
    space = run.merge.space
    others = [m for m in TRANSFER if m != run.merge.method and (m, space) not in merges.REFUSED]
    return {f"transfer to {method}": functools.partial(_transfer, method=method) for method in others}


def _transfer(bench: Bench, method: str) -> Scored:
    """The found mask with another method, against that method's own plain merge, both at its best scale."""
    run = bench.evaluator.loaded.run
    tuned = tune(bench.evaluator, bench.inputs, candidates(run, method, run.merge.space))
    keep = np.stack([bench.plain, bench.found.keep])
    evaluator = tuned.evaluator
    examples = bench.test.of_masks(keep, tuned.scale, evaluator.merge, evaluator.ingredients)
    chosen = {"scale": tuned.scale, **evaluator.loaded.run.merge.hyperparameters}
    note = ", ".join(f"{name} {value:g}" for name, value in chosen.items() if isinstance(value, int | float))
    return Scored(
        examples[1:], examples[0], {"note": note, "plain": float(bench.test.sample.mean(examples[0]))}
    )


def _joint_loras(bench: Bench) -> dict[str, Make]:
    """With the experts' answers as targets and, where there are labels, with those (cross-entropy)."""
    loaded = bench.evaluator.loaded
    own = (loaded.run.search.refine or RefineConfig()).fitness
    kinds = [own if fitness_kind(own).needs_expert else "expert_kl"]
    if loaded.labelled("search") and loaded.labelled("selection"):
        kinds.append("log_likelihood")
    return {
        f"joint LoRA from {start}, {'labels' if kind == 'log_likelihood' else 'experts'}": functools.partial(
            _joint_lora, start=start, kind=kind
        )
        for start in ("base", "merge")
        for kind in kinds
    }


def _joint_lora(bench: Bench, start: str, kind: str) -> Scored:
    run = bench.evaluator.loaded.run
    config = dataclasses.replace(run.search.refine or RefineConfig(), fitness=kind)
    search = dataclasses.replace(run.search, fitness=kind)
    evaluator = bench.evaluator.under(dataclasses.replace(run, search=search))
    deltas: Deltas = {}
    if start == "merge":
        deltas = merged_deltas(bench.evaluator, Finalist(0, bench.plain, bench.plain_scale, None))
    trained = [refine(evaluator, deltas, config, seed) for seed in range(bench.seeds)]
    examples = np.stack([bench.test.of_deltas(one.deltas) for one in trained])
    steps = ", ".join(str(one.step) for one in trained)
    return Scored(
        examples, details={"fitness": kind, "rank": config.rank, "note": f"{steps} steps of {config.steps}"}
    )


def _random_adapters(bench: Bench) -> Scored:
    """Adapters of the same norms that learnt nothing, merged at their best scale."""
    evaluator, examples, scales = bench.evaluator, [], []
    for seed in range(bench.seeds):
        ingredients = evaluator.merge.prepare(geometry.random_like(evaluator.loaded.stack, seed))
        inputs = bench.inputs._replace(ingredients=replicate(ingredients, evaluator.mesh))
        scale = choose_scale(evaluator, inputs, bench.scoring)[0]
        examples.append(bench.test.of_masks(bench.plain[None], scale, ingredients=ingredients)[0])
        scales.append(scale)
    return Scored(np.stack(examples), details={"note": f"scale {', '.join(f'{s:g}' for s in scales)}"})


def _sensitivity(bench: Bench) -> dict[str, Make]:
    search = bench.evaluator.loaded.run.search
    names = ["learning_rate"] if search.strategy == "gradient" else ["population", "max_pruned"]
    held: dict[str, Any] = {}
    if search.strategy in ("cma_es", "sep_cma_es", "snes"):
        names.append("sigma0")
        # an automatic start moves along with sigma0, and the search would be the same
        held = {"x0": float(make_strategy(bench.evaluator, bench.plain_scale)[1][0])}
    variants: list[tuple[str, dict[str, Any], float]] = [("as set", {}, 1.0)]
    for name in names:
        for factor in (0.5, 2):
            value = getattr(search, name) * factor
            if name == "population":
                value = max(2, round(value))
            elif name == "max_pruned":
                value = min(value, 1.0)
            changes = {name: value} | (held if name == "sigma0" else {})
            variants.append((f"{name} {value:g}", changes, 1.0))
    variants += [(f"{share:.0%} of the search examples", {}, share) for share in (0.5, 0.25)]
    return {
        f"sensitivity, {name}": functools.partial(_search, name=name, changes=changes, share=share)
        for name, changes, share in variants
    }


def _search(bench: Bench, name: str, changes: Mapping[str, Any], share: float) -> Scored:
    """The run's search again with a setting changed, every seed with its own winner."""
    loaded = bench.evaluator.loaded
    search: SearchConfig = dataclasses.replace(
        loaded.run.search, seeds=bench.seeds, refine=None,
        generations=bench.generations or loaded.run.search.generations, **changes,
    )  # fmt: skip
    evaluator = bench.evaluator.under(dataclasses.replace(loaded.run, search=search))
    if share < 1:
        random = np.random.default_rng(0)
        fewer = [
            e.take(np.sort(random.permutation(len(e.labels))[: max(1, round(share * len(e.labels)))]))
            for e in loaded.examples["search"]
        ]
        examples = {**loaded.examples, "search": fewer}
        evaluator = Evaluator(dataclasses.replace(evaluator.loaded, examples=examples))
    folder, inputs = bench.folder / name.replace(" ", "-"), evaluator.inputs("search")
    winners = search_and_select(evaluator, folder, bench.reporter, inputs, bench.plain_scale).values()
    scales = np.asarray([winner.scale for winner in winners], np.float32)
    examples = bench.test.of_masks(np.stack([winner.keep for winner in winners]), scales)
    return Scored(examples, details={"pruned": [winner.pruned for winner in winners]})


def _one(name: str, make: Make) -> Callable[[Bench], dict[str, Make]]:
    return lambda bench: {name: make}


def _if_weighted(bench: Bench) -> dict[str, Make]:
    """Of a mask, shuffling is drawing a random one."""
    return {"shuffled weights": _shuffled} if bench.found.keep.dtype != bool else {}


KINDS: dict[str, Kind] = {
    "random": Kind(_one("random masks", _random), ("test",), ("masks",)),
    "shuffled": Kind(_if_weighted, ("test",), ("masks",)),
    "leave_one_out": Kind(_one("leave one out", _leave_one_out)),
    "first_order": Kind(_one("first order", _first_order)),
    "greedy": Kind(_one("greedy", _greedy)),
    "norm": Kind(_one("by norm", _one_shot(geometry.norms, "the smallest", "the largest"))),
    "cosine": Kind(_one("by cosine", _one_shot(geometry.cosines, "the least alike", "the most alike"))),
    "transfer": Kind(_transfers),
    "random_adapters": Kind(_one("random adapters", _random_adapters), settings=("seeds",)),
    "joint_lora": Kind(_joint_loras, ("search", "selection", "test"), ("seeds",)),
    "sensitivity": Kind(_sensitivity, ("search", "selection", "test"), ("seeds", "generations")),
}
"""By the names that ``--rows`` takes. A module is pruned, or weighted, at the found scale."""
