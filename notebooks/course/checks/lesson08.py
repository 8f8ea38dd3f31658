"""Lesson 8: bytes on the tape, the batch from which LANCE is smaller, and numbers of a thin gradient."""

from __future__ import annotations

from typing import Any

from course.checking import answered, exercise, whole_number


@exercise("8.1")
def tape_bytes(answer: Any) -> str | None:
    image, norm, bits = 4 * 8 * 24 * 16 * 16, 4 * 48, 8 * 48 * 8 * 8 // 8
    hints = {
        image: "that is the convolution's input alone",
        image + bits: "the frozen batch norm keeps one number for each channel",
        image + norm: "ReLU6 keeps one bit for each element",
        image + norm + 8 * bits: "a byte for each element is eight times too much for ReLU6",
        image + norm + 32 * bits: "ReLU6 keeps bits, not floats",
    }
    return whole_number(answer, image + norm + bits, hints, "the convolution's input, 48 numbers, and a bit an element")


@exercise("8.2")
def break_even(answer: Any) -> str | None:
    for a, c, f in ((104.9, 8.9, 153.0), (10, 2, 16), (10, 2, 17), (5, 1, 0.5)):
        found = answered(answer(a, c, f))
        if found != int(found):
            return f"for a = {a}, c = {c}, f = {f} it gives {found}, which is no whole number"
        if not found * c + f < found * a:
            return f"for a = {a}, c = {c}, f = {f} it gives {found}, and at that batch LANCE is not smaller yet"
        if found > 1 and (found - 1) * c + f < (found - 1) * a:
            return f"for a = {a}, c = {c}, f = {f} it gives {found}, and a smaller batch would do"
    return None


@exercise("8.3")
def thin_gradient(answer: Any) -> str | None:
    hints = {
        160 * 576: "that is the dense gradient",
        24 * 576: "these are the numbers of U, which never changes",
        4 * 160 * 24: "these are the bytes",
    }
    return whole_number(answer, 160 * 24, hints, "Z has a row for each output channel and a column for each direction")
