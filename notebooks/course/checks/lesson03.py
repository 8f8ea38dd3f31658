"""Lesson 3: the order of columns, the error of a matrix, and noise."""

from __future__ import annotations

from typing import Any

import numpy as np

from course.checking import answered, exercise, whole_number


@exercise("3.1")
def unfold_first_fastest(answer: Any) -> str | None:
    tensor = np.arange(24).reshape(2, 3, 4)
    for mode in range(3):
        moved = np.moveaxis(tensor, mode, 0)
        rows = tensor.shape[mode]
        found = np.asarray(answered(answer(tensor, mode)))
        if found.shape != (rows, 24 // rows):
            return f"of a 2×3×4 tensor, mode {mode} gives the shape {found.shape}, expected {(rows, 24 // rows)}"
        if np.array_equal(found, moved.reshape(rows, -1)) and mode < 2:
            return "there the last remaining mode runs fastest, as in the library"
        if not np.array_equal(found, moved.reshape(rows, -1, order="F")):
            return f"mode {mode} of a 2×3×4 tensor has its numbers in other places"
    return None


@exercise("3.2")
def error_of_a_matrix(answer: Any) -> str | None:
    hints = {
        10: "that counts the tail twice; the second mode cuts what the first has left over",
        3: "these are singular values; the error is a sum of squares",
        50: "that is what is kept",
    }
    return whole_number(answer, 5, hints, "which singular values are cut, and what are their squares?")


@exercise("3.3")
def of_noise(answer: Any) -> str | None:
    hints = {14: "14 sixteenths are 0.875: is that enough?", 16: "15 sixteenths are 0.94: is that not enough?"}
    return whole_number(answer, 15, hints, "each of the 16 directions holds about one sixteenth of the energy")
