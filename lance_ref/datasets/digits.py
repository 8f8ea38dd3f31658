"""Handwritten digits, 8x8, shipped with the library.

Source: Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository (1998), https://doi.org/10.24432/C50P49, licence CC BY 4.0. These are the 1,797 images of
its test set, in the order in which scikit-learn's ``load_digits`` gives them; ``digits.npz`` holds
them unchanged as ``x`` uint8 (1797, 8, 8), levels 0..16, and ``y`` uint8 (1797,).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lance_ref.datasets.dataset import Dataset, resize, spread, to_channels
from lance_ref.io.npz import load_npz

TEST_IMAGES = 360
SOURCE = "Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, CC BY 4.0"


def load_digits(
    split: str = "train",
    image_size: int | tuple[int, int] | None = None,
    limit: int | None = None,
    channels: int | None = None,
) -> Dataset:
    """The bundled digits, without files from elsewhere; arguments as of :func:`lance_ref.datasets.load`.

    The first 1,437 images are for training and the last 360 for the test, in the source's order. Pixels are the
    source's levels 0..16 scaled to 0..255 and rounded.

    Examples
    --------
    >>> load_digits("test")
    Dataset('digits', 'test', 360 images 8x8x1, 10 classes)
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'test'")
    arrays = load_npz(Path(__file__).with_name("digits.npz"))
    levels, labels = arrays["x"], arrays["y"].astype(np.int64)
    part = slice(-TEST_IMAGES) if split == "train" else slice(-TEST_IMAGES, None)
    labels = labels[part]
    chosen = spread(labels, limit)
    pixels = ((levels[part][chosen].astype(np.uint16) * 255 + 8) // 16).astype(np.uint8)[..., None]  # (N, 8, 8, 1)
    images = pixels if image_size is None else resize(pixels, image_size)
    names = tuple(str(digit) for digit in range(10))
    return Dataset("digits", split, to_channels(images, channels), labels[chosen], names, SOURCE)
