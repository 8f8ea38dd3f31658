"""The project: a training step that fits, that is the right one, and that learns."""

from __future__ import annotations

from typing import Any

import numpy as np

from course.checking import Reached, exercise

BUDGET = 256 * 1024
ACCURACY = 0.6
"""The head alone reaches about 0.45, and exact backpropagation of two layers about 0.7."""


@exercise("11.1")
def fits(program: Any) -> str | None:
    if not hasattr(program, "ram_bytes"):
        return f"expected a program of device.compile, got {type(program).__name__}"
    kib = program.ram_bytes / 1024
    if program.ram_bytes <= BUDGET:
        return Reached(f"{kib:.1f} KiB of 256")
    largest = sorted(program.ram.items(), key=lambda item: -item[1])[:2]
    words = " and ".join(f"{kind} ({nbytes / 1024:.0f} KiB)" for kind, nbytes in largest)
    return f"{kib:.1f} KiB is {kib - 256:.1f} KiB too much; at the peak, most of it is {words}"


@exercise("11.2")
def same_step(losses: Any) -> str | None:
    on_device, by_library = (float(loss) for loss in losses)
    if np.isclose(on_device, by_library, rtol=1e-4):
        return Reached(f"the program's loss is the library's, {on_device:.5f}")
    return f"the program has the loss {on_device:.5f}, the library {by_library:.5f}: the same weights, the same images?"


@exercise("11.3")
def learns(accuracy: Any) -> str | None:
    found = float(accuracy)
    if found > 1:
        return f"expected a share between 0 and 1, got {found}"
    if found >= ACCURACY:
        return Reached(f"{found:.1%} of the test images, where {ACCURACY:.0%} were asked for")
    return (
        f"{found:.1%} of the test images; the head alone reaches about 45 %, so the convolutions have to learn as well"
    )
