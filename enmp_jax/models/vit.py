"""ViT (Dosovitskiy et al., arXiv 2010.11929) as in Hugging Face's ViTForImageClassification."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from enmp_jax.devices.matmul import times_transposed
from enmp_jax.errors import UserError
from enmp_jax.models.base import Backbone, Inputs, Params
from enmp_jax.models.layers import BlockSpec, init_layers, init_norm, normalise
from enmp_jax.models.names import KeyTable
from enmp_jax.models.transformer import Embedded, init_normal, transformer

KEYS = KeyTable(
    prefix="vit.",
    file_prefix="vit.",
    prefixes=("base_model.model.", "vit."),
    layer="layers.{}.",
    modules={
        "q": "attention.q_proj",
        "k": "attention.k_proj",
        "v": "attention.v_proj",
        "o": "attention.o_proj",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    },
    norms={"norm1": "layernorm_before", "norm2": "layernorm_after"},
    other={
        "embeddings/cls": "embeddings.cls_token",
        "embeddings/positions": "embeddings.position_embeddings",
        "embeddings/patch/weight": "embeddings.patch_embeddings.projection.weight",
        "embeddings/patch/bias": "embeddings.patch_embeddings.projection.bias",
        "norm/weight": "layernorm.weight",
        "norm/bias": "layernorm.bias",
    },
    aliases=(
        ("encoder.layer", "layers"),
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    ),
    ignored=r"pooler\.|embeddings\.mask_token$",
    heads=("classifier",),
)


@dataclass(frozen=True)
class PatchSpec:
    """How an image becomes tokens; sizes in pixels, ``mean`` and ``std`` in 0..1, one per channel."""

    height: int
    width: int
    patch_height: int
    patch_width: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of an image."""
        return self.height, self.width, self.channels

    @property
    def n_patches(self) -> int:
        """Number of patches of an image."""
        return (self.height // self.patch_height) * (self.width // self.patch_width)


@dataclass(frozen=True)
class ViTConfig:
    """The parts of a Hugging Face ``config.json`` that the forward pass needs, and the whole in ``raw``."""

    block: BlockSpec
    patch: PatchSpec
    n_layers: int
    raw: Mapping[str, Any] = field(hash=False)


def patch_spec(config: Mapping[str, Any], patch_size: int = 16) -> PatchSpec:
    """Read image and patch sizes; ``image_mean`` and ``image_std`` come from preprocessor_config.json.

    Raises:
        UserError: a mean or standard deviation that does not fit the channels.
    """
    height, width = _pair(config.get("image_size", 224))
    patch_height, patch_width = _pair(config.get("patch_size", patch_size))
    channels = config.get("num_channels", 3)
    mean, std = (_per_channel(config.get(key), channels, key) for key in ("image_mean", "image_std"))
    return PatchSpec(height, width, patch_height, patch_width, channels, mean, std)


def _pair(size: Any) -> tuple[int, int]:
    return (size[0], size[1]) if isinstance(size, list | tuple) else (size, size)


def _per_channel(values: Any, channels: int, key: str) -> tuple[float, ...]:
    values = [0.5] if values is None else values if isinstance(values, list | tuple) else [values]
    if len(values) not in (1, channels):
        raise UserError(f"preprocessor_config.json: {key} has {len(values)} values for {channels} channels")
    return tuple(float(v) for v in (values * channels if len(values) == 1 else values))


def embed_patches(
    spec: PatchSpec, weight: Float[Array, "width channels h w"], image: UInt8[Array, "batch h w channels"]
) -> Float[Array, "batch patch width"]:
    """Normalise the image and project its patches (a convolution whose stride is its size, as one matmul).

    Images that are floating point are taken as normalised already.
    """
    if jnp.issubdtype(image.dtype, jnp.integer):
        mean, std = jnp.asarray(spec.mean), jnp.asarray(spec.std)
        image = (image.astype(jnp.float32) * (1 / 255) - mean) / std
    b, ph, pw = image.shape[0], spec.patch_height, spec.patch_width
    rows, columns = spec.height // ph, spec.width // pw
    x = image.astype(weight.dtype)[:, : rows * ph, : columns * pw].reshape(b, rows, ph, columns, pw, -1)
    x = x.transpose(0, 1, 3, 5, 2, 4).reshape(b, rows * columns, -1)
    return times_transposed(x, weight.reshape(weight.shape[0], -1))


def build(config: Mapping[str, Any], dtype: Any = jnp.float32) -> Backbone:
    """A ViT from a Hugging Face ``config.json``; features: the CLS token after the final norm.

    Raises:
        UserError: sizes that do not fit each other, an unknown activation.
    """
    block = BlockSpec(
        width=config.get("hidden_size", 768),
        heads=config.get("num_attention_heads", 12),
        hidden=config.get("intermediate_size", 3072),
        activation=config.get("hidden_act", "gelu"),
        eps=config.get("layer_norm_eps", 1e-12),
        qkv_bias=config.get("qkv_bias", True),
        init_std=config.get("initializer_range", 0.02),
        dtype=jnp.dtype(dtype),
    )
    c = ViTConfig(block, patch_spec(config), config.get("num_hidden_layers", 12), config)

    def init(key: Array) -> Params:
        keys = jax.random.split(key, 4)
        normal = partial(init_normal, std=block.init_std, dtype=block.dtype)
        shape = (block.width, c.patch.channels, c.patch.patch_height, c.patch.patch_width)
        embeddings = {
            "cls": normal(keys[0], (1, 1, block.width)),
            "positions": normal(keys[1], (1, c.patch.n_patches + 1, block.width)),
            "patch": {"weight": normal(keys[2], shape), "bias": jnp.zeros(block.width, block.dtype)},
        }
        layers = init_layers(keys[3], block, c.n_layers)
        return {"embeddings": embeddings, "layers": layers, "norm": init_norm(block.width)}

    def embed(params: Params, inputs: Inputs) -> Embedded:
        e = params["embeddings"]
        x = embed_patches(c.patch, e["patch"]["weight"], inputs["image"]) + e["patch"]["bias"]
        cls = jnp.broadcast_to(e["cls"], (x.shape[0], 1, block.width))
        return Embedded(jnp.concatenate([cls, x], axis=1) + e["positions"])

    def pool(params: Params, hidden: Array, inputs: Inputs) -> Float[Array, "batch width"]:
        return normalise(hidden[:, 0].astype(jnp.float32), params["norm"], block.eps)

    return transformer(
        "vit",
        c,
        KEYS,
        width=block.width,
        init=init,
        embed=embed,
        token=lambda inputs: 0,
        pool=pool,
        input_spec={"image": (c.patch.shape, jnp.uint8)},
    )
