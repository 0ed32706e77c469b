"""The columns of benchmarks/evidence.py, the merge methods they are run under, and the sets they form."""

from __future__ import annotations

from evidence_suite import Setting

from enmp_jax.evaluation.fitness import FITNESS
from enmp_jax.search import strategies

METHODS: dict[str, list[Setting]] = {  # every entry: settings among which the search split chooses
    "sum": [{"method": "sum"}],
    "ties": [{"method": "ties", "density": d} for d in (0.1, 0.2, 0.4, 0.8)],
    "dare-ties": [
        {"method": "dare_ties", "drop_rate": p, "density": d} for p in (0.3, 0.7) for d in (0.2, 0.6)
    ],
    "tsv": [{"method": "tsv"}],
    "iso": [{"method": "iso"}],
    "knots-ties": [{"method": "ties", "space": "knots", "density": d} for d in (0.1, 0.2, 0.4, 0.8)],
    "core-tsv-iso": [{"method": "tsv", "space": "core", "isotropize": True}],
    "cart": [
        {"method": "cart", "rank_fraction": f, "coefficient": c} for f in (0.08, 0.32) for c in (0.3, 1.0)
    ],
}  # fmt: skip

PASSES = 960  # of the paper's setting, 16 x 60 masks
TENTH = PASSES // 10
PLAIN = {"kind": "plain", "fitness": "margin"}
BINARY = {
    "kind": "masks", "fitness": "margin", "strategy": "greedy", "population": 8, "start": "leave_one_out",
    "passes": TENTH,
}  # fmt: skip
PAPER = {
    "kind": "masks", "fitness": "accuracy", "strategy": "cma_es", "population": 16, "x0": -1.0, "sigma0": 0.5,
    "generations": 60,
}  # fmt: skip
WEIGHTS = {"kind": "weights", "fitness": "margin", "learning_rate": 0.08, "passes": TENTH}
# twelve steps of both halves and five looks are a tenth of the paper's budget
CROSS_FIT = WEIGHTS | {"cross_fit": True, "learning_rate": 0.12, "check_every": 3}
ADAMERGING = WEIGHTS | {"fitness": "entropy"}  # layer-wise there is by weight matrix: our projections
NO_LABELS = {"fitness": "expert_margin"}

COLUMNS: dict[str, Setting] = {
    "plain": PLAIN,
    "plain, no labels": PLAIN | NO_LABELS,
    "paper": PAPER,
    "paper, margin": PAPER | {"fitness": "margin"},
    "ours, binary": BINARY,
    "ours, binary, no labels": BINARY | NO_LABELS,
    "random": {"kind": "random", "fitness": "margin", "masks": 20, "like": "ours, binary"},
    "greedy": {"kind": "greedy", "fitness": "margin", "width": 8, "passes": TENTH},
    "first-order": {"kind": "one-shot", "fitness": "margin"},
    "ours, continuous": WEIGHTS,
    "ours, continuous, no labels": WEIGHTS | NO_LABELS,
    "ours, cross-fit": CROSS_FIT,
    "ours, cross-fit, no labels": CROSS_FIT | NO_LABELS,
    # learning rate and start as published (0.3 each), but full batches, and the budget of the other columns
    "AdaMerging": ADAMERGING | {"learning_rate": 1e-3, "scale": 0.3},
    # learning rate of our own searches, from the tuned plain merge
    "AdaMerging, tuned": ADAMERGING,
    "Expert Merging": WEIGHTS | {"fitness": "expert_hidden"},
    "AdaRank-like": WEIGHTS
    | {"kind": "components", "fitness": "entropy", "learning_rate": 0.02, "scale": 0.3},
    "refined": {"kind": "refined", "fitness": "probability", "from": "ours, continuous"},
    "refined, no labels": {"kind": "refined", "fitness": "expert_kl", "from": "ours, continuous, no labels"},
    "refined from cross-fit, no labels": {
        "kind": "refined",
        "fitness": "expert_kl",
        "from": "ours, cross-fit, no labels",
    },
    "refined, cross-fit": {
        "kind": "refined",
        "fitness": "probability",
        "from": "ours, continuous",
        "cross_fit": True,
    },
    "refined, cross-fit, no labels": {
        "kind": "refined",
        "fitness": "expert_kl",
        "from": "ours, continuous, no labels",
        "cross_fit": True,
    },
    "refined, 400 steps, no labels": {
        "kind": "refined",
        "fitness": "expert_kl",
        "from": "ours, continuous, no labels",
        "steps": 400,
    },
    "joint LoRA": {"kind": "joint", "fitness": "probability"},
    "joint LoRA, no labels": {"kind": "joint", "fitness": "expert_kl"},
    "joint LoRA, cross-fit, no labels": {"kind": "joint", "fitness": "expert_kl", "cross_fit": True},
    "joint LoRA, 400 steps, no labels": {"kind": "joint", "fitness": "expert_kl", "steps": 400},
}


def _more() -> dict[str, Setting]:
    """Columns of the figures: strategies at five tenths of the paper's budget, and fitness kinds."""
    warm = {"greedy", "swap", "snes", "sep_cma_es", "bit_flip"}
    found = {
        f"strategy {name}": BINARY | {
            "strategy": name, "passes": 5 * TENTH, "start": "first_order" if name in warm else "none",
            "curve": True,
        }
        for name in strategies.STRATEGIES
    } | {"strategy gradient": WEIGHTS | {"passes": 5 * TENTH, "curve": True}}  # fmt: skip
    for name, kind in FITNESS.items():
        if name == "calibrated" or kind.hidden:
            continue  # the one has no value per example, the other is the column Expert Merging
        found[f"masks by {name}"] = BINARY | {"fitness": name} | (
            {} if kind.has_gradient else {"start": "none"}
        )  # fmt: skip
        if kind.has_gradient and not kind.hidden:
            found[f"weights by {name}"] = WEIGHTS | {"fitness": name}
    return found


COLUMNS |= _more()
RUNGS = {
    "plain": "plain", "ours, binary": "pruned", "ours, continuous": "weighted",
    "ours, cross-fit": "weighted, cross-fitted", "refined": "refined",
    "refined, cross-fit": "refined, cross-fitted",
    "joint LoRA": "joint LoRA from the base",
}  # fmt: skip
"""What one may do with examples, by columns, and what figures call it."""
SETS = {
    "main": [name for name in COLUMNS if not name.startswith(("strategy ", "masks by ", "weights by "))],
    "strategies": [name for name in COLUMNS if name.startswith("strategy ")],
    "fitness": [name for name in COLUMNS if name.startswith(("masks by ", "weights by "))],
    "rungs": [f"{rung}{labels}" for labels in ("", ", no labels") for rung in RUNGS],
}  # fmt: skip
NO_METHOD = ("joint", "components")
"""Kinds of columns that no merge method changes; one row a seed, whose method is ``-``."""
