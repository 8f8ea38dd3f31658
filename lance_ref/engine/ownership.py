"""Whether an array may be written into because nobody else can see it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def _references(array: Any) -> int:
    return sys.getrefcount(array)


def _of_a_local() -> int:
    """References that :func:`_references` sees of an array that one local variable names."""
    array = np.empty(1)
    return _references(array)


def _of_a_base() -> int:
    """References to the memory of an array that is a look at it."""
    view = np.empty(2)[:1]
    return sys.getrefcount(view.base)


_ONE, _OF_BASE = _of_a_local(), _of_a_base()


def alone(array: Any, *, others: int = 0) -> bool:
    """Whether one local variable of the caller, and ``others`` that it knows of, are all that refer to an array.

    Then nobody else can notice what is written into it. What is a look at all of another array counts as well, if that
    is all that refers to the other one. False where it cannot be said: subclasses of arrays, memory that is not
    NumPy's, read-only arrays (among them those that repeat an element), a debugger that holds the variables.

    >>> x = np.zeros(3)
    >>> alone(x), alone(x[:2])
    (True, False)
    >>> y = x
    >>> alone(x), alone(x, others=1)
    (False, True)
    """
    if type(array) is not np.ndarray or not array.flags.writeable or sys.getrefcount(array) != _ONE + others:
        return False
    if array.base is None:
        return True
    if type(array.base) is not np.ndarray or array.base.base is not None or not array.base.flags.writeable:
        return False
    # A look at a part, or backwards, does not lie in memory as a new array would.
    whole = array.nbytes == array.base.nbytes and min(array.strides, default=0) >= 0
    return whole and sys.getrefcount(array.base) == _OF_BASE


def has_own_memory(array: Any) -> bool:
    """Whether an array's memory is its own: no look at another array, or at one that nothing else refers to.

    Of the latter only a packed one counts, as a copy of it would be.
    """
    if array.base is None:
        return True
    if type(array.base) is not np.ndarray or array.base.base is not None or array.nbytes != array.base.nbytes:
        return False
    return bool(array.flags.carray) and sys.getrefcount(array.base) == _OF_BASE


def lie_alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have one shape and one dtype, and lie in memory the same way."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.strides == b.strides or all(
        n == 1 or i == j for n, i, j in zip(a.shape, a.strides, b.strides, strict=True)
    )
