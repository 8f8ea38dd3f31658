"""Images and the numbers that the NumPy program gives for them, so that the C program can be compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from lance_ref.device.arena import Array
from lance_ref.device.layout import DeviceLayout

STEPS = 3
TOLERANCES = 1e-5, 1e-3, 5e-2
"""Relative to the largest number of an array: everything after the first step, later losses, and what was learned after
the last step. There an activation that was zero but for rounding may have got the other sign, and its gradient with it.
"""


class Runs(Protocol):
    """What a program is asked for here."""

    layout: DeviceLayout

    def step(self, images: np.ndarray, labels: Any, lr: float) -> float: ...
    def logits(self, images: np.ndarray) -> np.ndarray: ...
    def value(self, array: Array) -> np.ndarray: ...


def image_file(images: np.ndarray, labels: np.ndarray) -> bytes:
    """The content of a file of images: for each image two bytes of label, then its numbers."""
    stored = images if images.dtype == np.uint8 else images.astype("<f4")
    rows = zip(stored, labels, strict=True)
    return b"".join(int(label).to_bytes(2, "little") + image.tobytes() for image, label in rows)


def expected(program: Runs, images: np.ndarray, labels: np.ndarray, lr: float) -> str:
    """Logits of the first image, and losses and what was learned after a few steps, which change the program."""
    batch = 2 if len(images) % 2 == 0 else 1
    first, later, last = TOLERANCES
    lines = [f"steps {STEPS} batch {batch} rate {lr:.9g} tolerance {first:g} later {later:g} last {last:g}"]
    lines.append(_numbers(program.logits(images[:1])))
    for step in range(STEPS):
        chosen = (np.arange(batch) + step * batch) % len(images)
        lines.append(_numbers(np.float32(program.step(images[chosen], labels[chosen], lr))))
        if step in (0, STEPS - 1):
            lines += _state(program)
    return "\n".join(lines) + "\n"


def _state(program: Runs) -> Iterator[str]:
    arrays = [array for array in program.layout.arrays if array.is_state and array.dtype.kind == "f"]
    yield f"arrays {len(arrays)}"
    for array in sorted(arrays, key=lambda array: array.offset):
        value = program.value(array)
        name = array.name.encode("ascii", "replace").decode()[:100]
        yield f"at {array.offset} numbers {value.size} of {name}"
        yield _numbers(value)


def _numbers(values: Any) -> str:
    return "\n".join(f"{value:.9g}" for value in np.ravel(values).tolist())
