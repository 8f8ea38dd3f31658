"""Lesson 6: codes of four bits, images at a time, and the front."""

from __future__ import annotations

from typing import Any

from course.checking import answered, exercise, whole_number


@exercise("6.1")
def four_bits(answer: Any) -> str | None:
    numbers, rest, scales = 64 * (8 * 36 + 16 * 9), 51_520, 2 * 4 * (8 + 16)
    hints = {
        numbers // 2: "that is the codes alone; the rest of the tape stays",
        rest + numbers // 2: "each channel also keeps two numbers, to read its codes with",
        rest + numbers + scales: "that is the tape with 8 bits",
        (rest + numbers + scales) // 2: "only the codes are halved, not the rest of the tape",
    }
    return whole_number(answer, rest + numbers // 2 + scales, hints, "codes of half a byte, the floor, and the scales")


@exercise("6.2")
def images_at_a_time(answer: Any) -> str | None:
    hints = {
        3: "three images would fit, but three do not divide 64",
        4: f"four images take {4 * 162_112 // 64:,} bytes, and 8 KiB are 8,192",
        1: "one image fits, and so do more",
    }
    return whole_number(answer, 2, hints, f"one image takes {162_112 // 64:,} bytes")


@exercise("6.3")
def front(answer: Any) -> str | None:
    points = {"a": (10, 0.5), "b": (20, 0.7), "c": (20, 0.6), "d": (30, 0.65), "e": (40, 0.9), "f": (5, 0.2)}
    found = set(answered(answer(dict(points))))
    right = {"a", "b", "e", "f"}
    if found - right:
        name = min(found - right)
        return f"of {points}, {name!r} is not on the front: another takes no more bytes and is better"
    if right - found:
        return f"of {points}, {min(right - found)!r} is on the front: no other is as good in both respects"
    twins = set(answered(answer({"a": (1, 0.5), "b": (1, 0.5)})))
    return None if twins == {"a", "b"} else "two methods with the same bytes and accuracy do not dominate each other"
