"""The arrays of a step: how they lie in memory, and what NumPy takes to make one from others.

An elementwise formula runs in blocks of :data:`BLOCK` elements, or in pieces cut along an axis. Its temporaries are
those of a block, and NumPy copies to a buffer what it cannot go through in one stretch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from analysis.rules.layouts import Layout, Shape, Storage, packed_strides
from analysis.rules.op_cost import Call
from lance_ref.engine.blocks import BLOCK_ELEMENTS as BLOCK
from lance_ref.engine.blocks import pieces

REUSED_BYTES = 256 * 1024
"""From this size on NumPy writes the result of ``(a * b) + c`` into the temporary ``a * b``."""

UFUNC_BUFFER = 8192
"""Elements of a buffer of NumPy's, at most, one for each operand that is not contiguous or is repeated."""


def new(shape: Shape, itemsize: int, *like: Layout) -> Layout:
    """An array of its own, packed; its axes in memory in the order of those of ``like``, else in C order."""
    order = order_of(like) if like and all(len(x.shape) == len(shape) for x in like) else None
    return Layout(Storage(math.prod(shape) * itemsize), tuple(shape), packed_strides(shape, order))


def like_input(call: Call, position: int = 0) -> Layout:
    """A new array of an input's shape, in C order."""
    return new(call.record.inputs[position].shape, call.itemsize)


def is_packed(layout: Layout) -> bool:
    """Whether the array lies in memory in C order without gaps."""
    pairs = zip(layout.shape, layout.strides, packed_strides(layout.shape), strict=True)
    return 0 in layout.shape or all(n == 1 or have == want for n, have, want in pairs)


def packing(layout: Layout, itemsize: int) -> int:
    """Bytes of the copy that a loop over packed arrays needs; 0 for a packed one."""
    return 0 if is_packed(layout) else math.prod(layout.shape) * itemsize


def reshaping(layout: Layout, shape: Shape, itemsize: int) -> int:
    """Bytes of the copy that a reshape makes; 0 where it is a view."""
    return 0 if layout.reshaped(shape) is not None else math.prod(shape) * itemsize


def in_blocks(call: Call, small: float, large: float, *operands: Layout) -> int:
    """Bytes of an elementwise formula's temporaries, its result aside.

    Parameters
    ----------
    small, large : float
        Arrays at a time, of the whole array if it is small, of a block if a block is large enough to be written into
        again (:data:`REUSED_BYTES`); else of a block one more than of a small array, whose result is one of them.
    operands : Layout
        Of the formula. In blocks some of them are copied, see :func:`blocks`.
    """
    if call.n_in <= BLOCK and len({x.shape for x in operands}) == 1:
        return int(small * call.n_in * call.itemsize)
    elements, copied = blocks(operands, BLOCK)
    nbytes = elements * call.itemsize
    return int(((large if nbytes >= REUSED_BYTES else small + 1) + copied) * nbytes)


def blocks(operands: Sequence[Layout], most: int) -> tuple[int, int]:
    """How NumPy goes through arrays in blocks: (elements of a block, operands that it copies to a buffer).

    Axes that lie in memory in one stretch in all operands are one. A block is made of as many of the innermost axes
    as ``most`` elements allow, and then those are copied that are not in one stretch there; but of fewer if it does not
    grow by as much as it costs more.
    """
    shape = np.broadcast_shapes(*(x.shape for x in operands))
    order = order_of([spread_to(x, shape) for x in operands])
    spread = [spread_to(x, shape).permuted(order) for x in operands]
    sizes = [n for n in spread[0].shape if n != 1] or [1]
    strides = [[s for n, s in zip(x.shape, x.strides, strict=True) if n != 1] or [1] for x in spread]
    for i in reversed(range(len(sizes) - 1)):  # axis i and the one inside of it
        if all(steps[i] == sizes[i + 1] * steps[i + 1] for steps in strides):
            sizes[i : i + 2] = [sizes[i] * sizes[i + 1]]
            for steps in strides:
                del steps[i]
    found = cost = elements = 1  # of a block; its cost is one more for each operand that is copied
    for axis in reversed(range(len(sizes))):
        n = min(sizes[axis], max(most // elements, 1))
        elements *= n
        inner = (n, *sizes[axis + 1 :])
        stretches = [
            Layout(x.storage, inner, tuple(s[axis:])).reshaped((elements,))
            for x, s in zip(spread, strides, strict=True)
        ]
        copied = sum(stretch is None for stretch in stretches)
        if elements * cost >= found * (1 + copied):
            found, cost = elements, 1 + copied
        if n < sizes[axis]:
            break
    return found, cost - 1


def order_of(operands: Sequence[Layout]) -> list[int]:
    """Axes from the slowest to the fastest, as NumPy chooses them for a result: C order where operands disagree."""

    def compare(first: int, second: int) -> int:
        pairs = [
            (abs(x.strides[first]), abs(x.strides[second]))
            for x in operands
            if 1 not in (x.shape[first], x.shape[second])
        ]
        known = [(a, b) for a, b in pairs if a and b]
        return 1 if known and all(a < b for a, b in known) else -1

    order: list[int] = []
    for axis in range(len(operands[0].shape)):
        place = len(order)
        while place and compare(order[place - 1], axis) > 0:
            place -= 1
        order.insert(place, axis)
    return order


def spread_to(layout: Layout, shape: Shape) -> Layout:
    """The same memory repeated to ``shape`` by broadcasting."""
    lead = len(shape) - len(layout.shape)
    kept = zip(layout.shape, shape[lead:], layout.strides, strict=True)
    return Layout(layout.storage, shape, (*[0] * lead, *(s if n == m else 0 for n, m, s in kept)))


def piece(shape: Shape, whole: Collection[int], itemsize: int) -> int:
    """Bytes of the first, and largest, piece into which the library cuts an array, not along the axes in ``whole``.

    A slice of the longest axis may be more than a block: it is the least that can be cut off.

    >>> piece((1 << 14, 5), [0], 4), piece((1 << 14, 1 << 6), [1], 4)  # 4 columns; 1024 rows
    (262144, 262144)
    """
    first = next(pieces(shape, whole), ())  # of the axis that is cut, and whole axes before it
    cut = [part.stop - (part.start or 0) if part.stop else n for part, n in zip(first, shape, strict=False)]
    return math.prod((*cut, *shape[len(cut) :])) * itemsize


def division_buffer(elements: int) -> int:
    """Bytes of NumPy's buffers where a mean divides many sums by an integer: of sums, counts and results."""
    return 16 * min(elements, UFUNC_BUFFER) if elements > 1 else 0


def temporaries(nbytes: int) -> int:
    """Bytes of the temporaries of a formula of two signs on whole arrays: large ones are written into again."""
    return nbytes if nbytes >= REUSED_BYTES else 2 * nbytes
