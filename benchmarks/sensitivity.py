"""How much a search depends on its settings: prune ratio, population, sigma, learning rate, budget.

    TFDS_DATA_DIR=DIR OPENBLAS_NUM_THREADS=1 python benchmarks/sensitivity.py demo --out FILE.jsonl
        [--methods tsv ties] [--seeds 3] [--examples 100] [--test 400] [--columns NAME ...]
    python benchmarks/sensitivity.py --table FILE.jsonl

Rows, seeds, resuming and costs are those of benchmarks/evidence.py. Every row changes one setting of the
column ``ours, binary`` or ``ours, continuous``, or sigma of CMA-ES at the same budget.
"""

from __future__ import annotations

import evidence
from evidence_columns import BINARY, COLUMNS, PAPER, PLAIN, SETS, TENTH, WEIGHTS

VARIED = {
    "plain": PLAIN,
    **{f"prune ratio {r}": BINARY | {"max_pruned": r} for r in (0.05, 0.1, 0.2, 0.4, 0.6)},
    **{f"population {p}": BINARY | {"population": p} for p in (4, 8, 16, 32)},
    **{
        f"CMA-ES sigma {s}": {
            **PAPER,
            "fitness": "margin",
            "x0": -0.64,  # with sigma 0.5 a tenth is pruned at first
            "sigma0": s,
            "generations": TENTH // 16,
        }
        for s in (0.25, 0.5, 1.0, 2.0)
    },
    **{f"learning rate {r}": WEIGHTS | {"learning_rate": r} for r in (0.01, 0.02, 0.04, 0.08, 0.16)},
    **{f"budget {p}": WEIGHTS | {"passes": p} for p in (TENTH // 4, TENTH // 2, TENTH, 2 * TENTH)},
}

if __name__ == "__main__":
    COLUMNS |= VARIED
    SETS["sensitivity"] = list(VARIED)
    evidence.main(__doc__, "sensitivity")
