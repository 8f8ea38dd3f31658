"""Lesson 10: tiles, channels, weight decay, Adam, and batch norm on a device."""

from __future__ import annotations

from typing import Any

import numpy as np

from course.checking import exercise, whole_number


@exercise("10.1")
def largest_tile(answer: Any) -> str | None:
    hints = {
        4: "with 4 × 4 the peak is above 21 KiB",
        3: "with 3 × 3 it is still above 19.5 KiB",
        1: "1 × 1 fits, and so does a larger one",
    }
    return whole_number(answer, 2, hints, "measure the peak for each size of tile")


@exercise("10.2")
def growth(answer: Any) -> str | None:
    bits, change = 2 * 96 * 5, 96 * 4 * 4
    hints = {
        bits: "the bits of both ReLU6 are right; D of expand grows as well",
        bits + change: "D of expand has a gradient of its size",
        2 * change: "the bits of both ReLU6 grow as well",
        bits // 2 + 2 * change: "there are two ReLU6",
        bits + 4 * change: "D of project has a row for each output channel, and those stay 16",
    }
    return whole_number(
        answer, bits + 2 * change, hints, "what has a row for each hidden channel, and of how many bytes?"
    )


@exercise("10.3")
def scale(answer: Any) -> str | None:
    found = float(answer)
    if np.isclose(found, 0.95) or np.isclose(found, 0.95**2):
        return "that is after fewer than three steps"
    if np.isclose(found, 0.85):
        return "each step multiplies; it does not subtract"
    return None if np.isclose(found, 0.95**3, rtol=1e-4) else "each step multiplies s by 1 − ηλ"


@exercise("10.4")
def rank_of_signs(answer: Any) -> str | None:
    hints = {4: "the gradient has rank 4, its signs do not", 96: "a matrix of 96 × 16 has at most rank 16"}
    return whole_number(answer, 16, hints, "a matrix of signs has no reason to have a small rank")


@exercise("10.5")
def batch_statistics(answer: Any) -> str | None:
    if answer not in ("yes", "no"):
        return f"expected 'yes' or 'no', got {answer!r}"
    return None if answer == "no" else "the statistics of one image are not those of the batch"
