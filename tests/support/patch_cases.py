"""Unfolded patches by another means than the library's."""

from __future__ import annotations

import numpy as np

from lance_ref.algebra.geometry import ConvGeometry
from lance_ref.lance.patches import patch_shape


def patches_by_loops(x: np.ndarray, g: ConvGeometry) -> np.ndarray:
    """P (B, L, K), entry by entry from the definition of a convolution."""
    (B, L, K), (H_out, W_out) = patch_shape(g), g.output_size
    result = np.zeros((B, L, K), x.dtype)
    for h, w in np.ndindex(H_out, W_out):
        for k, (c, p, q) in enumerate(np.ndindex(*g.weight_shape[1:])):
            row = g.stride[0] * h + g.dilation[0] * p - g.padding[0][0]
            column = g.stride[1] * w + g.dilation[1] * q - g.padding[1][0]
            if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                result[:, h * W_out + w, k] = x[:, c, row, column]
    return result
