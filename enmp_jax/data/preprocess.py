"""From decoded images and texts to what a base model takes, as its own files say.

Images stay uint8: rescaling and normalising are the backbone's, on the device.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from enmp_jax.config.sections import DataConfig
from enmp_jax.data.answer_tokens import AnswerTokens
from enmp_jax.data.base import Modality
from enmp_jax.data.layout import Kind
from enmp_jax.data.tokenizer import TOKENIZER_FILES, load_tokenizer, tokenizer_digest
from enmp_jax.errors import UserError, one_line
from enmp_jax.models import checkpoint


class PlainImages:
    """Images for small models without preprocessing of their own: channels and size made to fit.

    Images of another size are resized (bilinear, as HF's ViT does) without keeping their proportions.
    """

    modality: Modality = "image"
    padding: Mapping[str, int] = {}

    def __init__(self, size: tuple[int, int], channels: int) -> None:
        self.size, self.channels = size, channels
        self.identity = f"plain {size} {channels} pillow {importlib.metadata.version('pillow')}"

    def __call__(self, values: Sequence[np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
        """See ``Preprocess``; ``image`` uint8 [n, height, width, channels]."""
        return {"image": np.stack([self._one(value) for value in values])}, 0

    def _one(self, image: np.ndarray) -> np.ndarray:
        image = with_channels(image, self.channels)
        if image.shape[:2] == self.size:
            return image
        from PIL import Image

        picture = Image.fromarray(image[..., 0] if self.channels == 1 else image)
        resized = np.asarray(picture.resize((self.size[1], self.size[0]), Image.Resampling.BILINEAR))
        return resized.reshape(*self.size, self.channels)


class ProcessorImages:
    """Images through the model's own transformers processor (its Pillow version), up to the crop.

    Args:
        directory: holds ``preprocessor_config.json``.
        size: height and width that the model takes.
    """

    modality: Modality = "image"
    padding: Mapping[str, int] = {}

    def __init__(self, directory: Path, size: tuple[int, int]) -> None:
        self._directory, self._size = directory, size
        settings = checkpoint.read_json(directory / "preprocessor_config.json")
        versions = [importlib.metadata.version(package) for package in ("pillow", "transformers")]
        self.identity = json.dumps(["processor", settings, size, versions], sort_keys=True)

    @functools.cached_property
    def _processor(self) -> Any:
        from transformers import AutoImageProcessor

        try:
            return AutoImageProcessor.from_pretrained(str(self._directory), backend="pil")
        except Exception as error:  # transformers raises many kinds for settings that it cannot take
            raise self._unusable(error) from None

    def __call__(self, values: Sequence[np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
        """See ``Preprocess``; ``image`` uint8 [n, height, width, 3]."""
        colour = [with_channels(value, 3) for value in values]
        process = self._processor
        try:
            images = process(
                colour, do_rescale=False, do_normalize=False, do_convert_rgb=False,
                input_data_format="channels_last", data_format="channels_first", return_tensors="np",
            )["pixel_values"]  # fmt: skip
        except Exception as error:  # see _processor
            raise self._unusable(error) from None
        if images.shape[2:] != self._size:
            raise UserError(
                f"{self._directory}: preprocessor_config.json makes {list(images.shape[2:])} pixels, "
                f"the model takes {list(self._size)}"
            )
        return {"image": np.ascontiguousarray(np.moveaxis(images, 1, -1))}, 0

    def _unusable(self, error: Exception) -> UserError:
        return UserError(f"{self._directory}: preprocessor_config.json cannot be used ({one_line(error)})")


class Tokens:
    """Texts and text pairs through the model's tokenizer, right-padded.

    Args:
        directory: holds the tokenizer's files.
        max_length: tokens of an example, special ones included; longer examples are truncated, the
            longer text of a pair first.
    """

    modality: Modality = "text"

    def __init__(self, directory: Path, max_length: int) -> None:
        self._directory, self.max_length = directory, max_length
        versions = [importlib.metadata.version(package) for package in ("tokenizers", "transformers")]
        self.identity = json.dumps(["tokens", tokenizer_digest(directory), max_length, versions])

    @functools.cached_property
    def _tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self._directory)
        if tokenizer.pad_token_id is None:
            # Llama has none; padding is masked, so any token will do
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        return tokenizer

    @property
    def padding(self) -> Mapping[str, int]:
        """See ``Preprocess``."""
        fill = {"input_ids": int(self._tokenizer.pad_token_id)}
        return {name: fill.get(name, 0) for name in ("input_ids", "attention_mask", "token_type_ids")}

    def __call__(self, values: Sequence[tuple[str, ...]]) -> tuple[dict[str, np.ndarray], int]:
        """See ``Preprocess``; int32 [n, longest]."""
        parts = [list(column) for column in zip(*values)]
        if len(parts) > 2:
            raise UserError(f"texts have {len(parts)} parts, but tokenizers take one text or a pair")
        limit = min(self.max_length, self._tokenizer.model_max_length)
        tokens = self._tokenizer(
            *parts, truncation=True, max_length=limit, padding="longest", return_attention_mask=True,
            return_tensors="np",
        )  # fmt: skip
        full = np.asarray(tokens["attention_mask"]).sum(axis=1) == limit
        truncated = self._count_longer([value for value, f in zip(values, full) if f], limit)
        inputs = {name: np.asarray(tokens[name], np.int32) for name in self.padding if name in tokens}
        return inputs, truncated

    def _count_longer(self, values: Sequence[tuple[str, ...]], limit: int) -> int:
        if not values:
            return 0
        parts = [list(column) for column in zip(*values)]
        lengths = [len(ids) for ids in self._tokenizer(*parts, truncation=False, verbose=False)["input_ids"]]
        return sum(length > limit for length in lengths)


def preprocess_for(
    model: str | Path, family: str, config: DataConfig, kind: Kind = "classification"
) -> PlainImages | ProcessorImages | Tokens | AnswerTokens:
    """The preprocessing that a base model's files ask for.

    Args:
        model: directory in Hugging Face layout or hub id.
        family: ``Backbone.family``, for messages.
        config: the data; ``max_length`` limits the tokens of a text, as the model itself does.
        kind: of the task.

    Raises:
        UserError: a text model without tokenizer files, a generative task for an image model, or an unusable
            image size.
    """
    directory = checkpoint.find(model)
    settings = checkpoint.read_json(directory / "config.json")
    vision = settings.get("vision_config") or settings
    if not isinstance(vision, dict):
        shown = one_line(repr(vision), 80)
        raise UserError(f"{directory}/config.json: vision_config is {shown}, not an object")
    if "image_size" in vision or "vision_config" in settings:
        if kind != "classification":
            raise UserError(f"{directory} takes images: a {kind} task needs a causal language model")
        height, width = _image_size(vision, directory)
        processor = directory / "preprocessor_config.json"
        if processor.exists() and "size" in checkpoint.read_json(processor):
            return ProcessorImages(directory, (height, width))
        if "vision_config" in settings:
            raise UserError(
                f"{directory} has no preprocessor_config.json with a size: {family} needs it for images"
            )
        return PlainImages((height, width), _positive(vision, "num_channels", 3, directory))
    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        raise UserError(
            f"{directory} has neither an image size nor tokenizer files: what does this {family} read?"
        )
    positions = "n_positions" if settings.get("model_type") == "gpt2" else "max_position_embeddings"
    limit = _positive(settings, positions, config.max_length, directory)
    if settings.get("model_type") in ("roberta", "xlm-roberta", "camembert"):
        padding = settings.get("pad_token_id", 1)
        limit -= (padding if isinstance(padding, int) else 1) + 1  # positions start behind the padding index
    limit = min(config.max_length, limit)
    if kind == "classification":
        return Tokens(directory, limit)
    vocabulary = _positive(settings, "vocab_size", 32000, directory)
    return AnswerTokens(directory, limit, vocabulary, kind, config)


def _positive(settings: Mapping[str, Any], key: str, default: int, directory: Path) -> int:
    """A setting of ``config.json`` that is a whole number above 0."""
    value = settings.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        shown = one_line(repr(value), 80)
        raise UserError(f"{directory}/config.json: {key} is {shown}, not a whole number above 0")
    return value


def _image_size(settings: Mapping[str, Any], directory: Path) -> tuple[int, int]:
    """Height and width in pixels, which ``image_size`` gives as one number or two."""
    size = settings.get("image_size", 224)
    if isinstance(size, list) and len(size) == 2:
        height, width = (_positive({"image_size": side}, "image_size", 224, directory) for side in size)
    else:
        height = width = _positive(settings, "image_size", 224, directory)
    return height, width


def with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [h, w, c] with 1 or 3 channels: grey repeated, colour to luma as Pillow does, alpha dropped."""
    if image.shape[-1] == 4:
        image = image[..., :3]
    if image.shape[-1] == channels:
        return image
    if channels == 3 and image.shape[-1] == 1:
        return np.repeat(image, 3, axis=-1)
    if channels == 1 and image.shape[-1] == 3:
        from PIL import Image

        return np.asarray(Image.fromarray(image).convert("L"))[..., None]
    raise UserError(f"images have {image.shape[-1]} channels, but the base model takes {channels}")
