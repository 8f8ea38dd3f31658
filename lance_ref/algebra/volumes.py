"""Transposed convolutions and convolutions of volumes, made of 2-D ones (:mod:`lance_ref.algebra.geometry`).

A transposed convolution is the input gradient of a convolution, its *mirror*, as a layer of its own: each of the
mirror's three products serves another purpose here. A convolution of volumes is a sum, over the depth of the kernel, of
2-D convolutions of all frames at once. Both take as many multiply-adds as their formulas say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lance_ref.algebra.convolution import Convolution, Pair
from lance_ref.algebra.geometry import ConvGeometry
from lance_ref.engine.tensor import Shape


@dataclass(frozen=True)
class TransposedGeometry(Convolution):
    """Sizes of one transposed 2-D convolution.

    Attributes
    ----------
    input_shape : tuple of int
        (B, C_in, H, W)
    weight_shape : tuple of int
        (C_in, C_out/groups, k_h, k_w)
    stride, dilation : pair of int
        Of the mirror.
    padding : pair of pairs of int
        What is taken off the output: ((top, bottom), (left, right)).
    output_padding : pair of int
        Rows at the bottom and columns at the right that are added; less than ``stride``.
    """

    output_padding: Pair = (0, 0)

    @cached_property
    def output_shape(self) -> Shape:
        """(B, C_out, H_out, W_out), H_out = (H − 1)·stride − top − bottom + dilation·(k_h − 1) + output_padding + 1."""
        axes = zip(
            self.input_shape[2:], self.stride, self.padding, self.dilation, self.kernel, self.output_padding,
            strict=True,
        )  # fmt: skip
        size = [(n - 1) * s - sum(pad) + d * (k - 1) + more + 1 for n, s, pad, d, k, more in axes]
        return (self.input_shape[0], self.out_channels, *size)

    @property
    def out_channels(self) -> int:
        return self.weight_shape[1] * self.groups

    @property
    def places(self) -> int:
        """Here each input place meets the whole kernel."""
        return math.prod(self.input_shape[2:])

    @cached_property
    def mirror(self) -> ConvGeometry:
        """The convolution that takes the output's shape to the input's, with the same weight."""
        (s_h, s_w), (rows, columns), (d_h, d_w) = self.stride, self.padding, self.dilation
        return ConvGeometry(self.output_shape, self.weight_shape, (s_h, s_w), (rows, columns), (d_h, d_w), self.groups)

    def forward(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Y[b,o,y,x]: the sum of W[c,o,p,q] · X[b,c,h,w] where y = s·h + d·p − top and x = s·w + d·q − left."""
        return self.mirror.input_gradient(weight, x)

    def input_gradient(self, weight: np.ndarray, grad_output: np.ndarray) -> np.ndarray:
        """dX: the mirror's output."""
        return self.mirror.forward(grad_output, weight)

    def weight_gradient(self, x: np.ndarray, grad_output: np.ndarray) -> np.ndarray:
        """dW[c,o,p,q] = Σ_{b,h,w} X[b,c,h,w] · G[b, o, s·h + d·p − top, s·w + d·q − left]."""
        return self.mirror.weight_gradient(grad_output, x)

    def seen(self, axis: int) -> np.ndarray:
        """The h for which the mirror's place is y = s·h + d·p − before; −1 where s does not divide."""
        behind = np.arange(self.output_shape[2 + axis])[:, None] + self.padding[axis][0]
        behind = behind - self.dilation[axis] * np.arange(self.kernel[axis])
        found: np.ndarray = np.where(behind % self.stride[axis] == 0, behind // self.stride[axis], -1)
        return found

    @staticmethod
    def _order(outputs: int, inputs: int) -> Pair:
        return inputs, outputs

    def outputs_first(self, weight: np.ndarray) -> np.ndarray:
        (C_in, width), g = weight.shape[:2], self.groups
        by_group = weight.reshape(g, C_in // g, width, *self.kernel)
        return by_group.swapaxes(1, 2).reshape(g * width, C_in // g, *self.kernel)

    def as_weight(self, outputs_first: np.ndarray) -> np.ndarray:
        by_group = outputs_first.reshape(self.groups, self.weight_shape[1], self.width, *self.kernel)
        return np.ascontiguousarray(by_group.swapaxes(1, 2)).reshape(self.weight_shape)


@dataclass(frozen=True)
class VolumeGeometry(Convolution):
    """Sizes of one 3-D convolution.

    Attributes
    ----------
    input_shape : tuple of int
        (B, C_in, D, H, W)
    weight_shape : tuple of int
        (C_out, C_in/groups, k_d, k_h, k_w)
    stride, dilation, padding
        For depth, height and width.
    """

    stride: tuple[int, ...] = (1, 1, 1)
    padding: tuple[Pair, ...] = ((0, 0), (0, 0), (0, 0))
    dilation: tuple[int, ...] = (1, 1, 1)

    @cached_property
    def frames(self) -> ConvGeometry:
        """The 2-D convolution of all frames that one depth of the kernel sees."""
        B, C_in, _, H, W = self.input_shape
        (_, s_h, s_w), (_, rows, columns), (_, d_h, d_w) = self.stride, self.padding, self.dilation
        kernel = (*self.weight_shape[:2], *self.kernel[1:])
        images = (B * self.output_shape[2], C_in, H, W)
        return ConvGeometry(images, kernel, (s_h, s_w), (rows, columns), (d_h, d_w), self.groups)

    def forward(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Y[b,o,d,h,w] = Σ_{c,t,p,q} W[o,c,t,p,q] · X[b, c, s·d + d_d·t − front, s·h + …, s·w + …]."""
        padded = self._padded(x)
        out = np.zeros(self.frames.output_shape, x.dtype)  # (B·D_out, C_out, H_out, W_out)
        for t, depth in self._taps():
            out += self.frames.forward(_as_frames(padded[:, :, depth]), np.ascontiguousarray(weight[:, :, t]))
        return np.ascontiguousarray(self._as_volumes(out))

    def input_gradient(self, weight: np.ndarray, grad_output: np.ndarray) -> np.ndarray:
        g, (front, back), shape = _as_frames(grad_output), self.padding[0], self.input_shape
        padded = np.zeros((*shape[:2], shape[2] + front + back, *shape[3:]), g.dtype)
        for t, depth in self._taps():
            padded[:, :, depth] += self._as_volumes(
                self.frames.input_gradient(np.ascontiguousarray(weight[:, :, t]), g)
            )
        return padded[:, :, front : front + shape[2]].copy() if front or back else padded

    def weight_gradient(self, x: np.ndarray, grad_output: np.ndarray) -> np.ndarray:
        """dW[o,c,t,p,q] = Σ_{b,d,h,w} G[b,o,d,h,w] · X[b, c, s·d + d_d·t − front, s·h + …, s·w + …]."""
        padded, g = self._padded(x), _as_frames(grad_output)
        grad = np.empty(self.weight_shape, grad_output.dtype)
        for t, depth in self._taps():
            grad[:, :, t] = self.frames.weight_gradient(_as_frames(padded[:, :, depth]), g)
        return grad

    def _taps(self) -> Iterator[tuple[int, slice]]:
        """The frames of the padded volume that each depth of the kernel sees."""
        s, d = self.stride[0], self.dilation[0]
        for t in range(self.kernel[0]):
            yield t, slice(t * d, t * d + s * (self.output_shape[2] - 1) + 1, s)

    def _padded(self, x: np.ndarray) -> np.ndarray:
        """The volume with its zeros before and behind."""
        return np.pad(x, ((0, 0), (0, 0), self.padding[0], (0, 0), (0, 0))) if any(self.padding[0]) else x

    def _as_volumes(self, frames: np.ndarray) -> np.ndarray:
        """(B·D_out, C, H, W) as (B, C, D_out, H, W): a view."""
        return frames.reshape(self.input_shape[0], self.output_shape[2], *frames.shape[1:]).swapaxes(1, 2)


def _as_frames(x: np.ndarray) -> np.ndarray:
    """(B, C, D, H, W) as (B·D, C, H, W)."""
    return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(-1, x.shape[1], *x.shape[3:])
