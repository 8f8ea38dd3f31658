"""Lesson 5: groups, a safe direction of the batch, and sketches."""

from __future__ import annotations

from typing import Any

import numpy as np

from course.checking import exercise


def two_numbers(answer: Any) -> np.ndarray:
    """The answer as two floats.

    Raises
    ------
    ValueError
        If it is anything else; says what it is.
    """
    found = np.asarray(answer, dtype=float).ravel()
    if found.shape != (2,):
        raise ValueError(f"expected two numbers, got {found.size}")
    return found


@exercise("5.1")
def groups(answer: Any) -> str | None:
    found = two_numbers(answer)
    if np.allclose(found, (2, 0)):
        return "that is the exact gradient"
    if np.allclose(found, (-1, -1)):
        return "these are the projected channels; multiply each with its own output gradient"
    if np.allclose(found, (-1, 0)):
        return None
    return "P replaces both channels by their mean, −1; then each is multiplied with its own output gradient"


@exercise("5.2")
def safe_direction(answer: Any) -> str | None:
    u = two_numbers(answer)
    if not np.any(u):
        return "the zero vector is no direction"
    if np.isclose(u[0] * 2, u[1]) or np.isclose(u[0], -2 * u[1]):
        return None
    return "it is no eigenvector of K = [[1, 2], [2, 4]], so some output gradient goes uphill"


@exercise("5.3")
def sketches(answer: Any) -> str | None:
    if len(answer) != 2 or not set(answer) <= {"yes", "no"}:
        return f"expected two words, each 'yes' or 'no', got {answer!r}"
    single, on_average = answer
    if single == "yes":
        return "a single draw knows nothing of the batch, as a fixed direction does not: count how often it goes uphill"
    return (
        None if on_average == "yes" else "the sketch is scaled so that its mean is right: average some thousand draws"
    )
