"""Directions of the layers that train: those of images; or random ones, as a program's sizes depend on shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.device.check import step_trace
from analysis.device.choices import LayerRanks
from analysis.steps.net_choice import Normalise
from lance_ref import datasets
from lance_ref.algebra.subspace import Subspace
from lance_ref.datasets import Dataset
from lance_ref.lance.calibration import Calibration, calibrate
from lance_ref.nn.module import Module

Shapes = Mapping[str, tuple[int, ...]]


def input_shapes(net: Module, input_shape: tuple[int, ...], layers: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shape of the input of each of these layers, for one image, the batch of one first."""
    wanted = set(layers)
    records = [r for r in step_trace(net, input_shape).records if r.path in wanted and r.op in ("conv2d", "linear")]
    return {record.path: (1, *record.inputs[0].shape[1:]) for record in records}


def channel_directions(shapes: Shapes, count: int) -> dict[str, LayerRanks]:
    """That many directions of the channels (or features) alone; a layer that has no more keeps its input as it is.

    Mean-free directions leave the mean's out, so that of n channels at most n - 1 are there.

    >>> channel_directions({"a": (1, 16, 4, 4), "b": (1, 8, 4, 4), "c": (1, 90)}, 8)
    {'a': (8, None, None), 'c': (8,)}
    """
    return {path: (count, *[None] * (len(of) - 2)) for path, of in shapes.items() if count < of[1]}


def random_subspaces(shapes: Shapes, ranks: Mapping[str, LayerRanks]) -> dict[str, Subspace]:
    """Orthonormal directions of these ranks; no direction of the batch."""
    rng = np.random.default_rng(0)
    return {path: Subspace.random(shapes[path], (None, *of), rng) for path, of in ranks.items()}


MODES = ("channel", "height", "width")
BATCH = 32
"""Images of one pass of a calibration."""


@dataclass(frozen=True)
class CalibrationImages:
    """Training images of ``--data``, of the size and with the channels that a net takes."""

    data: Dataset
    size: tuple[int, int]
    normalise: Normalise
    count: int

    @classmethod
    def open(
        cls, data: str, shape: tuple[int, ...], normalise: Normalise, count: int | None, at_most: int
    ) -> CalibrationImages:
        """That many of them, in an order drawn with seed 0; by default ``at_most``, or all if there are fewer.

        Raises
        ------
        ValueError
            If the net takes no pictures, there are fewer images than asked for, or the data cannot be read.
        """
        if len(shape) != 3:
            raise ValueError(f"the net takes inputs of shape {shape}, but --data needs pictures (C, H, W)")
        channels, *size = shape
        images = datasets.open_data(data, "train", (size[0], size[1]), None, channels)
        if count is not None and count > len(images):
            raise ValueError(f"--calibration-images is {count}, but {images.name} has {len(images)} training images")
        number = min(at_most, len(images)) if count is None else count
        return cls(images, (size[0], size[1]), normalise, number)

    @property
    def num_classes(self) -> int:
        return self.data.num_classes

    @property
    def words(self) -> str:
        return f"{self.count} images of {self.data.name}"

    def calibrate(self, net: Module, layers: Sequence[str], modes: Sequence[str], epsilon: float) -> Calibration:
        """What these layers see of the images; without their mean if channels alone are compressed."""
        return calibrate(
            net, self._inputs(), list(layers), epsilon, modes, progress=False, mean_free=tuple(modes) == ("channel",)
        )

    def subspaces(self, net: Module, ranks: Mapping[str, LayerRanks]) -> Calibration:
        """That many directions of each mode, those of most energy."""
        modes = MODES if any(r is not None for of in ranks.values() for r in of[1:]) else MODES[:1]
        found = self.calibrate(net, list(ranks), modes, 1.0)
        return found.with_ranks({path: (None, *of) for path, of in ranks.items()})

    def some(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (B, H, W, C) of uint8 and labels of some images."""
        given = datasets.batches(self.data, count, 0, drop_last=False, normalise=_as_they_are, image_size=self.size)
        return next(iter(given))

    def _inputs(self) -> list[np.ndarray]:
        left, found = self.count, []
        for x, _ in datasets.batches(
            self.data, BATCH, 0, drop_last=False, normalise=self.normalise, image_size=self.size
        ):
            found.append(x[:left])
            left -= len(found[-1])
            if not left:
                break
        return found


def _as_they_are(pixels: np.ndarray) -> np.ndarray:
    return pixels
