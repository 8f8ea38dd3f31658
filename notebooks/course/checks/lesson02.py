"""Lesson 2: what dropout and hard-swish keep, and what does not shrink with the batch."""

from __future__ import annotations

from typing import Any

from course.checking import exercise, whole_number


@exercise("2.1")
def dropout(answer: Any) -> str | None:
    n = 64 * 128
    hints = {
        4 * n: "that is the whole input; its values do not stand in the derivative",
        n: "that is a byte for each element; a yes or no takes less",
    }
    return whole_number(answer, n // 8, hints, "what must be known of each element, and how many bits is that?")


@exercise("2.2")
def hard_swish(answer: Any) -> str | None:
    n = 64 * 32 * 8 * 8
    hints = {
        n // 8: "one bit for each element is not enough: the derivative is not constant between −3 and 3",
        n: "that is a byte for each element; the input is in float32",
    }
    return whole_number(answer, 4 * n, hints, "the derivative between −3 and 3 is x/3 + 1/2: what has to be kept?")


@exercise("2.3")
def single_image(answer: Any) -> str | None:
    if answer not in ("tape", "factors"):
        return f"expected 'tape' or 'factors', got {answer!r}"
    return None if answer == "factors" else "the tape is proportional to the batch, and the batch is one image"
