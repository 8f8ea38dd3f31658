"""Spans and taps: which part of a map an operation reads in order to write another part.

A span is a half-open range of rows and one of columns of a map. A tile of an operation's output needs a span of its
input that is larger by a halo; outside of the true image there are zeros.
"""

from __future__ import annotations

from functools import cache

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


def union(a: Span, b: Span) -> Span:
    """The smallest span that holds both."""
    rows, columns = ((min(x[0], y[0]), max(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return rows, columns


def needed(window: Window, span: Span, size: Pair) -> Span:
    """The span of an input of height and width ``size`` that a span of the output is computed from.

    >>> needed(Window((3, 3), (2, 2), (1, 1), (1, 1)), ((0, 2), (2, 4)), (8, 8))
    ((0, 4), (3, 8))
    """
    ends = []
    for axis, n in enumerate(size):
        first, end = span[axis]
        stride, before = window.stride[axis], window.before[axis]
        low = first * stride - before
        high = (end - 1) * stride - before + window.dilation[axis] * (window.kernel[axis] - 1) + 1
        low = min(max(low, 0), n - 1)
        ends.append((low, max(min(high, n), low + 1)))
    return ends[0], ends[1]


@cache
def taps(window: Window, output: Span, source: Span) -> tuple[Tap, ...]:
    """For each place of the kernel: the places of the output that see the input there, and what they see.

    Places are counted from the start of the spans. What would be read outside of ``source`` is padding, and is left out.

    >>> taps(Window((1, 2), before=(0, 1)), ((0, 1), (0, 3)), ((0, 1), (0, 3)))[0]
    (0, 0, (slice(0, 1, None), slice(1, 3, None)), (slice(0, 1, 1), slice(0, 2, 1)))
    """
    found = []
    for p in range(window.kernel[0]):
        rows = _one_axis(window, 0, p, output[0], source[0])
        for q in range(window.kernel[1]):
            columns = _one_axis(window, 1, q, output[1], source[1])
            if rows and columns:
                found.append((p, q, (rows[0], columns[0]), (rows[1], columns[1])))
    return tuple(found)


def _one_axis(window: Window, axis: int, place: int, output: Pair, source: Pair) -> tuple[slice, slice] | None:
    stride = window.stride[axis]
    start = output[0] * stride - window.before[axis] + place * window.dilation[axis] - source[0]
    count, available = output[1] - output[0], source[1] - source[0]
    first = max(0, -(start // stride))
    end = min(count, (available - 1 - start) // stride + 1)
    if end <= first:
        return None
    low = start + first * stride
    return slice(first, end), slice(low, low + (end - first - 1) * stride + 1, stride)
