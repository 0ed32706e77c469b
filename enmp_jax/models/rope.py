"""Rotary position embedding (RoPE, arXiv 2104.09864): the angles that a config.json asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from enmp_jax.errors import UserError

KINDS = ("default", "linear", "llama3", "longrope")


@dataclass(frozen=True)
class Rope:
    """Angles of one kind of layer.

    ``frequencies``: angle per position of each pair of dimensions; dimensions without one are not rotated.
    ``scale``: of cosines and sines. ``limit``: the longest text these angles hold for; None: any.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    limit: int | None = None


def rope(config: Mapping[str, Any], head_dim: int, settings: Mapping[str, Any] | None = None) -> Rope:
    """The angles of a model, with the scaling of Llama 3 (``llama3``) or LongRoPE (arXiv 2402.13753).

    LongRoPE has other angles for texts longer than the model was first trained on; those are not supported.

    Args:
        config: config.json; ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (4).
        head_dim: size of a head.
        settings: what stands for ``rope_parameters``, where a model has several.

    Raises:
        UserError: a kind of scaling that is not known, or settings that do not fit.
    """
    given = settings or config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = given.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = given.get("rope_type", given.get("type", "default"))
    kind = "longrope" if kind in ("su", "yarn") and "short_factor" in given else kind
    if kind not in KINDS:
        raise UserError(f"config.json: rope type {kind!r} is not supported, only {', '.join(KINDS)}")
    part = given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    rotated = int(head_dim * part)
    # as float32, step for step as transformers does, so that angles at position 8000 agree too
    exponent = np.arange(0, rotated, 2).astype(np.float32) / np.float32(rotated)
    wavelengths = np.power(np.float32(theta), exponent)
    if kind == "longrope":
        return _longrope(config, given, wavelengths)
    frequencies = (np.float32(1) / wavelengths).astype(np.float32)
    if kind == "linear":
        frequencies = frequencies / np.float32(given["factor"])
    elif kind == "llama3":
        original = given["original_max_position_embeddings"]
        low, high, factor = given["low_freq_factor"], given["high_freq_factor"], given["factor"]
        wavelength = 2 * math.pi / frequencies
        smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
        frequencies = (1 - smooth) * frequencies / factor + smooth * frequencies
    return Rope(tuple(float(f) for f in frequencies))


def _longrope(config: Mapping[str, Any], given: Mapping[str, Any], wavelengths: np.ndarray) -> Rope:
    short = np.asarray(given["short_factor"], np.float32)
    if short.shape != wavelengths.shape:
        raise UserError(
            f"config.json: short_factor has {len(short)} numbers, but {len(wavelengths)} pairs of dimensions "
            "are rotated"
        )
    longest = config.get("max_position_embeddings", 4096)
    original = given.get("original_max_position_embeddings") or config.get(
        "original_max_position_embeddings", longest
    )
    factor = given.get("factor") or longest / original
    scale = given.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    frequencies = np.float32(1) / (short * wavelengths)
    return Rope(tuple(float(f) for f in frequencies), float(scale), original)
