"""What a layer's geometry is, and what every kind of convolution has in common.

Transposed or not, of images or of volumes: each output place y sees at most one input place for each position p of the
kernel, along each axis by itself, so that

    Y[b, o, y] = Σ_{c,p} W[o, c, p] · X[b, c, seen(y, p)]

with one :meth:`Convolution.seen` for each axis, and zero where no input place is seen. LANCE's arithmetic
(:mod:`lance_ref.algebra.projection`) asks for nothing else, and is therefore the same for all of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lance_ref.engine.tensor import Shape

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry(ABC):
    """Sizes of one call of a layer with a weight, and its three products on raw arrays.

    Attributes
    ----------
    input_shape, weight_shape : tuple of int
    """

    input_shape: Shape
    weight_shape: Shape

    @property
    @abstractmethod
    def output_shape(self) -> Shape:
        """Batch first, as in ``input_shape``."""

    @abstractmethod
    def forward(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """The output, without a bias."""

    @abstractmethod
    def input_gradient(self, weight: np.ndarray, grad_output: np.ndarray) -> np.ndarray:
        """The gradient of the input, of the input's shape."""

    @abstractmethod
    def weight_gradient(self, x: np.ndarray, grad_output: np.ndarray) -> np.ndarray:
        """The gradient of the weight, of the weight's shape; exact, and linear in ``x``."""

    def outputs_first(self, weight: np.ndarray) -> np.ndarray:
        """A weight, or its gradient, as (C_out, C_in/groups, k, ...) or (O, I), whatever its own order is."""
        return weight

    def as_weight(self, outputs_first: np.ndarray) -> np.ndarray:
        """The opposite of :meth:`outputs_first`, in C order."""
        return outputs_first


@dataclass(frozen=True)
class Convolution(Geometry):
    """Sizes of one convolution of any kind.

    Attributes
    ----------
    input_shape : tuple of int
        (B, C_in, n, ...), one size for each axis of a map.
    weight_shape : tuple of int
        (C_out, C_in/groups, k, ...); (C_in, C_out/groups, k, ...) of a transposed one.
    stride, dilation : tuple of int
        For each axis.
    padding : tuple of pairs of int
        (before, after) for each axis: zeros.
    groups : int
        Divides C_in and C_out.
    """

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[Pair, ...] = ((0, 0), (0, 0))
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @cached_property
    def output_shape(self) -> Shape:
        """(B, C_out, n_out, ...): floor((n + before + after − dilation·(k − 1) − 1) / stride) + 1 along each axis."""
        axes = zip(self.input_shape[2:], self.padding, self.dilation, self.kernel, self.stride, strict=True)
        size = [(n + sum(pad) - d * (k - 1) - 1) // s + 1 for n, pad, d, k, s in axes]
        return (self.input_shape[0], self.weight_shape[0], *size)

    @property
    def kernel(self) -> Shape:
        """The size of the kernel along each axis."""
        return self.weight_shape[2:]

    @property
    def out_channels(self) -> int:
        """C_out"""
        return self.weight_shape[0]

    @property
    def width(self) -> int:
        """C_in/groups: the input channels that an output channel sees."""
        return self.input_shape[1] // self.groups

    @property
    def places(self) -> int:
        """Places of one image on which the whole kernel is laid: all of the output."""
        return math.prod(self.output_shape[2:])

    @property
    def is_depthwise(self) -> bool:
        """Whether there are compiled loops for it because each output channel looks at one input channel alone."""
        return False

    def seen(self, axis: int) -> np.ndarray:
        """Which input place each output place sees.

        Parameters
        ----------
        axis : int
            0 for the first axis of a map.

        Returns
        -------
        (n_out, k) array of int
            ``[y, p]``: the place that kernel position p shows to output place y. Outside of 0 to n − 1: none.
        """
        positions = self.stride[axis] * np.arange(self.output_shape[2 + axis])[:, None]
        return positions + self.dilation[axis] * np.arange(self.kernel[axis]) - self.padding[axis][0]

    def with_channels(self, batch: int, channels: int, mixed: bool) -> Convolution:
        """The same convolution for an input of other directions of batch and channels.

        Parameters
        ----------
        batch, channels : int
            Sizes of these modes of the input.
        mixed : bool
            Whether the channels are directions, each a mixture of the channels of all groups, so that every output
            channel sees all of them.
        """
        input_shape = (batch, channels, *self.input_shape[2:])
        if not mixed:
            return replace(self, input_shape=input_shape)
        weight_shape = self._order(self.out_channels, channels)
        return replace(self, input_shape=input_shape, weight_shape=(*weight_shape, *self.kernel), groups=1)

    @staticmethod
    def _order(outputs: int, inputs: int) -> Pair:
        """How a weight's shape begins, of a convolution of one group."""
        return outputs, inputs
