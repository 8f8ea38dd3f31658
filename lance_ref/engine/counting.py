"""Counting the multiply-adds that really ran.

Every matrix product of the library goes through :func:`matmul`, and every loop
kernel reports its own size through :func:`add`. Nothing here predicts anything:
the predictions live in ``analysis/`` and know nothing of this file.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from lance_ref.engine.products import product, undeserved_flags_ignored
from lance_ref.engine.state import state

KINDS = ("forward", "grad_input", "grad_weight", "projection", "decomposition", "recompute", "calibration")
"""What a multiply-add can be spent on. Decomposition: finding directions anew within a training step.
Recompute: the forward pass of a segment run again in the backward pass."""


class MacCounter:
    """Multiply-adds by layer path and kind.

    Attributes
    ----------
    macs : dict
        ``macs[path, kind]`` is the number of multiply-adds that layer ``path``
        spent on ``kind`` (one of :data:`KINDS`). One multiply-add = 2 FLOPs.
    """

    def __init__(self) -> None:
        self.macs: MutableMapping[tuple[str, str], int] = defaultdict(int)

    def by_kind(self) -> dict[str, int]:
        """Multiply-adds summed over layers, one entry for each of :data:`KINDS`."""
        totals = dict.fromkeys(KINDS, 0)
        for (_, kind), macs in self.macs.items():
            totals[kind] += macs
        return totals

    def by_layer(self, path: str) -> dict[str, int]:
        """Multiply-adds of one layer, one entry for each of :data:`KINDS`."""
        return {kind: self.macs.get((path, kind), 0) for kind in KINDS}


@contextmanager
def count_macs() -> Iterator[MacCounter]:
    """Count the multiply-adds executed inside the ``with`` block.

    >>> import numpy as np
    >>> with count_macs() as counter:
    ...     _ = matmul(np.ones((2, 3)), np.ones((3, 5)))
    >>> counter.by_kind()["forward"]
    30
    """
    counter = MacCounter()
    previous, state.counter = state.counter, counter
    try:
        yield counter
    finally:
        state.counter = previous


class spending_on:  # noqa: N801  (it is called like a function)
    """Book the multiply-adds of the ``with`` block under ``kind`` (one of :data:`KINDS`).

    It is entered three times a layer and step, and a class takes a third of a generator's time.
    """

    __slots__ = ("kind", "previous")

    def __init__(self, kind: str) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}, expected one of {KINDS}")
        self.kind = kind

    def __enter__(self) -> None:
        self.previous, state.kind = state.kind, self.kind

    def __exit__(self, *exception: object) -> None:
        state.kind = self.previous


def add(macs: int) -> None:
    """Report ``macs`` executed multiply-adds (for loops that are not a matrix product)."""
    if state.counter is not None:
        state.counter.macs[state.path, state.kind] += macs


def eigh_macs(n: int) -> int:
    """Nominal multiply-adds of all eigenvalues and eigenvectors of a symmetric (n, n) matrix.

    LAPACK's own work cannot be counted from here; 9 n³ FLOPs is the usual figure for the symmetric QR
    algorithm with vectors (Golub & Van Loan, Matrix Computations, section 8.3).
    """
    return 9 * n**3 // 2


def qr_macs(n: int, r: int) -> int:
    """Nominal multiply-adds of the thin QR decomposition of an (n, r) matrix, n ≥ r, by Householder reflections.

    2 n r² − ⅔ r³ FLOPs for R and as many for Q (Golub & Van Loan, section 5.2).
    """
    return (6 * n * r**2 - 2 * r**3) // 3


def matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """``np.matmul`` that counts: (..., m, k) @ (..., k, n) is batch * m * k * n multiply-adds."""
    result = product(a, b, out)
    if state.counter is not None:
        add(result.size * a.shape[-1])
    return result


def tensordot(a: np.ndarray, b: np.ndarray, axes: Any) -> np.ndarray:
    """``np.tensordot`` that counts: result.size * (product of the contracted sizes)."""
    result = undeserved_flags_ignored(np.tensordot, a, b, axes)
    if state.counter is not None:
        contracted = range(a.ndim)[-axes:] if isinstance(axes, int) else np.atleast_1d(axes[0])
        add(result.size * math.prod(a.shape[axis] for axis in contracted))
    return result
