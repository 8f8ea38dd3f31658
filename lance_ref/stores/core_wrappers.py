"""What may be wrapped around LANCE's core: codes in place of its numbers, and a batch mode that is sketched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lance_ref.algebra.frame import feature_mode
from lance_ref.algebra.projection import Factors
from lance_ref.engine.tensor import Shape
from lance_ref.stores.quantized import checked_bits, dequantise, quantise
from lance_ref.stores.sketch import BatchSketch

SLICE_ENTRIES = 32
"""Slices of the core's feature mode with fewer entries than this share one range of codes."""


class Numbers:
    """The core is kept as it is."""

    bits: int | None = None

    def pack(self, core: np.ndarray) -> dict[str, np.ndarray]:
        """What is kept of the core, by name."""
        return {"core": core}

    def unpack(self, saved: Mapping[str, np.ndarray], shape: Shape) -> np.ndarray:
        """The core of that shape, back from what was kept of it."""
        return saved["core"]


class Codes(Numbers):
    """The core is kept as affine codes of 8 or 4 bits, with a range for each slice of the feature mode."""

    def __init__(self, bits: int) -> None:
        self.bits: int = checked_bits("core_bits", bits)

    def pack(self, core: np.ndarray) -> dict[str, np.ndarray]:
        return quantise(core, _range_mode(core.shape), self.bits)

    def unpack(self, saved: Mapping[str, np.ndarray], shape: Shape) -> np.ndarray:
        return dequantise(saved, shape, _range_mode(shape), self.bits)


class CalibratedBatch:
    """The batch mode has the fixed factor that calibration found, if any."""

    sketch: BatchSketch | None = None

    def next_step(self) -> dict[str, np.ndarray]:
        """What backward has to know of this step, by name."""
        return {}

    def factors(self, fixed: Factors, saved: Mapping[str, np.ndarray], n: int, dtype: Any) -> Factors:
        """The factors of the step that ``saved`` is of, for a batch of n."""
        return fixed


class SketchedBatch(CalibratedBatch):
    """The batch mode has directions that are drawn anew at every step; backward draws them again from a seed."""

    def __init__(self, ratio: float, seed: int) -> None:
        self.sketch: BatchSketch = BatchSketch(ratio, seed, "batch_ratio")

    def next_step(self) -> dict[str, np.ndarray]:
        return {"seed": self.sketch.next_seed()}

    def factors(self, fixed: Factors, saved: Mapping[str, np.ndarray], n: int, dtype: Any) -> Factors:
        return (self.sketch.directions(saved["seed"], n, dtype), *fixed[1:])


def _range_mode(core_shape: Shape) -> int | None:
    """The mode each of whose indices has a range of its own; None for one range of the whole core."""
    mode = feature_mode(core_shape)
    return mode if math.prod(core_shape) // core_shape[mode] >= SLICE_ENTRIES else None
