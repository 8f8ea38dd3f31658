"""The running example: one small network that reads handwritten digits, met again from lesson 1 to the project."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from lance_ref.models.convnet import ConvNet


def network(epochs: int = 0, seed: int = 0) -> ConvNet:
    """Three convolutions and a linear head for digits of 8 × 8 pixels.

    Parameters
    ----------
    epochs : int
        How long it has learned already, on the training images.
    seed : int
        Of the initial weights.
    """
    from lance_ref import datasets, fit, models

    net = models.create("convnet", in_channels=1, rng=seed)
    if epochs:
        fit(net, datasets.load("digits", "train"), epochs=epochs, batch_size=32, lr=0.3, progress=False)
    return net


def batch(size: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, 1, 8, 8) in float32, and their labels."""
    from lance_ref import datasets

    return next(datasets.batches(datasets.load("digits", "train"), size, rng=seed))
