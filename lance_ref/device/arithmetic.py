"""The sums of a step, on maps of one image.

Each function is a loop over the places of a kernel. What it adds to is given, so that nothing else is laid out. A map
has shape (h, w), several have (n, h, w), kernels have (n, k_h, k_w).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lance_ref.device.windows import Tap


def correlate(out: np.ndarray, x: np.ndarray, kernels: np.ndarray, taps: Sequence[Tap]) -> None:
    """One channel from many: out[y, x] += Σ_i,p,q kernels[i,p,q] · x[i, s·y + d·p − top, s·x + d·q − left]."""
    for p, q, written, read in taps:
        out[written] += np.tensordot(kernels[:, p, q], x[(slice(None), *read)], 1)


def spread(out: np.ndarray, x: np.ndarray, kernels: np.ndarray, taps: Sequence[Tap]) -> None:
    """Many channels from one: out[o, y, x] += Σ_p,q kernels[o,p,q] · x[s·y + d·p − top, s·x + d·q − left]."""
    for p, q, written, read in taps:
        out[(slice(None), *written)] += kernels[:, p, q, None, None] * x[read]


def correlate_back(gradient: np.ndarray, g: np.ndarray, kernels: np.ndarray, taps: Sequence[Tap]) -> None:
    """The input gradient of :func:`correlate`: gradient[i, ...] += Σ_p,q kernels[i,p,q] · g[y, x]."""
    for p, q, written, read in taps:
        gradient[(slice(None), *read)] += kernels[:, p, q, None, None] * g[written]


def spread_back(gradient: np.ndarray, g: np.ndarray, kernels: np.ndarray, taps: Sequence[Tap]) -> None:
    """The input gradient of :func:`spread`: gradient[...] += Σ_o,p,q kernels[o,p,q] · g[o, y, x]."""
    for p, q, written, read in taps:
        gradient[read] += np.tensordot(kernels[:, p, q], g[(slice(None), *written)], 1)


def kernel_gradient(x: np.ndarray, g: np.ndarray, taps: Sequence[Tap], shape: tuple[int, int]) -> np.ndarray:
    """Gradients of the kernels between every map of ``x`` (i, h, w) and every map of ``g`` (o, H, W): (o, i, k_h, k_w).

    Σ_y,x g[o, y, x] · x[i, s·y + d·p − top, s·x + d·q − left]
    """
    gradient = np.zeros((len(g), len(x), *shape), g.dtype)
    for p, q, written, read in taps:
        seen, given = x[(slice(None), *read)], g[(slice(None), *written)]
        gradient[:, :, p, q] = np.tensordot(given, seen, ((1, 2), (1, 2)))
    return gradient


def pack(mask: np.ndarray, signs: np.ndarray) -> None:
    """Keep booleans as bits."""
    mask[:] = np.packbits(signs)


def apply(mask: np.ndarray, g: np.ndarray, scale: float = 1.0) -> None:
    """Multiply a gradient by bits, in place."""
    g *= np.unpackbits(mask, count=g.size).reshape(g.shape)
    if scale != 1:
        g *= g.dtype.type(scale)
