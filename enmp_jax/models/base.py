"""The contract of a backbone: pure functions over a plain parameter pytree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from enmp_jax.models.names import KeyTable

Params = Any  # nested dict of arrays; weights of repeated layers are stacked on axis 0
Inputs = Mapping[str, Array]  # e.g. {"image": uint8 [b, h, w, c]} or {"input_ids": .., "attention_mask": ..}


class Backbone(NamedTuple):
    """A base model without its head.

    Attributes:
        family: key of ``enmp_jax.models.FAMILIES``.
        n_layers: number of repeated layers.
        width: size of the features.
        modules: name template (see ``LoraStack``) -> (out, in) of every weight that takes a delta.
        init: ``init(key) -> params``, random weights.
        features: ``features(params, inputs, deltas=None) -> [batch, width]``, in float32, ready for a
            task head. ``deltas`` maps templates of ``modules`` to ``LowRank`` or ``Dense`` with a
            leading layer axis; templates left out get no delta.
        canonical: maps a module template found in an adapter file (any known spelling or prefix) to
            the key of ``modules`` it means, or None.
        input_spec: shape and dtype of one example of each input (no batch axis); None = any length.
        config: the family's own configuration (a frozen dataclass with the Hugging Face
            ``config.json`` in ``raw``).
        keys: the family's key table, for reading and writing checkpoints.
        hidden_states: ``hidden_states(params, inputs, deltas=None) -> [layer + 1, batch, token, width]``,
            the embeddings and what each layer makes of them.
        log_likelihood: causal models only. ``log_likelihood(params, inputs, deltas=None) -> [batch, token]``
            in float32: log probability of token t + 1 given the tokens up to t, 0 where that is padding
            (and in the last column).
    """

    family: str
    n_layers: int
    width: int
    modules: Mapping[str, tuple[int, int]]
    init: Callable[[jax.Array], Params]
    features: Callable[..., Float[Array, "batch width"]]
    canonical: Callable[[str], str | None]
    input_spec: Mapping[str, tuple[tuple[int | None, ...], Any]]
    config: Any
    keys: KeyTable
    hidden_states: Callable[..., Float[Array, "states batch token width"]]
    log_likelihood: Callable[..., Float[Array, "batch token"]] | None = None
