"""ViT (Dosovitskiy et al., arXiv 2010.11929) as in Hugging Face's ViTForImageClassification."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from enmp_jax.devices.matmul import times_transposed
from enmp_jax.errors import UserError
from enmp_jax.models import parameters
from enmp_jax.models.base import Backbone, Inputs, Params
from enmp_jax.models.block import BlockSpec, declare_layers
from enmp_jax.models.layers import Stream, normalise
from enmp_jax.models.names import Spelling
from enmp_jax.models.transformer import transformer

SPELLING = Spelling(
    prefix="vit.",
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
LAYER = {
    "q": "layers.{}.attention.q_proj",
    "k": "layers.{}.attention.k_proj",
    "v": "layers.{}.attention.v_proj",
    "o": "layers.{}.attention.o_proj",
    "up": "layers.{}.mlp.fc1",
    "down": "layers.{}.mlp.fc2",
    "norm1": "layers.{}.layernorm_before",
    "norm2": "layers.{}.layernorm_after",
}


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

    def weight_shape(self, width: int) -> tuple[int, int, int, int]:
        """Shape of the weight that makes tokens of this width of patches, as torch's convolution has it."""
        return width, self.channels, self.patch_height, self.patch_width


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
    spec: PatchSpec,
    weight: Float[Array, "width channels ph pw"],
    image: UInt8[Array, "batch h w channels"] | Float[Array, "batch h w channels"],
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

    std, dtype, width = block.init_std, block.dtype, block.width
    patch, positions = c.patch.weight_shape(width), (1, c.patch.n_patches + 1, width)
    declared = {
        "embeddings": {
            "cls": parameters.normal("embeddings.cls_token", (1, 1, width), std, dtype),
            "positions": parameters.normal("embeddings.position_embeddings", positions, std, dtype),
            "patch": parameters.linear("embeddings.patch_embeddings.projection", patch, std, dtype),
        },
        "layers": declare_layers(block, c.n_layers, LAYER),
        "norm": parameters.norm("layernorm", width),
    }

    def embed(params: Params, inputs: Inputs) -> Stream:
        e = params["embeddings"]
        x = embed_patches(c.patch, e["patch"]["weight"], inputs["image"]) + e["patch"]["bias"]
        cls = jnp.broadcast_to(e["cls"], (x.shape[0], 1, block.width))
        return Stream(jnp.concatenate([cls, x], axis=1) + e["positions"], token=0)

    def pool(params: Params, hidden: Array, inputs: Inputs) -> Float[Array, "batch width"]:
        return normalise(hidden[:, 0].astype(jnp.float32), params["norm"], block.eps)

    return transformer(
        "vit",
        c,
        SPELLING,
        width=block.width,
        parameters=declared,
        embed=embed,
        pool=pool,
        input_spec={"image": (c.patch.shape, jnp.uint8)},
    )
