"""Decoding images to uint8 arrays."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from enmp_jax.errors import one_line

MOST_PIXELS = 50_000_000
"""Small files can stand for images that no memory holds."""


class BadImage(Exception):
    """An image that does not decode; the message says why, in a few words."""


def decode(value: np.ndarray | bytes | Path) -> np.ndarray:
    """uint8 ``[h, w, c]`` of an array, encoded bytes or a file; c is 1 for grey images, else 3 (RGB).

    Arrays keep their channels.

    Raises:
        BadImage: unreadable, truncated, or of more than 8 bits a channel.
    """
    if isinstance(value, np.ndarray):
        if not value.size:
            raise BadImage("it has no pixels")
        return value if value.ndim == 3 else value[..., None]
    if isinstance(value, Path) and not value.is_file():
        raise BadImage("there is no such file")
    from PIL import Image

    try:
        with Image.open(value if isinstance(value, Path) else io.BytesIO(value)) as image:
            if 0 in image.size or image.width * image.height > MOST_PIXELS:  # before a pixel is decoded
                raise BadImage(f"{image.width} x {image.height} pixels: from 1 to {MOST_PIXELS} are read")
            if image.mode.startswith(("I", "F")):
                raise BadImage(f"pixel format {image.mode} is not 8-bit")
            grey = image.mode in ("1", "L", "LA")
            array = np.asarray(image.convert("L" if grey else "RGB"))
    except BadImage:
        raise
    except Exception as error:  # the decoders of Pillow raise many kinds for damaged files
        unknown = isinstance(error, Image.UnidentifiedImageError)
        raise BadImage("not an image" if unknown else one_line(error)) from None
    return array[..., None] if grey else array
