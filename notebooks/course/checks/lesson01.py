"""Lesson 1: what an operation keeps, what backward costs, and what freezing saves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from course.checking import answered, exercise, whole_number


@exercise("1.1")
def tanh(answer: Any) -> str | None:
    a = np.array([[-1.5, 0.0, 0.25], [2.0, -0.5, 1.0]])
    value = answered(answer(SimpleNamespace(data=a.copy())))
    if not np.allclose(value.data, np.tanh(a)):
        return "the result is not tanh of the input"
    g = np.array([[1.0, -2.0, 3.0], [0.5, 1.0, -1.0]])
    (grad,) = value.pull(g, value.kept)
    if np.allclose(grad, 1 - np.tanh(a) ** 2):
        return "pull ignores the gradient g that it is given"
    if not np.allclose(grad, g * (1 - np.tanh(a) ** 2)):
        return "pull does not give g · (1 − tanh²)"
    if not value.kept:
        return "nothing is kept: pull reads an array that is not on the tape"
    return None


@exercise("1.2")
def needless(answer: Any) -> str | None:
    hints = {
        64 * 64: "that is the number of pixels of the batch; each of them needs a sum over the 32 hidden units",
        2 * 64 * 64 * 32: "that is FLOPs, or two products; count the multiply-adds of one",
        64 * 32 * 10: "that is the second layer",
    }
    return whole_number(answer, 64 * 64 * 32, hints, "x.grad is a (64, 32) times a (32, 64) matrix")


@exercise("1.3")
def frozen(answer: Any) -> str | None:
    if not isinstance(answer, (set, frozenset, list, tuple)):
        return f"expected a set of names of operations, got {answer!r}"
    kept = set(answer)
    if "relu" in kept:
        return "no gradient passes through relu any more, so its mask is not needed"
    if "matmul" not in kept:
        return "the weight gradient of the second product needs something"
    if "cross_entropy" not in kept:
        return "the gradient has to begin somewhere: what does the loss keep?"
    more = sorted(kept - {"matmul", "cross_entropy"})
    return f"{more} keeps nothing" if more else None
