"""The sums of a step, on maps of one image.

What they add to is given, so that a device needs no room beside it: there, each is a loop over places, channels and
kernel. A map has shape (h, w), several have (n, h, w), kernels have (n, k_h, k_w).
"""

from __future__ import annotations

import numpy as np

from lance_ref.device.windows import Reach


def correlate(out: np.ndarray, x: np.ndarray, kernels: np.ndarray, reach: Reach) -> None:
    """One channel from many: out[y, x] += Σ_i,p,q kernels[i,p,q] · x[i, s·y + d·p − top, s·x + d·q − left]."""
    out += np.tensordot(kernels, reach.seen(x), ((0, 1, 2), (0, 3, 4)))


def spread(out: np.ndarray, x: np.ndarray, kernels: np.ndarray, reach: Reach) -> None:
    """Many channels from one: out[o, y, x] += Σ_p,q kernels[o,p,q] · x[s·y + d·p − top, s·x + d·q − left]."""
    out += np.tensordot(kernels, reach.seen(x), ((1, 2), (2, 3)))


def correlate_back(gradient: np.ndarray, g: np.ndarray, kernels: np.ndarray, reach: Reach) -> None:
    """The input gradient of :func:`correlate`: gradient[i, ...] += Σ_p,q kernels[i,p,q] · g[y, x]."""
    for p, q, written, read in reach.taps:
        gradient[(slice(None), *read)] += kernels[:, p, q, None, None] * g[written]


def spread_back(gradient: np.ndarray, g: np.ndarray, kernels: np.ndarray, reach: Reach) -> None:
    """The input gradient of :func:`spread`: gradient[...] += Σ_o,p,q kernels[o,p,q] · g[o, y, x]."""
    for p, q, written, read in reach.taps:
        gradient[read] += np.tensordot(kernels[:, p, q], g[(slice(None), *written)], 1)


def kernel_gradient(x: np.ndarray, g: np.ndarray, reach: Reach) -> np.ndarray:
    """Gradients of the kernels between a map ``x`` (h, w) and maps ``g`` (o, H, W): (o, k_h, k_w).

    Σ_y,x g[o, y, x] · x[s·y + d·p − top, s·x + d·q − left]
    """
    return np.tensordot(g, reach.seen(x), ((1, 2), (0, 1)))


def pack(mask: np.ndarray, signs: np.ndarray) -> None:
    """Keep booleans as bits."""
    mask[:] = np.packbits(signs)


def apply(mask: np.ndarray, g: np.ndarray, scale: float = 1.0) -> None:
    """Multiply a gradient by bits, in place."""
    g *= np.unpackbits(mask, count=g.size).reshape(g.shape)
    if scale != 1:
        g *= g.dtype.type(scale)
