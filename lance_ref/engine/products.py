"""Products of matrices as NumPy makes them, shared out to threads, and with the warnings that their results deserve.

None of it counts: :mod:`lance_ref.engine.counting` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lance_ref.engine.state import state
from lance_ref.engine.workers import blas_alone, product_threads, share_out

ALONE_MACS = 1 << 18
"""Multiply-adds up to which OpenBLAS wakes no thread of its own anyway."""
SHARED_MACS = 1 << 22
"""Multiply-adds from which a product is shared out; of fewer, one thread makes it in less time than two begin."""


def product(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """``np.matmul(a, b, out)``, in as many threads as there are where it is large.

    NumPy's warning of an invalid value or an overflow comes only where the result has one
    (:func:`undeserved_flags_ignored`).
    """
    if a.size * b.size <= ALONE_MACS or a.ndim < 2 or b.ndim < 2:  # no fewer than its multiply-adds
        state.flagged = False
        result = _noting_flags(np.matmul, a, b, out)
        return result if not state.flagged or np.isfinite(result).all() else np.matmul(a, b, out)
    macs = max(a.size * b.shape[-1], b.size * a.shape[-2])
    if macs <= ALONE_MACS or a.dtype != b.dtype or _is_square(a, b):
        return undeserved_flags_ignored(np.matmul, a, b, out)
    parts = product_threads() if macs >= SHARED_MACS else 1
    with blas_alone:
        if parts == 1:
            return undeserved_flags_ignored(np.matmul, a, b, out)
        return _in_parts(parts, a, b, out)


def _is_square(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether the product is A Aᵀ, of which BLAS computes a half, and NumPy copies it into the other."""
    same_memory = b.base is a or (a.base is not None and (a.base is b.base or a.base is b))
    return same_memory and a.ndim == b.ndim == 2 and a.shape == b.shape[::-1] and a.strides == b.strides[::-1]


def _in_parts(parts: int, a: np.ndarray, b: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    """The product cut along the batch, or along the rows or columns of its matrices, whichever are more."""
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    m, n = a.shape[-2], b.shape[-1]
    result: np.ndarray = np.empty((*batch, m, n), a.dtype) if out is None else out
    flagged: list[bool] = []
    if batch and batch[0] >= parts:
        whole = [x.ndim < result.ndim or len(x) == 1 for x in (a, b)]  # the same for all of the batch

        def part(start: int, stop: int) -> None:
            own = [x if alike else x[start:stop] for x, alike in zip((a, b), whole, strict=True)]
            flagged.append(_flags(np.matmul, *own, result[start:stop]))

        share_out(parts, batch[0], part)
    elif m >= n:
        share_out(parts, m, lambda i, j: flagged.append(_flags(np.matmul, a[..., i:j, :], b, result[..., i:j, :])))
    else:
        share_out(parts, n, lambda i, j: flagged.append(_flags(np.matmul, a, b[..., i:j], result[..., i:j])))
    if any(flagged) and not np.isfinite(result).all():
        return np.matmul(a, b, result)  # again, for whatever the caller's np.errstate asks for
    return result


# ---- flags -----------------------------------------------------------------------------------


def undeserved_flags_ignored(made_by: Callable[..., np.ndarray], *args: Any) -> np.ndarray:
    """``made_by(...)``, with NumPy's warning of an invalid value or an overflow only where the result has one.

    BLAS kernels also multiply what happens to lie in the unused lanes of a vector register. That never
    reaches the result, but it raises the processor's floating-point flags now and then, and NumPy then
    warns of a result in which every element is right.
    """
    state.flagged = False
    result = _noting_flags(made_by, *args)
    if state.flagged and not np.isfinite(result).all():
        return made_by(*args)  # again, for whatever the caller's np.errstate asks for
    return result


def _flags(made_by: Callable[..., np.ndarray], *args: Any) -> bool:
    """Make it, and say whether a flag was raised in the thread that does."""
    state.flagged = False
    _noting_flags(made_by, *args)
    return state.flagged


def _note_flag(error: str, flags: int) -> None:
    state.flagged = True


@np.errstate(invalid="call", over="call", call=_note_flag)
def _noting_flags(made_by: Callable[..., np.ndarray], *args: Any) -> np.ndarray:
    return made_by(*args)
