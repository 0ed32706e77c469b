"""Whether an export answers as the merge that it claims, where there is a backbone for its base model."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from enmp_jax import models
from enmp_jax.adapters.checks import Check, Parts
from enmp_jax.deltas import Deltas, Dense, LowRank
from enmp_jax.errors import UserError
from enmp_jax.models.base import Backbone, Inputs, Params
from enmp_jax.module_paths import split_layer

_BATCH, _LENGTH = 2, 16


def check_outputs(
    base: str, wanted: dict[str, Parts], export: dict[str, Parts] | Path, tolerance: float
) -> list[Check]:
    """The features of a few random inputs; nothing for architectures without a backbone here.

    Args:
        base: directory or hub id of the base model.
        wanted: module path -> delta that the export claims.
        export: the deltas that it has, or the directory of a whole model.
        tolerance: relative to what the merge changes in the features.
    """
    try:
        backbone, params = models.load(base)
        inputs = _inputs(backbone)
        plain, claimed = (_features(backbone, params, inputs, d) for d in ({}, wanted))
        if isinstance(export, Path):
            found = _features(backbone, models.load(export)[1], inputs, {})
        else:
            found = _features(backbone, params, inputs, export)
    except UserError as error:
        return [Check("outputs", True, f"not asked: {error}", counts=False)]
    moved = float(np.linalg.norm(claimed - plain))
    error = float(np.linalg.norm(found - claimed)) / moved if moved else float("inf")
    detail = f"off by {error:.1e} of what the merge changes"
    return [Check("outputs", error <= tolerance, detail)]


def _features(backbone: Backbone, params: Params, inputs: Inputs, parts: dict[str, Parts]) -> np.ndarray:
    found = jax.jit(backbone.features)(params, inputs, _stacked(backbone, parts))
    return np.asarray(found, np.float64)


def _stacked(backbone: Backbone, parts: dict[str, Parts]) -> Deltas:
    """Deltas by path as the backbone takes them."""
    by_template: dict[str, dict[int, Parts]] = {}
    for path, delta in parts.items():
        template, layer = split_layer(path)
        name = backbone.canonical(template)
        if name is None or layer is None or name not in backbone.modules:
            raise UserError(f"the base model has no {path}")
        by_template.setdefault(name, {})[layer] = delta
    deltas: Deltas = {}
    for name, layers in by_template.items():
        out, inner = backbone.modules[name]
        if any(len(delta) == 1 for delta in layers.values()):
            weight = np.zeros((backbone.n_layers, out, inner), np.float32)
            for layer, delta in layers.items():
                weight[layer] = delta[0] if len(delta) == 1 else delta[0] @ delta[1]
            deltas[name] = Dense(jnp.asarray(weight))
            continue
        rank = max(delta[0].shape[1] for delta in layers.values())
        left = np.zeros((backbone.n_layers, out, rank), np.float32)
        right = np.zeros((backbone.n_layers, rank, inner), np.float32)
        for layer, delta in layers.items():
            width = delta[0].shape[1]
            left[layer, :, :width], right[layer, :width] = delta
        deltas[name] = LowRank(jnp.asarray(left), jnp.asarray(right), None)
    return deltas


def _inputs(backbone: Backbone) -> Inputs:
    random, made = np.random.default_rng(0), {}
    for name, (shape, dtype) in backbone.input_spec.items():
        size = (_BATCH, *(_LENGTH if n is None else n for n in shape))
        top = 256 if jnp.dtype(dtype) == jnp.uint8 else int(backbone.config.raw.get("vocab_size", 2))
        if name.endswith("mask"):
            made[name] = jnp.ones(size, dtype)
        elif name.startswith("token_type"):
            made[name] = jnp.zeros(size, dtype)
        else:
            made[name] = jnp.asarray(random.integers(0, top, size), dtype)
    return made
