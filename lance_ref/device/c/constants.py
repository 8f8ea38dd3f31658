"""The arrays that a program reads from flash, as C."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

WIDTH = 108
"""Characters in a line of numbers."""


def quantised(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A weight (C_out, ...) in int8, and what 1 stands for in each output channel.

    The largest number of a channel becomes 127 or −127, so the error is at most half of what 1 stands for.

    >>> codes, unit = quantised(np.array([[1.0, -2.54], [0.0, 0.0]], np.float32))
    >>> codes.tolist(), unit.tolist()
    ([[50, -127], [0, 0]], [0.019999999552965164, 1.0])
    """
    rows = weight.reshape(len(weight), -1)
    most = np.abs(rows).max(1)
    unit = np.where(most > 0, most / np.float32(127), 1).astype(np.float32)
    codes = np.clip(np.rint(rows / unit[:, None]), -127, 127).astype(np.int8)
    return codes.reshape(weight.shape), unit


def dequantised(weight: np.ndarray) -> np.ndarray:
    """The numbers that the device computes with when it has a weight in int8."""
    codes, unit = quantised(weight)
    return codes.astype(np.float32) * unit.reshape(-1, *(1,) * (weight.ndim - 1))


@dataclass
class Constants:
    """Arrays by their names in C, in the order in which they were added.

    Attributes
    ----------
    arrays : dict of str to (C name, array, comment)
    """

    arrays: dict[str, tuple[str, np.ndarray]] = field(default_factory=dict)

    def add(self, name: str, array: np.ndarray) -> str:
        """The C name of an array; the same name twice is the same array."""
        if name not in self.arrays:
            taken = {c_name for c_name, _ in self.arrays.values()}
            plain = "lance_" + re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")
            c_name, n = plain, 1
            while c_name in taken:
                n += 1
                c_name = f"{plain}_{n}"
            self.arrays[name] = c_name, np.ascontiguousarray(array)
        return self.arrays[name][0]

    @property
    def nbytes(self) -> int:
        """Bytes in flash."""
        return sum(array.nbytes for _, array in self.arrays.values())

    def declarations(self) -> Iterator[str]:
        """One line for each array."""
        for c_name, array in self.arrays.values():
            yield f"extern const {_type(array)} {c_name}[{array.size}];"

    def definitions(self) -> Iterator[str]:
        """The arrays with their numbers."""
        for name, (c_name, array) in self.arrays.items():
            shape = " x ".join(map(str, array.shape))
            yield f"\n/* {name}: {shape} */\nLANCE_FLASH const {_type(array)} {c_name}[{array.size}] = {{"
            yield from _lines(array)
            yield "};"


def _type(array: np.ndarray) -> str:
    return "int8_t" if array.dtype == np.int8 else "float"


def number(value: float) -> str:
    """A float32 as C writes it.

    >>> number(1.0), number(-0.1), number(1e-20)
    ('1.0f', '-0.1f', '1e-20f')
    """
    text = str(np.float32(value))
    if not math.isfinite(value):
        raise ValueError(f"a constant is {text}, expected a finite number")
    return text + ("f" if "." in text or "e" in text else ".0f")


def _lines(array: np.ndarray) -> Iterator[str]:
    flat = array.ravel()
    if array.dtype == np.int8:
        texts = [str(value) for value in flat.tolist()]
    else:
        # nine digits give every float32 back
        texts = [f"{value:.9g}" for value in flat.tolist()]
        texts = [text + ("f" if "." in text or "e" in text else ".0f") for text in texts]
    line = "   "
    for text in texts:
        if len(line) + len(text) + 2 > WIDTH:
            yield line
            line = "   "
        line += f" {text},"
    yield line
