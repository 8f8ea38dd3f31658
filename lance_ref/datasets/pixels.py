"""Pixels as the networks expect them: each set of pretrained weights was trained on its own scale."""

from __future__ import annotations

import numpy as np


def preprocess(pixels: np.ndarray) -> np.ndarray:
    """Pixels as the pretrained MobileNetV2 expects them: (pixel − 128) / 128, as float32 (B, 3, H, W).

    ``pixels`` is RGB uint8, (B, H, W, 3) or (B, 3, H, W); 3 in the last axis is taken for the channels first.
    ValueError for anything else.
    """
    return (_channels_first(pixels, 3) - np.float32(128)) / np.float32(128)


def preprocess_mcunet(pixels: np.ndarray) -> np.ndarray:
    """Pixels as the pretrained MCUNet expects them: (pixel − 127.5) · 2 / 255, otherwise as :func:`preprocess`."""
    return (_channels_first(pixels, 3) - np.float32(127.5)) * np.float32(2 / 255)


def preprocess_resnet8(pixels: np.ndarray) -> np.ndarray:
    """Pixels as the pretrained ResNet-8 expects them, 0..255 unchanged; otherwise as :func:`preprocess`."""
    return _channels_first(pixels, 3)


def scale_to_one(pixels: np.ndarray) -> np.ndarray:
    """pixel / 255, for nets without pretrained weights; grey images (B, H, W, 1) too."""
    return _channels_first(pixels, 1, 3) / np.float32(255)


def _channels_first(pixels: np.ndarray, *channels: int) -> np.ndarray:
    """uint8 (B, H, W, C) or (B, C, H, W) to float32 (B, C, H, W), values unchanged; C is one of ``channels``."""
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or not {pixels.shape[3], pixels.shape[1]} & set(channels):
        C = " or ".join(map(str, channels))
        raise ValueError(
            f"pixels has shape {pixels.shape} and dtype {pixels.dtype}, expected (B, H, W, {C}) or (B, {C}, H, W) uint8"
        )
    if pixels.shape[3] in channels:
        pixels = pixels.transpose(0, 3, 1, 2)  # (B, C, H, W)
    return np.ascontiguousarray(pixels, dtype=np.float32)
