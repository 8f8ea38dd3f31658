"""Shapes and plain arithmetic of the two layers that have weights: convolution and linear.

A geometry knows the sizes of one layer call and computes its three products on raw arrays:
the output, the input gradient, and the *exact* weight gradient. With K = (C_in/g)·k_h·k_w and
L = H_out·W_out, each of the three takes B·L·C_out·K multiply-adds, whichever way it is run:

* 1×1, stride 1, no padding: one matrix product per image on a view of the input;
* depthwise (C_in/g = 1): loops, see :mod:`lance_ref.algebra.kernels.depthwise`;
* everything else: patches are laid out as columns ("im2col") in blocks of bounded size, so that
  the workspace stays under :data:`WORKSPACE_BYTES` whatever the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lance_ref.algebra.kernels import depthwise as kernels_depthwise
from lance_ref.algebra.kernels.columns import add_columns
from lance_ref.engine.counting import matmul
from lance_ref.engine.tensor import Shape

WORKSPACE_BYTES = 8 * 2**20
"""Largest block of columns that a convolution lays out at a time (one output row at the least)."""

MANY_PLACES = 512
"""Of one image's output: enough columns for a fast matrix product; smaller images are put together."""

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]


@dataclass(frozen=True)
class ConvGeometry:
    """Sizes of one 2-D convolution (cross-correlation, as everywhere in deep learning).

    Attributes
    ----------
    input_shape : tuple of int
        (B, C_in, H, W)
    weight_shape : tuple of int
        (C_out, C_in/groups, k_h, k_w)
    stride, dilation : pair of int
        For height and width.
    padding : pair of pairs of int
        ((top, bottom), (left, right)), zeros.
    groups : int
        Divides C_in and C_out.
    """

    input_shape: Shape
    weight_shape: Shape
    stride: Pair = (1, 1)
    padding: Padding = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    groups: int = 1

    @cached_property
    def output_size(self) -> Pair:
        """(H_out, W_out): floor((n + before + after − dilation·(k − 1) − 1) / stride) + 1."""
        sizes = [
            (n + sum(pad) - d * (k - 1) - 1) // s + 1
            for n, pad, d, k, s in zip(
                self.input_shape[2:], self.padding, self.dilation, self.weight_shape[2:], self.stride, strict=True
            )
        ]
        return sizes[0], sizes[1]

    @property
    def output_shape(self) -> Shape:
        """(B, C_out, H_out, W_out)"""
        return (self.input_shape[0], self.weight_shape[0], *self.output_size)

    @property
    def is_depthwise(self) -> bool:
        """Whether each output channel looks at one of several input channels only."""
        return self.weight_shape[1] == 1 and self.groups > 1

    @property
    def is_pointwise(self) -> bool:
        """Whether the output is W @ x, pixel by pixel."""
        plain = (self.stride, self.padding, self.groups) == ((1, 1), ((0, 0), (0, 0)), 1)
        return self.weight_shape[2:] == (1, 1) and plain

    # ---- the three products ------------------------------------------------------------

    def forward(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Y[b,o,h,w] = Σ_{c,p,q} W[o,c,p,q] · X[b, c, s·h + d·p − top, s·w + d·q − left]."""
        B, C_out, H_out, W_out = self.output_shape
        if self.is_depthwise:
            return kernels_depthwise.depthwise_forward(
                x, weight, self.output_size, self.stride, self.padding, self.dilation
            )
        if self.is_pointwise:
            columns = x.reshape(B, -1, H_out * W_out)  # (B, C_in, L)
            return matmul(weight.reshape(C_out, -1), columns).reshape(self.output_shape)
        g = self.groups
        out = np.empty((B, g, C_out // g, H_out * W_out), x.dtype)
        grouped_weight = weight.reshape(g, C_out // g, -1)  # (g, C_out/g, K)
        for images, rows in self.blocks(x.itemsize):
            block = out[images, :, :, rows.start * W_out : rows.stop * W_out]  # (b, g, C_out/g, l)
            columns = self._columns(x[images], rows)  # (g, K, b·l)
            if len(block) == 1:
                matmul(grouped_weight, columns, out=block[0])
            else:
                block[:] = matmul(grouped_weight, columns).reshape(g, C_out // g, len(block), -1).transpose(2, 0, 1, 3)
            del columns  # before the next block is laid out
        return out.reshape(self.output_shape)

    def input_gradient(self, weight: np.ndarray, grad_output: np.ndarray) -> np.ndarray:
        """dX: every patch's gradient, Wᵀ G, added back to where the patch was taken from."""
        B, C_in = self.input_shape[:2]
        C_out, (H_out, W_out) = self.weight_shape[0], self.output_size
        if self.is_depthwise:
            return kernels_depthwise.depthwise_input_gradient(
                weight, grad_output, self.input_shape, self.stride, self.padding, self.dilation
            )
        if self.is_pointwise:
            columns = grad_output.reshape(B, C_out, H_out * W_out)
            grad = np.empty(self.input_shape, grad_output.dtype)  # no view: a leaf then need not copy it
            matmul(weight.reshape(C_out, C_in).T, columns, out=grad.reshape(B, C_in, H_out * W_out))
            return grad
        g, kernel = self.groups, self.weight_shape[2:]
        transposed_weight = weight.reshape(g, C_out // g, -1).transpose(0, 2, 1)  # (g, K, C_out/g)
        grad = np.zeros(self.input_shape, grad_output.dtype)
        for images, rows in self.blocks(grad_output.itemsize):
            columns = matmul(transposed_weight, self._grouped(grad_output[images, :, rows]))  # (g, K, b·l)
            patches = columns.reshape(C_in, *kernel, images.stop - images.start, rows.stop - rows.start, W_out)
            add_columns(patches, grad[images], rows, self.stride, self.padding, self.dilation)
            del columns, patches  # before the next block is laid out
        return grad

    def weight_gradient(self, x: np.ndarray, grad_output: np.ndarray) -> np.ndarray:
        """dW[o,c,p,q] = Σ_{b,h,w} G[b,o,h,w] · X[b, c, s·h + d·p − top, s·w + d·q − left]."""
        C_out, g = self.weight_shape[0], self.groups
        if self.is_depthwise:
            return kernels_depthwise.depthwise_weight_gradient(
                x, grad_output, self.weight_shape, self.stride, self.padding, self.dilation
            )
        grad = np.zeros(self.weight_shape, grad_output.dtype)
        by_group = grad.reshape(g, C_out // g, -1)  # (g, C_out/g, K), the same memory
        for images, rows in self.blocks(x.itemsize):
            columns = self._columns(x[images], rows)  # (g, K, b·l)
            by_group += matmul(self._grouped(grad_output[images, :, rows]), columns.transpose(0, 2, 1))
            del columns  # before the next block is laid out
        return grad

    # ---- columns -------------------------------------------------------------------------

    def patches(self, x: np.ndarray, rows: slice | None = None) -> np.ndarray:
        """The patches that the kernel sees, one column for each place of the output.

        Parameters
        ----------
        x : (b, C_in, H, W) array
            Any number of images.
        rows : slice, optional
            Which output rows, with both ends given; all of them by default.

        Returns
        -------
        (b, g, K, l) array
            K = (C_in/g)·k_h·k_w in the order of the weight's axes, l = rows·W_out. May share memory with ``x``.
        """
        return self._columns(x, slice(0, self.output_size[0]) if rows is None else rows, batch_first=True)

    def blocks(self, itemsize: int) -> Iterator[tuple[slice, slice]]:
        """(images, output rows) of blocks whose columns fit the workspace; rows run innermost.

        Images with many places come one by one: their products need no change of layout.
        """
        B = self.input_shape[0]
        H_out, W_out = self.output_size
        row_bytes = self.groups * math.prod(self.weight_shape[1:]) * W_out * itemsize
        images = 1 if H_out * W_out >= MANY_PLACES else max(1, min(B, WORKSPACE_BYTES // (row_bytes * H_out)))
        rows = H_out if images > 1 else max(1, min(H_out, WORKSPACE_BYTES // row_bytes))
        for b in range(0, B, images):
            for h in range(0, H_out, rows):
                yield slice(b, min(b + images, B)), slice(h, min(h + rows, H_out))

    def _grouped(self, block: np.ndarray) -> np.ndarray:
        """Rows of an output gradient, (b, C_out, n, W_out), as they meet the columns: (g, C_out/g, b·n·W_out)."""
        g, C_out = self.groups, self.weight_shape[0]
        return block.transpose(1, 0, 2, 3).reshape(g, C_out // g, -1)

    def _columns(self, x: np.ndarray, rows: slice, batch_first: bool = False) -> np.ndarray:
        """The patches under output rows ``rows``: (g, K, b·l), or (b, g, K, l) with ``batch_first``."""
        b, C_in, H, W = x.shape
        (k_h, k_w), W_out, g = self.weight_shape[2:], self.output_size[1], self.groups
        (top, _), (left, right) = self.padding
        (s_h, s_w), (d_h, d_w) = self.stride, self.dilation
        n = rows.stop - rows.start
        first = rows.start * s_h - top  # the first input row that is needed; may lie above the image
        last = first + (n - 1) * s_h + (k_h - 1) * d_h + 1
        if first < 0 or last > H or left or right:
            padded = np.zeros((b, C_in, last - first, W + left + right), x.dtype)
            inside = slice(max(first, 0), max(min(last, H), max(first, 0)))
            padded[:, :, inside.start - first : inside.stop - first, left : left + W] = x[:, :, inside]
        else:
            padded = x[:, :, first:last]
        by, bx = padded.strides[2:]
        patches = np.lib.stride_tricks.as_strided(
            padded,
            (b, C_in, k_h, k_w, n, W_out),
            (*padded.strides[:2], by * d_h, bx * d_w, by * s_h, bx * s_w),
            writeable=False,
        )
        if batch_first:
            return patches.reshape(b, g, -1, n * W_out)
        return patches.transpose(1, 2, 3, 0, 4, 5).reshape(g, -1, b * n * W_out)


@dataclass(frozen=True)
class LinearGeometry:
    """Sizes of one linear layer: input (..., I), weight (O, I), output (..., O)."""

    input_shape: Shape
    weight_shape: Shape

    @property
    def output_shape(self) -> Shape:
        return (*self.input_shape[:-1], self.weight_shape[0])

    def forward(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Y = X Wᵀ"""
        return matmul(x.reshape(-1, x.shape[-1]), weight.T).reshape(self.output_shape)

    def input_gradient(self, weight: np.ndarray, grad_output: np.ndarray) -> np.ndarray:
        """dX = G W"""
        grad = np.empty(self.input_shape, grad_output.dtype)  # not a view of the product: a leaf then need not copy it
        matmul(grad_output.reshape(-1, grad_output.shape[-1]), weight, out=grad.reshape(-1, weight.shape[1]))
        return grad

    def weight_gradient(self, x: np.ndarray, grad_output: np.ndarray) -> np.ndarray:
        """dW = Gᵀ X, summed over all leading axes."""
        return matmul(grad_output.reshape(-1, grad_output.shape[-1]).T, x.reshape(-1, x.shape[-1]))


Geometry = ConvGeometry | LinearGeometry
