"""Fixed image transforms that turn one data set into several tasks. uint8 ``[..., h, w, c]`` -> the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from enmp_jax.errors import UserError, suggestion

Transform = Callable[[np.ndarray], np.ndarray]


def rotate90(image: np.ndarray) -> np.ndarray:
    """Rotate by 90 degrees counter-clockwise; height and width change places."""
    return np.rot90(image, 1, axes=(-3, -2))


def rotate180(image: np.ndarray) -> np.ndarray:
    """Rotate by 180 degrees."""
    return np.rot90(image, 2, axes=(-3, -2))


def rotate270(image: np.ndarray) -> np.ndarray:
    """Rotate by 270 degrees counter-clockwise."""
    return np.rot90(image, 3, axes=(-3, -2))


def mirror(image: np.ndarray) -> np.ndarray:
    """Left becomes right."""
    return np.flip(image, axis=-2)


def flip(image: np.ndarray) -> np.ndarray:
    """Top becomes bottom."""
    return np.flip(image, axis=-3)


def invert(image: np.ndarray) -> np.ndarray:
    """The negative: 255 - value."""
    return 255 - image


def occlude(
    image: np.ndarray, block: tuple[float, float, float, float] = (0.25, 0.25, 0.75, 0.75)
) -> np.ndarray:
    """Black out a block given as (top, left, bottom, right) in fractions of height and width.

    The default is the middle half of both sides, a quarter of the area. Edges are rounded to the
    closest pixel.
    """
    height, width = image.shape[-3:-1]
    top, bottom = round(block[0] * height), round(block[2] * height)
    left, right = round(block[1] * width), round(block[3] * width)
    image = image.copy()
    image[..., top:bottom, left:right, :] = 0
    return image


TRANSFORMS: dict[str, Transform] = {
    t.__name__: t for t in (rotate90, rotate180, rotate270, mirror, flip, invert, occlude)
}


def parse(names: Sequence[str]) -> Transform:
    """Compose transforms by name, applied from left to right.

    Besides the keys of ``TRANSFORMS``, ``occlude:TOP,LEFT,BOTTOM,RIGHT`` sets the block.

    Raises:
        UserError: unknown name or bad block.
    """
    steps = [_parse(name) for name in names]

    def apply(image: np.ndarray) -> np.ndarray:
        for step in steps:
            image = step(image)
        return np.ascontiguousarray(image)

    return apply


def _parse(name: str) -> Transform:
    kind, _, argument = name.partition(":")
    if kind == "occlude" and argument:
        try:
            top, left, bottom, right = (float(x) for x in argument.split(","))
            if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
                raise ValueError
        except ValueError:
            raise UserError(
                f"transform {name!r}: expected occlude:TOP,LEFT,BOTTOM,RIGHT, fractions in 0..1, "
                "top < bottom, left < right"
            ) from None
        return lambda image: occlude(image, (top, left, bottom, right))
    if name not in TRANSFORMS:
        raise UserError(f"unknown transform {name!r}; {suggestion(name, TRANSFORMS)}")
    return TRANSFORMS[name]
