"""CLIP (Radford et al., arXiv 2103.00020): vision and text towers, and zero-shot heads made of prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from enmp_jax.errors import UserError
from enmp_jax.models import parameters
from enmp_jax.models.base import Backbone, Inputs, Params
from enmp_jax.models.block import BlockSpec, declare_layers
from enmp_jax.models.layers import Stream, normalise
from enmp_jax.models.names import Spelling
from enmp_jax.models.transformer import transformer
from enmp_jax.models.vit import PatchSpec, embed_patches, patch_spec

# The KnOTS adapters sit on the inner vision model: base_model.model.encoder..., others have vision_model.
VISION_SPELLING = Spelling(
    prefix="vision_model.",
    unprefixed=("visual_projection.weight",),
    ignored=r"text_model\.|text_projection\.|logit_scale$|embeddings\.position_ids$",
)
TEXT_SPELLING = Spelling(
    prefix="text_model.",
    unprefixed=("text_projection.weight", "logit_scale"),
    ignored=r"vision_model\.|visual_projection\.|embeddings\.position_ids$",
)
LAYER = {
    "q": "encoder.layers.{}.self_attn.q_proj",
    "k": "encoder.layers.{}.self_attn.k_proj",
    "v": "encoder.layers.{}.self_attn.v_proj",
    "o": "encoder.layers.{}.self_attn.out_proj",
    "up": "encoder.layers.{}.mlp.fc1",
    "down": "encoder.layers.{}.mlp.fc2",
    "norm1": "encoder.layers.{}.layer_norm1",
    "norm2": "encoder.layers.{}.layer_norm2",
}

_POSITIONS = "embeddings.position_embedding.weight"  # in both towers

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIPImageProcessor, where no preprocessor_config.json says
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipVisionConfig:
    """Vision tower; ``raw`` is a ``clip_vision_model`` config.json."""

    block: BlockSpec
    patch: PatchSpec
    n_layers: int
    projection: int
    raw: Mapping[str, Any] = field(hash=False)


@dataclass(frozen=True)
class ClipTextConfig:
    """Text tower; ``raw`` is a ``clip_text_model`` config.json, or that of the whole CLIP."""

    block: BlockSpec
    n_layers: int
    projection: int
    vocabulary: int
    positions: int
    eos: int
    has_scale: bool
    raw: Mapping[str, Any] = field(hash=False)


def _tower(config: Mapping[str, Any], tower: str) -> dict[str, Any]:
    """The config.json of one tower, from its own or from that of the whole CLIP."""
    if config.get("model_type") != "clip":
        return dict(config)
    inner = {**config.get(f"{tower}_config", {}), "model_type": f"clip_{tower}_model"}
    inner["projection_dim"] = config.get("projection_dim", 512)
    kind = "CLIPVisionModelWithProjection" if tower == "vision" else "CLIPTextModelWithProjection"
    return {**inner, "architectures": [kind]}


def _block(config: Mapping[str, Any], width: int, heads: int, hidden: int, dtype: Any) -> BlockSpec:
    return BlockSpec(
        width=config.get("hidden_size", width),
        heads=config.get("num_attention_heads", heads),
        hidden=config.get("intermediate_size", hidden),
        activation=config.get("hidden_act", "quick_gelu"),
        eps=config.get("layer_norm_eps", 1e-5),
        dtype=jnp.dtype(dtype),
    )


def _pool(params: Params, hidden: Array, inputs: Inputs, eps: float) -> Float[Array, "batch width"]:
    x = normalise(hidden[:, 0].astype(jnp.float32), params["norm"], eps)
    x = x @ params["projection"]["weight"].astype(jnp.float32).T
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def build(config: Mapping[str, Any], dtype: Any = jnp.float32) -> Backbone:
    """The vision tower; features: the projected image embedding, of length 1.

    Raises:
        UserError: sizes that do not fit each other, an unknown activation.
    """
    images = {key: config.get(key, value) for key, value in (("image_mean", MEAN), ("image_std", STD))}
    config = {**_tower(config, "vision"), **images}
    block = _block(config, 768, 12, 3072, dtype)
    projection, n_layers = config.get("projection_dim", 512), config.get("num_hidden_layers", 12)
    c = ClipVisionConfig(block, patch_spec(config, patch_size=32), n_layers, projection, config)

    normal = partial(parameters.normal, std=block.init_std, dtype=block.dtype)
    declared = {
        "embeddings": {
            "cls": normal("embeddings.class_embedding", (block.width,)),
            "positions": normal(_POSITIONS, (c.patch.n_patches + 1, block.width)),
            "patch": {
                "weight": normal("embeddings.patch_embedding.weight", c.patch.weight_shape(block.width))
            },
        },
        "pre_norm": parameters.norm("pre_layrnorm", block.width),
        "layers": declare_layers(block, c.n_layers, LAYER),
        "norm": parameters.norm("post_layernorm", block.width),
        "projection": {"weight": normal("visual_projection.weight", (c.projection, block.width))},
    }

    def embed(params: Params, inputs: Inputs) -> Stream:
        e = params["embeddings"]
        x = embed_patches(c.patch, e["patch"]["weight"], inputs["image"])
        cls = jnp.broadcast_to(e["cls"], (x.shape[0], 1, block.width))
        x = jnp.concatenate([cls, x], axis=1) + e["positions"]
        return Stream(normalise(x, params["pre_norm"], block.eps), token=0)

    return transformer(
        "clip",
        c,
        VISION_SPELLING,
        width=c.projection,
        parameters=declared,
        embed=embed,
        pool=partial(_pool, eps=block.eps),
        input_spec={"image": (c.patch.shape, jnp.uint8)},
    )


def build_text(config: Mapping[str, Any], dtype: Any = jnp.float32) -> Backbone:
    """The text tower; features: the projected embedding at the end-of-text token, of length 1.

    Raises:
        UserError: sizes that do not fit each other, an unknown activation.
    """
    inner = _tower(config, "text")
    block = _block(inner, 512, 8, 2048, dtype)
    c = ClipTextConfig(
        block,
        n_layers=inner.get("num_hidden_layers", 12),
        projection=inner.get("projection_dim", 512),
        vocabulary=inner.get("vocab_size", 49408),
        positions=inner.get("max_position_embeddings", 77),
        eos=inner.get("eos_token_id", 49407),
        has_scale=config.get("model_type") == "clip",
        raw=config,
    )

    normal = partial(parameters.normal, std=block.init_std, dtype=block.dtype)
    tokens = (c.vocabulary, block.width)
    declared = {
        "embeddings": {
            "tokens": normal("embeddings.token_embedding.weight", tokens, axes=("vocab", "embed")),
            "positions": normal(_POSITIONS, (c.positions, block.width)),
        },
        "layers": declare_layers(block, c.n_layers, LAYER),
        "norm": parameters.norm("final_layer_norm", block.width),
        "projection": {"weight": normal("text_projection.weight", (c.projection, block.width))},
    }
    if c.has_scale:
        declared["logit_scale"] = parameters.Param(
            "logit_scale", (), (), jnp.float32, fill=math.log(1 / 0.07)
        )

    def embed(params: Params, inputs: Inputs) -> Stream:
        ids, e = inputs["input_ids"], params["embeddings"]
        length = ids.shape[1]
        # causal, and read at the first end-of-text token: what pads the right is never looked at
        mask = jnp.tril(jnp.ones((1, length, length), bool))
        # configs older than transformers 4.31 have a wrong eos 2; the end of text is the largest id
        token = jnp.argmax(ids if c.eos == 2 else ids == c.eos, axis=1)
        return Stream(e["tokens"][ids] + e["positions"][:length], mask, token=token)

    return transformer(
        "clip_text_model",
        c,
        TEXT_SPELLING,
        width=c.projection,
        parameters=declared,
        embed=embed,
        pool=partial(_pool, eps=block.eps),
        input_spec={"input_ids": ((None,), jnp.int32)},
    )


Tokenizer = Callable[..., Mapping[str, Any]]


def zero_shot_head(
    text: Backbone,
    params: Params,
    class_names: Sequence[str],
    templates: Sequence[str],
    tokenizer: Tokenizer,
    *,
    logit_scale: float | None = None,
    batch_size: int = 64,
) -> Float[np.ndarray, "classes width"]:
    """Head weights from prompts, as CLIP and KnOTS make them (Radford et al., section 3.1.4).

    Per class: the mean over templates of the unit text embeddings, made a unit vector again, times
    the logit scale. On unit image features the head gives CLIP's logits.

    Args:
        text: text tower (``load(path, family="clip_text_model")``).
        params: its parameters.
        class_names: one per class, as they go into the prompts.
        templates: prompts with ``{}`` for the class name.
        tokenizer: a Hugging Face tokenizer.
        logit_scale: multiplies cosines; default: the checkpoint's, ``exp(logit_scale)``.
        batch_size: prompts per forward pass.

    Raises:
        UserError: no classes or templates, a template without ``{}``, a prompt beyond the tower's
            positions, or no logit scale.
    """
    if not class_names or not templates:
        raise UserError("a zero-shot head needs class names and at least one template with {}")
    for template in templates:
        if "{}" not in template:
            raise UserError(f"template {template!r} has no {{}} for the class name")
    if logit_scale is None:
        if "logit_scale" not in params:
            raise UserError("this text tower has no logit_scale; give one, or load it from the whole CLIP")
        logit_scale = float(np.exp(params["logit_scale"]))
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    ids = np.asarray(tokenizer(prompts, padding=True, return_tensors="np")["input_ids"], np.int32)
    limit = text.config.positions
    if ids.shape[1] > limit:
        raise UserError(f"the longest prompt has {ids.shape[1]} tokens; CLIP's text tower takes {limit}")
    # few shapes, so that other class names find the program compiled; more of the last token is more padding
    width = min(-(-ids.shape[1] // 16) * 16, limit)
    ids = np.pad(ids, ((0, -len(ids) % batch_size), (0, width - ids.shape[1])), mode="edge")
    features = jax.jit(text.features)
    batches = jnp.asarray(ids.reshape(-1, batch_size, width))
    embedded = np.concatenate([np.asarray(features(params, {"input_ids": batch})) for batch in batches])
    embedded = embedded[: len(prompts)].reshape(len(class_names), len(templates), -1).mean(axis=1)
    return logit_scale * embedded / np.linalg.norm(embedded, axis=-1, keepdims=True)
