"""Element-wise formulas, a block of elements at a time.

A formula such as x·Φ(x) + x·φ(x) makes an array for every sign in it. In blocks these temporaries stay in the
cache and take some hundred kilobytes, whatever the size of the arrays; the numbers are the same, bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

BLOCK_ELEMENTS = 1 << 16
"""Elements of a block."""
FEW_ELEMENTS = 1 << 13
"""Of an array the sum of whose squares BLAS makes in one thread."""


def blockwise(formula: Callable[..., Any], *arrays: np.ndarray, over: np.ndarray | None = None) -> np.ndarray:
    """``formula(*arrays)`` for an element-wise formula.

    Parameters
    ----------
    formula : callable
        From arrays of one shape to an array of that shape, element by element.
    arrays : arrays of one dtype
        Shapes that broadcast.
    over : array, optional
        One of ``arrays``, of the result's shape, that may be written over, and is where the arrays are large.

    Returns
    -------
    ``over``, or a new array, in the dtype of ``arrays``, its axes in memory in the order of theirs.

    Examples
    --------
    >>> blockwise(lambda x, y: x * y + 1, np.ones((2, 3)), np.full(3, 2.0)).tolist()
    [[3.0, 3.0, 3.0], [3.0, 3.0, 3.0]]
    """
    if max(array.size for array in arrays) <= BLOCK_ELEMENTS and len({array.shape for array in arrays}) == 1:
        return np.asarray(formula(*arrays))
    access = [*[["readonly"] for _ in arrays], ["writeonly", *["allocate"] * (over is None)]]
    nditer: Any = np.nditer  # its stub knows no list of flags
    blocks = nditer([*arrays, over], ["external_loop", "buffered", "zerosize_ok"], access, buffersize=BLOCK_ELEMENTS)
    with blocks:
        for *parts, out in blocks:
            out[...] = formula(*parts)
        result: np.ndarray = blocks.operands[-1]
    return result


def stretches(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Looks at the same elements of arrays of one shape, at most a block of them at a time, to read and to write.

    >>> [[part.size for part in parts] for parts in stretches(np.zeros((9, 1 << 13)), np.ones((9, 1 << 13)))]
    [[65536, 65536], [8192, 8192]]
    """
    first = arrays[0]
    if first.size <= BLOCK_ELEMENTS:
        yield arrays
    elif all(array.flags.c_contiguous for array in arrays):
        flat = [array.reshape(-1) for array in arrays]
        for start in range(0, first.size, BLOCK_ELEMENTS):
            yield tuple(array[start : start + BLOCK_ELEMENTS] for array in flat)
    else:
        for part in pieces(first.shape, ()):
            yield tuple(array[part] for array in arrays)


def all_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite.

    >>> all_finite(np.array([1e30, -1e30], np.float32)), all_finite(np.array([0, np.inf]))
    (True, False)
    """
    if array.size <= FEW_ELEMENTS and math.isfinite(np.vdot(array, array)):  # of few, in one call of NumPy
        return True
    return all(np.isfinite(part).all() for (part,) in stretches(array))


def pieces(shape: Sequence[int], whole: Collection[int]) -> Iterator[tuple[slice, ...]]:
    """Indices that cut an array along its longest axis, those in ``whole`` aside, into pieces of at most a block.

    >>> [index[1] for index in pieces((1 << 14, 5), whole=[0])]
    [slice(0, 4, None), slice(4, 5, None)]
    """
    axis = max((i for i in range(len(shape)) if i not in whole), key=lambda i: shape[i], default=None)
    if axis is None:
        yield ()
        return
    n = shape[axis]
    step = max(1, BLOCK_ELEMENTS * n // max(math.prod(shape), 1))
    before = (slice(None),) * axis
    for start in range(0, n, step):
        yield (*before, slice(start, min(start + step, n)))
