"""Laying out patches as columns ("im2col") and its transpose ("col2im"): loops beside their NumPy twins.

See :mod:`lance_ref.algebra.kernels.threads` for the rules of the house.
"""

from __future__ import annotations

import numpy as np

from lance_ref.algebra.kernels.threads import Loops, Padding, Pair, numba_enabled


def lay_out(
    x: np.ndarray, columns: np.ndarray, rows: slice, stride: Pair, padding: Padding, dilation: Pair, first: int = 0
) -> None:
    """Write down what each place of a convolution's output sees of the images.

    Parameters
    ----------
    x : (b, C, H, W)
    columns : (c, k_h, k_w, b, l_rows, W_out), contiguous
        ``columns[c, p, q, b, h, w] = x[b, first + c, s·h + d·p − top, s·w + d·q − left]``, and zero where that lies in
        the padding.
    rows : slice
        The output rows of ``columns``, with both ends given.
    stride, dilation : pair of int
    padding : ((top, bottom), (left, right))
    first : int
        The first channel of ``columns``.
    """
    if not numba_enabled():
        lay_out_numpy(x, columns, rows, stride, padding, dilation, first)
        return
    (top, _), (left, _) = padding
    flat = np.ascontiguousarray(x)
    _lay_out.run(len(columns), columns.size, flat, columns, first, rows.start, *stride, top, left, *dilation)


def lay_out_numpy(
    x: np.ndarray, columns: np.ndarray, rows: slice, stride: Pair, padding: Padding, dilation: Pair, first: int = 0
) -> None:
    """NumPy twin of :func:`lay_out`."""
    C, k_h, k_w, _, n, W_out = columns.shape
    s_h, s_w = stride
    padded = np.pad(x[:, first : first + C], [(0, 0), (0, 0), *padding])
    for p in range(k_h):
        h = p * dilation[0] + rows.start * s_h
        for q in range(k_w):
            w = q * dilation[1]
            window = padded[:, :, h : h + s_h * (n - 1) + 1 : s_h, w : w + s_w * (W_out - 1) + 1 : s_w]
            columns[:, p, q] = window.transpose(1, 0, 2, 3)


@Loops
def _lay_out(start, stop, x, columns, channel, first, s_h, s_w, top, left, d_h, d_w):  # type: ignore[no-untyped-def]
    _, k_h, k_w, B, n, W_out = columns.shape
    C, H, W = x.shape[1:]
    source, target = x.reshape(-1), columns.reshape(-1)
    zero = x.dtype.type(0)
    step = np.uintp(s_w)
    for c in range(start, stop):
        for p in range(k_h):
            for q in range(k_w):
                offset = q * d_w - left
                low = min(W_out, max(0, (s_w - 1 - offset) // s_w))  # places that look into the image: low <= w < high
                high = max(low, min(W_out, (W - 1 - offset) // s_w + 1))
                before, count, width = np.uintp(low), np.uintp(high - low), np.uintp(W_out)
                for b in range(B):
                    place = (((c * k_h + p) * k_w + q) * B + b) * n
                    known = 0
                    if p > 0 and s_h == d_h:  # the row of places below sees what this one saw through the row above
                        known = n - 1
                        at, to = np.uintp((place - k_w * B * n + 1) * W_out), np.uintp(place * W_out)
                        for i in range(np.uintp(known * W_out)):
                            target[to + i] = target[at + i]
                    for h in range(known, n):
                        line = (first + h) * s_h + p * d_h - top
                        to = np.uintp((place + h) * W_out)
                        if line < 0 or line >= H:
                            for w in range(width):
                                target[to + w] = zero
                            continue
                        # unsigned: a negative index would count from the end, and each would be looked at for that
                        at = np.uintp(((b * C + channel + c) * H + line) * W + low * s_w + offset)
                        for w in range(before):
                            target[to + w] = zero
                        to += before
                        if s_w == 1:
                            for w in range(count):
                                target[to + w] = source[at + w]
                        else:
                            for w in range(count):
                                target[to + w] = source[at + w * step]
                        to += count
                        for w in range(width - before - count):
                            target[to + w] = zero


def add_columns(
    columns: np.ndarray, images: np.ndarray, rows: slice, stride: Pair, padding: Padding, dilation: Pair
) -> None:
    """Add each column, one place of a convolution's output, to the patch that the place sees.

    Parameters
    ----------
    columns : (C, k_h, k_w, b, l_rows, W_out), contiguous
        For the output rows ``rows``.
    images : (b, C, H, W), contiguous
        ``images[b, c, s·h + d·p − top, s·w + d·q − left] += columns[c, p, q, b, h, w]``; what would fall into the
        padding is dropped.
    rows : slice
        With both ends given.
    stride, dilation : pair of int
    padding : ((top, bottom), (left, right))
    """
    if not numba_enabled():
        add_columns_numpy(columns, images, rows, stride, padding, dilation)
        return
    (top, _), (left, _) = padding
    _add_columns.run(len(columns), columns.size, columns, images, rows.start, *stride, top, left, *dilation)


def add_columns_numpy(
    columns: np.ndarray, images: np.ndarray, rows: slice, stride: Pair, padding: Padding, dilation: Pair
) -> None:
    """NumPy twin of :func:`add_columns`."""
    _, k_h, k_w, _, n, W_out = columns.shape
    (s_h, s_w), ((top, bottom), (left, right)) = stride, padding
    padded = np.pad(images, ((0, 0), (0, 0), (top, bottom), (left, right)))
    for p in range(k_h):
        h = rows.start * s_h + p * dilation[0]
        for q in range(k_w):
            w = q * dilation[1]
            window = padded[:, :, h : h + s_h * (n - 1) + 1 : s_h, w : w + s_w * (W_out - 1) + 1 : s_w]
            window += columns[:, p, q].transpose(1, 0, 2, 3)
    images[:] = padded[:, :, top : top + images.shape[2], left : left + images.shape[3]]


@Loops
def _add_columns(start, stop, columns, images, first, s_h, s_w, top, left, d_h, d_w):  # type: ignore[no-untyped-def]
    C, k_h, k_w, B, n, W_out = columns.shape
    H, W = images.shape[2:]
    source, target = columns.reshape(-1), images.reshape(-1)
    step = np.uintp(s_w)
    for c in range(start, stop):
        for p in range(k_h):
            for q in range(k_w):
                shift = q * d_w - left
                low = min(W_out, max(0, (s_w - 1 - shift) // s_w))  # places that look into the image: low <= w < high
                high = max(low, min(W_out, (W - 1 - shift) // s_w + 1))
                count = np.uintp(high - low)
                for b in range(B):
                    for h in range(n):
                        row = (first + h) * s_h + p * d_h - top
                        if row < 0 or row >= H:
                            continue
                        # unsigned: a negative index would count from the end, and each would be looked at for that
                        at = np.uintp(((((c * k_h + p) * k_w + q) * B + b) * n + h) * W_out + low)
                        to = np.uintp(((b * C + c) * H + row) * W + low * s_w + shift)
                        if s_w == 1:
                            for w in range(count):
                                target[to + w] += source[at + w]
                        else:
                            for w in range(count):
                                target[to + w * step] += source[at + w]
