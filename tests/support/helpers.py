"""Checkers that the tests share: gradients against differences, and memory against the tape's report."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from lance_ref import Tensor, no_grad, tape
from lance_ref.engine.tape_report import TapeReport

STEP = 1e-5
"""Of the central differences: their error is about STEP² from the curve and 1e-16 / STEP from rounding."""

Op = Callable[..., Tensor]


def check_vjp(function: Op, *arrays: np.ndarray, rtol: float = 1e-6, seed: int = 98765) -> None:
    """Compare every entry of every input's gradient with central differences of ⟨v, f(x)⟩, v random.

    The gradients are taken twice: for all inputs at once, and for each input alone, since an
    operation may keep less when fewer gradients are needed.

    Parameters
    ----------
    function : callable
        Of as many tensors as there are arrays; the same result whenever it is called.
    arrays : float64 arrays
        Where to take the gradient; not within ``STEP`` of a kink.
    rtol : float
        Of each entry; entries below ``rtol`` times the largest one are compared with that.
    """
    for array in arrays:
        assert array.dtype == np.float64, "differences need float64"
    rng = np.random.default_rng(seed)  # not the one the arrays come from: v = x would be a special case
    v = rng.standard_normal(function(*map(Tensor, arrays)).shape)
    numeric = [central_differences(function, arrays, i, v) for i in range(len(arrays))]
    for wanted in [range(len(arrays)), *([i] for i in range(len(arrays)))]:
        tensors = [Tensor(array.copy(), requires_grad=i in wanted) for i, array in enumerate(arrays)]
        function(*tensors).backward(v)
        for i, tensor in enumerate(tensors):
            if i not in wanted:
                assert tensor.grad is None, f"input {i} got a gradient that nobody asked for"
                continue
            assert isinstance(tensor.grad, np.ndarray), f"input {i} has no gradient"
            assert tensor.grad.shape == arrays[i].shape
            assert tensor.grad.dtype == np.float64
            largest = np.abs(numeric[i]).max(initial=0)
            np.testing.assert_allclose(tensor.grad, numeric[i], rtol=rtol, atol=1e-3 * rtol * (1 + largest))


def central_differences(function: Op, arrays: tuple[np.ndarray, ...], which: int, v: np.ndarray) -> np.ndarray:
    """d⟨v, f⟩ / d arrays[which], entry by entry."""
    arrays = tuple(array.copy() for array in arrays)
    moved = arrays[which]
    gradient = np.empty_like(moved)
    with no_grad():
        for entry in np.ndindex(moved.shape):
            value = moved[entry]
            moved[entry] = value + STEP
            above = function(*map(Tensor, arrays)).data.copy()  # it may look at the very array that is moved
            moved[entry] = value - STEP
            below = function(*map(Tensor, arrays)).data.copy()
            moved[entry] = value
            gradient[entry] = np.sum(v * (above - below)) / (2 * STEP)
    return gradient


def live_bytes(make: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes that are still allocated after ``make()`` beside what was before, and its result.

    ``make`` runs once beforehand, so that compiling and caching are not measured.
    """
    make()
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = make()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before, kept
    finally:
        tracemalloc.stop()


def check_live_bytes(make_loss: Callable[[], Tensor], operations: int) -> TapeReport:
    """What stays alive after a forward pass is what the tape reports: within 64 KiB + 2 KiB an operation.

    ``make_loss`` returns the loss alone. The arrays that it starts from must exist beforehand, and
    the tape must not hold these themselves, or they would be reported but not measured.
    """
    live, loss = live_bytes(make_loss)
    report = tape(loss)
    slack = 64 * 1024 + 2 * 1024 * operations
    assert abs(live - report.total_bytes) <= slack, f"alive: {live:,} bytes; reported: {report.total_bytes:,}\n{report}"
    return report
