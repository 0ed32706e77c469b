"""``enmp inspect --larv``: how adapters' layers stand to their base, and factors for ``layer_scaling``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from enmp_jax.adapters.base_names import BaseWeights
from enmp_jax.adapters.peft_import import load_adapters
from enmp_jax.errors import UserError, one_line
from enmp_jax.merges import larv


class LayerScores(NamedTuple):
    """One number a layer each; see ``merges.larv``."""

    contrast: list[float]
    conflict: list[float]
    score: list[float]
    layer_scaling: list[float]


def layer_scores(sources: Mapping[str, str], base: str, tiers: Sequence[float]) -> LayerScores:
    """LARV's scores of the layers of adapters, averaged over modules and tasks.

    Args:
        sources: task -> adapter.
        base: directory or hub id of the base model; its weights are read one at a time.
        tiers: factors, of the layers with the lowest scores first.

    Raises:
        UserError: bad adapters, another base, several stacks of layers, experts of a mixture, or a layer
            without a delta.
    """
    loaded = load_adapters(sources, base=base)
    stack, stored = loaded.stack, loaded.stored
    if any(isinstance(group, str) for group in stack.groups or ()):
        raise UserError("--larv needs one stack of numbered layers, and these adapters have others beside it")
    if experts := next((path for path, kept in stored.items() if kept.kind == "experts"), None):
        raise UserError(f"--larv: {one_line(experts)} is an expert of a mixture, which is not supported")
    weights = BaseWeights(base)
    where = weights.find([path for paths in loaded.names.values() for path in paths], stored)
    found: list[list[larv.Alignment]] = [[] for _ in range(stack.n_layers)]
    for name, pair in stack.pairs.items():
        a, b = np.asarray(pair.a), np.asarray(pair.b)
        living = np.any(a, axis=(2, 3)) & np.any(b, axis=(2, 3))
        for i, (row, path) in enumerate(zip(stack.rows(name), loaded.names[name], strict=True)):
            if living[i].any():
                weight = weights.matrix(where[path], stored.get(path), pair.shape)
                found[row].append(larv.alignment(weight, a[i, living[i]], b[i, living[i]]))
    if empty := [row for row, own in enumerate(found) if not own]:
        raise UserError(f"--larv compares all layers, and no adapter changes layer {empty[0]}")
    contrast, conflict = (
        np.asarray([np.concatenate([one[k] for one in own]).mean(dtype=np.float64) for own in found])
        for k in (0, 1)
    )
    score = larv.scores(contrast, conflict)
    return LayerScores(contrast.tolist(), conflict.tolist(), score.tolist(), larv.tiered(score, tiers))
