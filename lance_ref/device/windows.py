"""Spans and taps: which part of a map an operation reads in order to write another part.

A span is a half-open range of rows and one of columns of a map. A tile of an operation's output needs a span of its
input that is larger by a halo; outside of the true image there are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from lance_ref.device.graph import Pair, Window

Span = tuple[Pair, Pair]
"""((first row, end), (first column, end))"""
Tap = tuple[int, int, tuple[slice, slice], tuple[slice, slice]]
"""Row and column in the kernel, and what it reads and writes: places of the output, places of the input."""


def whole(size: Pair) -> Span:
    """The span of a whole map of height and width ``size``."""
    return (0, size[0]), (0, size[1])


def size_of(span: Span) -> Pair:
    """Height and width.

    >>> size_of(((2, 5), (0, 4)))
    (3, 4)
    """
    return span[0][1] - span[0][0], span[1][1] - span[1][0]


def needed(window: Window, axis: int, ends: Pair, n: int) -> Pair:
    """Along one axis, the part of an input of ``n`` places that a part of the output is computed from.

    >>> needed(Window((3, 3), (2, 2), (1, 1), (1, 1)), 0, (2, 4), 8)
    (3, 8)
    """
    stride, before = window.stride[axis], window.before[axis]
    low = ends[0] * stride - before
    high = (ends[1] - 1) * stride - before + window.dilation[axis] * (window.kernel[axis] - 1) + 1
    low = min(max(low, 0), n - 1)
    return low, max(min(high, n), low + 1)


@dataclass(frozen=True)
class Reach:
    """How one part of a map is computed from one part of another.

    Attributes
    ----------
    window : Window
    start : pair of int
        Where the kernel begins for the first place that is written, in the part that is read; negative in the padding.
    size : pair of int
        Of the part that is written.
    available : pair of int
        Of the part that is read.
    """

    window: Window
    start: Pair
    size: Pair
    available: Pair

    @cached_property
    def taps(self) -> tuple[Tap, ...]:
        """The places that each place of the kernel writes, and what they see there; padding is left out.

        >>> reach(Window((1, 2), before=(0, 1)), ((0, 1), (0, 3)), ((0, 1), (0, 3))).taps[0]
        (0, 0, (slice(0, 1, None), slice(1, 3, None)), (slice(0, 1, 1), slice(0, 2, 1)))
        """
        rows, columns = ([self._tap(axis, p) for p in range(self.window.kernel[axis])] for axis in (0, 1))
        return tuple(
            (p, q, (row[0], column[0]), (row[1], column[1]))
            for p, row in enumerate(rows)
            for q, column in enumerate(columns)
            if row is not None and column is not None
        )

    def _tap(self, axis: int, place: int) -> tuple[slice, slice] | None:
        stride = self.window.stride[axis]
        start = self.start[axis] + place * self.window.dilation[axis]
        first = max(0, -(start // stride))
        end = min(self.size[axis], (self.available[axis] - 1 - start) // stride + 1)
        if end <= first:
            return None
        low = start + first * stride
        return slice(first, end), slice(low, low + (end - first - 1) * stride + 1, stride)

    def seen(self, x: np.ndarray) -> np.ndarray:
        """What every place sees: (..., h, w, k_h, k_w) of maps (..., rows, columns), zero in the padding."""
        if self.window.kernel == (1, 1) and min(self.start) >= 0:
            (rows, columns) = (slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(
                self.start, self.size, self.window.stride, strict=True))  # fmt: skip
            return x[..., rows, columns, None, None]
        ends = [
            a + (n - 1) * s + d * (k - 1) + 1
            for a, n, s, d, k in zip(
                self.start, self.size, self.window.stride, self.window.dilation, self.window.kernel, strict=True
            )
        ]
        padded = np.zeros((*x.shape[:-2], ends[0] - self.start[0], ends[1] - self.start[1]), x.dtype)
        inside, outside = [], []
        for axis in (0, 1):
            low, high = max(self.start[axis], 0), min(ends[axis], self.available[axis])
            inside.append(slice(low, max(high, low)))
            outside.append(slice(low - self.start[axis], max(high, low) - self.start[axis]))
        padded[..., outside[0], outside[1]] = x[..., inside[0], inside[1]]
        (s_h, s_w), (d_h, d_w) = self.window.stride, self.window.dilation
        by, bx = padded.strides[-2:]
        return np.lib.stride_tricks.as_strided(
            padded,
            (*x.shape[:-2], *self.size, *self.window.kernel),
            (*padded.strides[:-2], by * s_h, bx * s_w, by * d_h, bx * d_w),
            writeable=False,
        )


@cache
def reach(window: Window, output: Span, source: Span) -> Reach:
    """How the span ``output`` of a map is computed from the span ``source`` of another."""
    start = tuple(output[axis][0] * window.stride[axis] - window.before[axis] - source[axis][0] for axis in (0, 1))
    return Reach(window, start, size_of(output), size_of(source))  # type: ignore[arg-type]
