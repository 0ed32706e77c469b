"""The contract of a backbone: pure functions over a plain parameter pytree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from enmp_jax.models.layers import KeyValues, Stream
from enmp_jax.models.names import Spelling
from enmp_jax.models.parameters import Declared

Params = Any  # nested dict of arrays; weights of repeated layers are stacked on axis 0
Inputs = Mapping[str, Array]  # e.g. {"image": uint8 [b, h, w, c]} or {"input_ids": .., "attention_mask": ..}


class Backbone(NamedTuple):
    """A base model without its head.

    ``features`` is ``pool(params, run(params, embed(params, inputs), deltas), inputs)``. In all functions
    ``deltas`` maps templates of ``modules`` to ``LowRank`` or ``Dense`` with a leading layer axis;
    templates left out get no delta.

    The functions ``.._from(params, inputs, hidden, first, deltas=None)`` start from ``hidden`` [batch,
    token, width], the states that enter layer ``first`` (``hidden_states(..)[first]``), instead of the
    embeddings: two models whose layers before ``first`` are the same share that part of the work.
    ``first`` is 0 to ``n_layers``. An array works too, so that one compiled program serves every value;
    such a program has no reverse-mode derivative. Under ``jax.vmap``, give all members the same
    ``first``: a mapped one would copy the layer's weights for each member.

    Attributes:
        family: key of ``enmp_jax.models.FAMILIES``.
        n_layers: number of repeated layers.
        width: size of the features.
        modules: name template (see ``LoraStack``) -> (out, in) of every weight that takes a delta.
        parameters: the declaration of every parameter.
        init: ``init(key) -> params``, random weights.
        embed: ``embed(params, inputs) -> Stream``, what enters the first layer.
        run: ``run(params, stream, deltas=None, first=0) -> [batch, token, width]``, the stream after the
            layers from ``first`` on; only of the tokens that are needed, if the stream names them.
        pool: ``pool(params, hidden, inputs) -> [batch, width]``, the features of what ``run`` returns.
        features: ``features(params, inputs, deltas=None) -> [batch, width]``, in float32, ready for a
            task head.
        features_from: the same from hidden states.
        hidden_states: ``hidden_states(params, inputs, deltas=None) -> [layer + 1, batch, token, width]``,
            the embeddings and what each layer makes of them.
        canonical: maps a module template found in an adapter file (any known spelling or prefix) to
            the key of ``modules`` it means, or None.
        input_spec: shape and dtype of one example of each input (no batch axis); None = any length.
        config: the family's own configuration (a frozen dataclass with the Hugging Face
            ``config.json`` in ``raw``).
        spelling: of the family's parameters in files.
        logits: causal models only. ``logits(params, hidden [.., width]) -> [.., vocabulary]``: of the next
            token, in float32, from what ``run`` returns. ``causal`` calls it where answers are.
        extend: causal models only. ``extend(params, inputs, cache, slot, deltas=None) -> (hidden, cache)``:
            last hidden states of tokens that attend to a cache of keys and values, and the cache with
            theirs from ``slot`` on; ``inputs`` with ``key_position`` (see ``causal``).
        log_likelihood: causal models only. ``log_likelihood(params, inputs, deltas=None) -> [batch, token]``
            in float32: log probability of token t + 1 given the tokens up to t, 0 where that is padding
            (and in the last column).
        log_likelihood_from: the same from hidden states.
    """

    family: str
    n_layers: int
    width: int
    modules: Mapping[str, tuple[int, int]]
    parameters: Declared
    init: Callable[[jax.Array], Params]
    embed: Callable[[Params, Inputs], Stream]
    run: Callable[..., Float[Array, "batch token width"]]
    pool: Callable[[Params, Array, Inputs], Float[Array, "batch width"]]
    features: Callable[..., Float[Array, "batch width"]]
    features_from: Callable[..., Float[Array, "batch width"]]
    hidden_states: Callable[..., Float[Array, "states batch token width"]]
    canonical: Callable[[str], str | None]
    input_spec: Mapping[str, tuple[tuple[int | None, ...], Any]]
    config: Any
    spelling: Spelling
    logits: Callable[[Params, Array], Float[Array, "*token vocabulary"]] | None = None
    extend: Callable[..., tuple[Float[Array, "batch token width"], KeyValues]] | None = None
    log_likelihood: Callable[..., Float[Array, "batch token"]] | None = None
    log_likelihood_from: Callable[..., Float[Array, "batch token"]] | None = None
