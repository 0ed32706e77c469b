"""Adapters that are low-rank deltas only together with their base model, folded with its weights.

- DoRA (Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024): the weight of output o becomes
  ``m_o (W + s B A)_o / |(W + s B A)_o|``. What that adds to W has any rank, so its factors are as large as W.
- PiSSA (Meng et al., NeurIPS 2024) and OLoRA (Buyukakyuz, arXiv 2406.01775) start from ``A_0, B_0`` taken
  from W by SVD or QR, and subtract ``s B_0 A_0`` from W: against W itself the adapter is
  ``s (B A - B_0 A_0)``, of twice the rank.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from enmp_jax.adapters.base_names import BaseWeights
from enmp_jax.adapters.lora_config import LoraSettings
from enmp_jax.adapters.lora_encoding import Factors
from enmp_jax.adapters.peft_files import Modules
from enmp_jax.adapters.peft_weights import Weights
from enmp_jax.errors import UserError, one_line

_KINDS = ("transposed", "convolution")  # of layers that are not linear; PiSSA and OLoRA know the first


def fold_base(weights: Weights, settings: LoraSettings, base: str | Path | None, where: str) -> Modules:
    """Modules as plain factors against the base model itself.

    Args:
        weights: of the adapter's file.
        settings: of the adapter.
        base: directory or hub id of the base model; None: there is none.
        where: what error messages start with.

    Raises:
        UserError: no base, a base without the adapted modules, or layers that PEFT does not adapt so.
    """
    kind = "DoRA" if settings.dora else {"pissa": "PiSSA", "olora": "OLoRA"}.get(settings.init or "", "")
    if weights.magnitudes and not settings.dora:
        raise UserError(f"{where}: the file has DoRA's magnitudes, but use_dora is not set")
    if settings.dora and settings.init:
        raise UserError(f"{where}: DoRA that starts from {settings.init} cannot be merged")
    if base is None:
        changes = "rescales the base model's weights" if settings.dora else "changes the base model's weights"
        raise UserError(
            f"{where}: {kind} {changes}, so its deltas are known only with them: give the base model too "
            "(--base-model DIR)"
        )
    found: Modules = {}
    reader = BaseWeights(base)
    held = reader.find(weights.modules, weights.stored)
    for path, factors in weights.modules.items():
        name, kept = f"{where}: {one_line(path)}", weights.stored.get(path)
        if kept is not None and kept.kind not in _KINDS[: 1 + settings.dora]:
            raise UserError(f"{name}: {kind} on a layer of the kind {kept.kind} cannot be merged")
        weight = reader.matrix(held[path], kept, (factors[1].shape[0], factors[0].shape[1]))
        if not settings.dora:
            found[path] = _against_base(weight, factors, settings, path)
            continue
        magnitude = weights.magnitudes.get(path)
        if magnitude is None or magnitude.shape != weight.shape[:1]:
            raise UserError(f"{name} has no magnitudes of DoRA, or not one for each output")
        found[path] = _rescaled(weight, factors, magnitude)
    return found


def _rescaled(weight: np.ndarray, factors: Factors, magnitude: np.ndarray) -> Factors:
    a, b = (x.astype(np.float64) for x in factors)
    adapted = weight + b @ a
    norm = np.linalg.norm(adapted, axis=1)
    factor = np.divide(magnitude.astype(np.float64), norm, out=np.zeros_like(norm), where=norm > 0)
    delta = (factor[:, None] * adapted - weight).astype(np.float32)
    out, inner = delta.shape
    return (
        (np.eye(inner, dtype=np.float32), delta) if inner <= out else (delta, np.eye(out, dtype=np.float32))
    )


def _against_base(weight: np.ndarray, factors: Factors, settings: LoraSettings, path: str) -> Factors:
    a, b = (x.astype(np.float32) for x in factors)
    rank = len(a)
    if settings.init == "pissa":
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
        start_a, start_b = vt[:rank], u[:, :rank] * s[:rank]  # the scaling cancels
    else:
        # PEFT decomposes the tensor as it is kept; it refuses transposed ones by their shapes
        q, r = np.linalg.qr(weight)
        start_a, start_b = r[:rank], settings.scaling(path) * q[:, :rank]
    return (
        np.concatenate([a, start_a.astype(np.float32)]),
        np.concatenate([b, -start_b.astype(np.float32)], axis=1),
    )
