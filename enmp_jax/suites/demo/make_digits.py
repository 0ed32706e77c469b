"""Make ``digits.npz``: the 1,797 handwritten digits of scikit-learn's ``load_digits``.

Run with ``pip install scikit-learn`` at hand: ``python -m enmp_jax.suites.demo.make_digits OUT``.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository (1998), CC BY 4.0; the test part, as packaged by scikit-learn (8x8 pixels, 17 grey levels).

Besides the digit, every image has coarse ink levels, ``ink_0 .. ink_15``: the mean of each 2x2 patch
in four levels. Predicting them makes a base model that knows the images but none of the tasks.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(out: Path) -> None:
    """Write the file: shuffled once with a fixed seed, split by image into four parts."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    image = np.rint(digits.images[order] * (255 / 16)).astype(np.uint8)
    parts = {"train": 897, "search": 250, "selection": 250, "test": 400}
    split = np.repeat(list(parts), list(parts.values()))
    patches = image.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)
    ink = {f"ink_{i}": (patches[:, i] // 64).astype(np.uint8) for i in range(16)}
    np.savez_compressed(
        out, image=image[..., None], label=digits.target[order].astype(np.uint8), split=split, **ink
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
