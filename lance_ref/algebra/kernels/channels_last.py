"""Loops over maps with the channels innermost, (b, H, W, C), for nets that run forward alone; see :mod:`threads`.

Here a product of matrices covers all places of several images, and what follows it (scale, shift, residual,
activation) runs over the rows of its result while they are still in the cache. ``start, stop`` are rows of the maps of
all images together, b·H_out of them. None of it reports multiply-adds: :mod:`lance_ref.fused.steps` does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lance_ref.algebra.kernels.threads import Loops, Padding, Pair, numba_enabled

CLAMP, HARDSWISH, HARDSIGMOID = 0, 1, 2
"""Activation functions: into [low, high], x·clamp(x + 3, 0, 6)/6, and clamp(x + 3, 0, 6)/6."""


@dataclass(frozen=True)
class Activation:
    """One of the activation functions above; ``low`` and ``high`` are the bounds of the first, infinite for none."""

    kind: int = CLAMP
    low: float = -np.inf
    high: float = np.inf


NONE = Activation()


def finish(
    y: np.ndarray, scale: np.ndarray, shift: np.ndarray, residual: np.ndarray | None, activation: Activation = NONE
) -> None:
    """y ← activation(y·scale + shift + residual), in place.

    Parameters
    ----------
    y : (n, C), contiguous
    scale, shift : (C,)
    residual : (n, C) or None
    """
    if not numba_enabled():
        finish_numpy(y, scale, shift, residual, activation)
        return
    item = y.dtype.type
    added = y if residual is None else residual
    low, high = item(activation.low), item(activation.high)
    _finish.alone(len(y), y, scale, shift, added, residual is not None, activation.kind, low, high)


def finish_numpy(
    y: np.ndarray, scale: np.ndarray, shift: np.ndarray, residual: np.ndarray | None, activation: Activation = NONE
) -> None:
    """NumPy twin of :func:`finish`."""
    y *= scale
    y += shift
    if residual is not None:
        y += residual
    item = y.dtype.type
    if activation.kind == CLAMP:
        np.clip(y, item(activation.low), item(activation.high), out=y)
    elif activation.kind == HARDSWISH:
        y *= np.clip(y + 3, 0, 6) / 6
    else:
        y[:] = np.clip(y + 3, 0, 6) / 6


@Loops
def _finish(start, stop, y, scale, shift, residual, adds, kind, low, high):  # type: ignore[no-untyped-def]
    C = scale.size
    # written with `<` and `>`, each keeping the value where the comparison fails: NaN stays NaN
    three, six, sixth, zero = y.dtype.type(3), y.dtype.type(6), y.dtype.type(1 / 6), y.dtype.type(0)
    for n in range(start, stop):
        row = y[n]
        if adds:
            more = residual[n]
            for c in range(C):
                row[c] = row[c] * scale[c] + shift[c] + more[c]
        else:
            for c in range(C):
                row[c] = row[c] * scale[c] + shift[c]
        if kind == 0:
            for c in range(C):
                value = row[c]
                value = low if value < low else value
                row[c] = high if value > high else value
        else:
            for c in range(C):
                value = row[c] + three
                value = zero if value < zero else value
                value = (six if value > six else value) * sixth
                row[c] = row[c] * value if kind == 1 else value


def depthwise(
    x: np.ndarray,
    weight: np.ndarray,
    out: np.ndarray,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    scale: np.ndarray,
    shift: np.ndarray,
    low: float = -np.inf,
    high: float = np.inf,
) -> None:
    """Depthwise convolution, then y·scale + shift, clamped into [low, high]; written to ``out``.

    Parameters
    ----------
    x : (b, H, W, C)
    weight : (k_h, k_w, C)
    out : (b, H_out, W_out, C)
    scale, shift : (C,)
    """
    if not numba_enabled():
        depthwise_numpy(x, weight, out, stride, padding, dilation, scale, shift, low, high)
        return
    item = x.dtype.type
    corner = (*stride, padding[0][0], padding[1][0], *dilation)
    _depthwise.alone(out.shape[0] * out.shape[1], x, weight, out, *corner, scale, shift, item(low), item(high))


def depthwise_numpy(
    x: np.ndarray,
    weight: np.ndarray,
    out: np.ndarray,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    scale: np.ndarray,
    shift: np.ndarray,
    low: float = -np.inf,
    high: float = np.inf,
) -> None:
    """NumPy twin of :func:`depthwise`."""
    H_out, W_out = out.shape[1:3]
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    out[:] = 0
    for p, q in np.ndindex(*weight.shape[:2]):
        seen = padded[:, p * dilation[0] :, q * dilation[1] :]
        out += (
            weight[p, q] * seen[:, : (H_out - 1) * stride[0] + 1 : stride[0], : (W_out - 1) * stride[1] + 1 : stride[1]]
        )
    out *= scale
    out += shift
    np.clip(out, x.dtype.type(low), x.dtype.type(high), out=out)


@Loops
def _depthwise(start, stop, x, weight, out, s_h, s_w, top, left, d_h, d_w, scale, shift, low, high):  # type: ignore[no-untyped-def]
    _, H, W, C = x.shape
    H_out, W_out = out.shape[1], out.shape[2]
    k_h, k_w = weight.shape[0], weight.shape[1]
    for n in range(start, stop):
        b, h = n // H_out, n % H_out
        first_row = h * s_h - top
        for w in range(W_out):
            first = w * s_w - left
            place = out[b, h, w]
            inside = first_row >= 0 and first >= 0 and first_row + 3 <= H and first + 3 <= W
            if inside and k_h == 3 and k_w == 3 and d_h == 1 and d_w == 1:
                # all nine at once: each result is written once, and never read
                a, b_, c_ = x[b, first_row], x[b, first_row + 1], x[b, first_row + 2]
                x_0, x_1, x_2 = a[first], a[first + 1], a[first + 2]
                x_3, x_4, x_5 = b_[first], b_[first + 1], b_[first + 2]
                x_6, x_7, x_8 = c_[first], c_[first + 1], c_[first + 2]
                v_0, v_1, v_2 = weight[0, 0], weight[0, 1], weight[0, 2]
                v_3, v_4, v_5 = weight[1, 0], weight[1, 1], weight[1, 2]
                v_6, v_7, v_8 = weight[2, 0], weight[2, 1], weight[2, 2]
                for c in range(C):
                    value = x_0[c] * v_0[c] + x_1[c] * v_1[c] + x_2[c] * v_2[c]
                    value += x_3[c] * v_3[c] + x_4[c] * v_4[c] + x_5[c] * v_5[c]
                    value += x_6[c] * v_6[c] + x_7[c] * v_7[c] + x_8[c] * v_8[c]
                    value = value * scale[c] + shift[c]
                    value = low if value < low else value
                    place[c] = high if value > high else value
                continue
            place[:] = 0
            for p in range(k_h):
                row = first_row + p * d_h
                if row < 0 or row >= H:
                    continue
                line, values = x[b, row], weight[p]
                q = 0
                while q < k_w and first + q * d_w < 0:
                    q += 1
                end = k_w
                while end > q and first + (end - 1) * d_w >= W:
                    end -= 1
                while q + 3 <= end:  # three positions at a time: a third of the reads and writes of the result
                    x_0, x_1, x_2 = line[first + q * d_w], line[first + (q + 1) * d_w], line[first + (q + 2) * d_w]
                    v_0, v_1, v_2 = values[q], values[q + 1], values[q + 2]
                    for c in range(C):
                        place[c] += x_0[c] * v_0[c] + x_1[c] * v_1[c] + x_2[c] * v_2[c]
                    q += 3
                while q < end:
                    x_0, v_0 = line[first + q * d_w], values[q]
                    for c in range(C):
                        place[c] += x_0[c] * v_0[c]
                    q += 1
            for c in range(C):
                value = place[c] * scale[c] + shift[c]
                value = low if value < low else value
                place[c] = high if value > high else value


def columns(
    x: np.ndarray,
    out: np.ndarray,
    rows: slice,
    H_out: int,
    kernel: Pair,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
) -> None:
    """The patches under some output rows, each as a row of a matrix, in the order (C, k_h, k_w) of a weight.

    Parameters
    ----------
    x : (b, H, W, C)
        Any strides.
    out : (n, W_out, C·k_h·k_w), contiguous
        Is written.
    rows : slice
        The n rows among the b·H_out of all images together.
    """
    if not numba_enabled():
        columns_numpy(x, out, rows, H_out, kernel, stride, padding, dilation)
        return
    place = (*kernel, *stride, padding[0][0], padding[1][0], *dilation)
    _columns.alone(len(out), x, out, rows.start, H_out, *place)


def columns_numpy(
    x: np.ndarray,
    out: np.ndarray,
    rows: slice,
    H_out: int,
    kernel: Pair,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
) -> None:
    """NumPy twin of :func:`columns`."""
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    patches = out.reshape(*out.shape[:2], x.shape[3], *kernel)  # (n, W_out, C, k_h, k_w)
    across = np.arange(out.shape[1])[:, None] * stride[1] + np.arange(kernel[1]) * dilation[1]  # (W_out, k_w)
    for n in range(len(out)):
        b, h = divmod(rows.start + n, H_out)
        for p in range(kernel[0]):
            patches[n, :, :, p] = padded[b, h * stride[0] + p * dilation[0]][across].transpose(0, 2, 1)


@Loops
def _columns(start, stop, x, out, first_row, H_out, k_h, k_w, s_h, s_w, top, left, d_h, d_w):  # type: ignore[no-untyped-def]
    _, H, W, C = x.shape
    W_out = out.shape[1]
    for n in range(start, stop):
        b, h = (first_row + n) // H_out, (first_row + n) % H_out
        row = h * s_h - top
        for w in range(W_out):
            place, column, i = out[n, w], w * s_w - left, 0
            if row >= 0 and column >= 0 and row + (k_h - 1) * d_h < H and column + (k_w - 1) * d_w < W:
                for c in range(C):
                    for p in range(k_h):
                        for q in range(k_w):
                            place[i] = x[b, row + p * d_h, column + q * d_w, c]
                            i += 1
                continue
            for c in range(C):
                for p in range(k_h):
                    for q in range(k_w):
                        y, z = row + p * d_h, column + q * d_w
                        place[i] = x[b, y, z, c] if y >= 0 and y < H and z >= 0 and z < W else 0
                        i += 1
