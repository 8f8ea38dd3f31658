"""Shapes and plain arithmetic of the layers that most networks are made of: 2-D convolution and linear.

A geometry knows the sizes of one layer call and computes its three products on raw arrays:
the output, the input gradient, and the *exact* weight gradient. With K = (C_in/g)·k_h·k_w and
L = H_out·W_out, each of the three takes B·L·C_out·K multiply-adds, whichever way it is run:

* 1×1, stride 1, no padding: one matrix product per image on a view of the input;
* depthwise (C_in/g = 1): loops, see :mod:`lance_ref.algebra.kernels.depthwise`;
* everything else: patches are laid out as columns ("im2col") in blocks of bounded size, whatever the batch. Images are
  shared out to threads, each of which lays out a few of its own at a time.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lance_ref.algebra.convolution import Convolution
from lance_ref.algebra.convolution import Geometry as Geometry
from lance_ref.algebra.convolution import Pair as Pair
from lance_ref.algebra.kernels import depthwise as kernels_depthwise
from lance_ref.algebra.kernels.columns import add_columns, lay_out
from lance_ref.engine.counting import add, matmul
from lance_ref.engine.products import SHARED_MACS, product
from lance_ref.engine.tensor import Shape
from lance_ref.engine.workers import product_threads, share_out, taken_from

WORKSPACE_BYTES = 8 * 2**20
"""Most columns that a convolution lays out at a time, in all threads together (one output row of each at the least)."""

CACHED_BYTES = 2**20
"""Columns of a block, in each thread, unless the weights are large: half of a usual second-level cache."""

TIMES_THE_WEIGHTS = 4
"""As much as the weights may the columns of a block take in any case: every block reads all weights anew."""

ENOUGH_PLACES = 512
"""Output places that make a matrix product fast: images are put together until they have this number."""

MANY_PLACES = 96
"""From this number of output places of an image on, threads share the channels of a weight gradient, not the images."""

Padding = tuple[Pair, Pair]


@dataclass(frozen=True)
class ConvGeometry(Convolution):
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

    stride: Pair = (1, 1)
    padding: Padding = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)

    @cached_property
    def output_size(self) -> Pair:
        """(H_out, W_out)"""
        return self.output_shape[2], self.output_shape[3]

    @cached_property
    def is_depthwise(self) -> bool:
        """Whether each output channel looks at one of several input channels only."""
        return self.weight_shape[1] == 1 and self.groups > 1

    @cached_property
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
        x = np.ascontiguousarray(x)
        out = np.empty((B, g, C_out // g, H_out * W_out), x.dtype)
        grouped_weight = weight.reshape(g, C_out // g, -1)  # (g, C_out/g, K)

        def work(images: slice, rows: slice, columns: np.ndarray, spare: np.ndarray) -> None:
            block = out[images, :, :, rows.start * W_out : rows.stop * W_out]  # (b, g, C_out/g, l)
            lay_out(x[images], columns, rows, self.stride, self.padding, self.dilation)
            by_group = self._by_group(columns)  # (g, K, b·l)
            if len(block) == 1:
                product(grouped_weight, by_group, block[0])
            else:
                made = spare[: block.size].reshape(g, C_out // g, -1)  # (g, C_out/g, b·l)
                product(grouped_weight, by_group, made)
                block[:] = made.reshape(g, C_out // g, len(block), -1).transpose(2, 0, 1, 3)

        self._in_blocks(x.dtype, work)
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
        g = self.groups
        transposed_weight = weight.reshape(g, C_out // g, -1).transpose(0, 2, 1)  # (g, K, C_out/g)
        grad = np.zeros(self.input_shape, grad_output.dtype)

        def work(images: slice, rows: slice, columns: np.ndarray, spare: np.ndarray) -> None:
            block = grad_output[images, :, rows].transpose(1, 0, 2, 3)  # (C_out, b, n, W_out)
            if block.shape[1] > 1:
                laid_out = spare[: block.size].reshape(block.shape)
                laid_out[...] = block
                block = laid_out
            product(transposed_weight, block.reshape(g, C_out // g, -1), self._by_group(columns))
            add_columns(columns, grad[images], rows, self.stride, self.padding, self.dilation)

        self._in_blocks(grad_output.dtype, work)
        return grad

    def weight_gradient(self, x: np.ndarray, grad_output: np.ndarray) -> np.ndarray:
        """dW[o,c,p,q] = Σ_{b,h,w} G[b,o,h,w] · X[b, c, s·h + d·p − top, s·w + d·q − left]."""
        C_out, g = self.weight_shape[0], self.groups
        if self.is_depthwise:
            return kernels_depthwise.depthwise_weight_gradient(
                x, grad_output, self.weight_shape, self.stride, self.padding, self.dilation
            )
        grad = np.zeros(self.weight_shape, grad_output.dtype)
        x = np.ascontiguousarray(x)
        C_in = x.shape[1]
        parts = self.channel_parts()
        bounds = [C_in * i // parts for i in range(parts + 1)]
        # What the parts write on is there before they begin: memory does not depend on which of them run at a time.
        rooms = {}
        for first, stop in itertools.pairwise(bounds):
            K = (stop - first) // g * math.prod(self.weight_shape[2:])
            largest = self.channel_block(x.itemsize, stop - first)
            columns = self._workspace(x.dtype, largest, stop - first)
            rooms[first] = largest, columns, np.empty((g, C_out // g, K), x.dtype)

        def part(first: int, stop: int) -> None:  # of the channels
            (largest, columns, made), width = rooms[first], (stop - first) // g
            for images, rows in self.blocks(range(len(x)), largest):
                block = self._block(columns, images, rows)
                lay_out(x[images], block, rows, self.stride, self.padding, self.dilation, first)
                product(self._grouped(grad_output[images, :, rows]), self._by_group(block).transpose(0, 2, 1), made)
                grad[:, first : first + width] += made.reshape(C_out, width, *self.weight_shape[2:])

        share_out(parts, C_in, part)
        self._count()
        return grad

    def _count(self) -> None:
        """Report the multiply-adds of one of the three products, whose blocks may run in other threads."""
        add(self._macs)

    # ---- columns -------------------------------------------------------------------------

    @cached_property
    def _macs(self) -> int:
        """Multiply-adds of each of the three products."""
        return math.prod(self.output_shape) * math.prod(self.weight_shape[1:])

    def image_parts(self) -> int:
        """How many threads share out the images: one where a product would have one."""
        return min(product_threads(), self.input_shape[0]) if self._macs >= SHARED_MACS else 1

    def channel_parts(self) -> int:
        """How many threads share out the input channels of a weight gradient; one where they share its products."""
        many = math.prod(self.output_size) >= MANY_PLACES and self.groups == 1
        return min(product_threads(), self.input_shape[1]) if many else 1

    def image_block(self, itemsize: int) -> Pair:
        """(images, output rows) whose patches a thread lays out at a time; asked before the images are shared out.

        Columns take :data:`CACHED_BYTES` or :data:`TIMES_THE_WEIGHTS` the weights, whichever are more, within the
        thread's share of :data:`WORKSPACE_BYTES`; a single row at the least. Several images have :data:`ENOUGH_PLACES`
        together at most.
        """
        parts = self.image_parts()
        weight_bytes = math.prod(self.weight_shape) * itemsize
        room = min(WORKSPACE_BYTES // parts, max(CACHED_BYTES, TIMES_THE_WEIGHTS * weight_bytes))
        most = min(-(-self.input_shape[0] // parts), ENOUGH_PLACES // math.prod(self.output_size))
        return self._fitting(most, room // itemsize, self.input_shape[1])

    def channel_block(self, itemsize: int, channels: int) -> Pair:
        """(images, output rows) of which a weight gradient lays out the patches of some input channels at a time.

        Its products sum over the places of a block, so that all images that fit are put together.
        """
        many = math.prod(self.output_size) >= MANY_PLACES
        room = min(WORKSPACE_BYTES, CACHED_BYTES) if many else WORKSPACE_BYTES
        return self._fitting(self.input_shape[0], room // itemsize, channels)

    def _fitting(self, most: int, numbers: int, channels: int) -> Pair:
        """As many images as have room for the patches of their channels, or rows of one."""
        H_out, W_out = self.output_size
        row = channels * math.prod(self.weight_shape[2:]) * W_out
        images = max(1, min(most, numbers // (row * H_out)))
        return images, H_out if images > 1 else max(1, min(H_out, numbers // row))

    def blocks(self, images: range, block: Pair) -> Iterator[tuple[slice, slice]]:
        """(images, output rows) of the blocks that these images are cut into; rows run innermost."""
        together, rows = block
        H_out = self.output_size[0]
        for b in range(images.start, images.stop, together):
            for h in range(0, H_out, rows):
                yield slice(b, min(b + together, images.stop)), slice(h, min(h + rows, H_out))

    def _in_blocks(self, dtype: np.dtype, work: Callable[[slice, slice, np.ndarray, np.ndarray], None]) -> None:
        """``work(images, rows, columns, spare)`` for each block, in several threads.

        ``columns`` are to be written on, and so is ``spare``, which has room for the outputs of several images.
        """
        B, largest = self.input_shape[0], self.image_block(dtype.itemsize)
        outputs = self.weight_shape[0] * math.prod(largest) * self.output_size[1] if largest[0] > 1 else 0
        rooms = [(self._workspace(dtype, largest), np.empty(outputs, dtype)) for _ in range(self.image_parts())]
        of_image = [list(self.blocks(range(b, min(b + largest[0], B)), largest)) for b in range(0, B, largest[0])]
        left = deque(of_image)

        def part(start: int, stop: int) -> None:
            for columns, spare in rooms[start:stop]:
                for blocks in taken_from(left):
                    for images, rows in blocks:
                        work(images, rows, self._block(columns, images, rows), spare)

        share_out(len(rooms), len(rooms), part)
        self._count()

    def _workspace(self, dtype: np.dtype, block: Pair, channels: int | None = None) -> np.ndarray:
        """Room for the columns of a block: (C_in, k_h, k_w, b, n, W_out), or of some channels."""
        return np.empty((channels or self.input_shape[1], *self.weight_shape[2:], *block, self.output_size[1]), dtype)

    @staticmethod
    def _block(columns: np.ndarray, images: slice, rows: slice) -> np.ndarray:
        """As much of a workspace as a block needs, in one piece."""
        shape = (*columns.shape[:3], images.stop - images.start, rows.stop - rows.start, columns.shape[-1])
        return columns.reshape(-1)[: math.prod(shape)].reshape(shape)

    def _by_group(self, columns: np.ndarray) -> np.ndarray:
        """Columns as matrices: (g, K, b·n·W_out)."""
        return columns.reshape(self.groups, -1, math.prod(columns.shape[3:]))

    def _grouped(self, block: np.ndarray) -> np.ndarray:
        """Rows of an output gradient, (b, C_out, n, W_out), as they meet the columns: (g, C_out/g, b·n·W_out)."""
        g, C_out = self.groups, self.weight_shape[0]
        return block.transpose(1, 0, 2, 3).reshape(g, C_out // g, -1)

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
        b, C_in, H, W = x.shape
        (k_h, k_w), W_out, g = self.weight_shape[2:], self.output_size[1], self.groups
        (top, _), (left, right) = self.padding
        (s_h, s_w), (d_h, d_w) = self.stride, self.dilation
        rows = slice(0, self.output_size[0]) if rows is None else rows
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
        return patches.reshape(b, g, -1, n * W_out)


@dataclass(frozen=True)
class LinearGeometry(Geometry):
    """Sizes of one linear layer: input (..., I), weight (O, I), output (..., O)."""

    @cached_property
    def output_shape(self) -> Shape:
        return (*self.input_shape[:-1], self.weight_shape[0])

    def forward(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Y = X Wᵀ"""
        out = matmul(_as_matrix(x), weight.T)
        return out if x.ndim == 2 else out.reshape(self.output_shape)

    def input_gradient(self, weight: np.ndarray, grad_output: np.ndarray) -> np.ndarray:
        """dX = G W"""
        if grad_output.ndim == 2:
            return matmul(grad_output, weight)
        grad = np.empty(self.input_shape, grad_output.dtype)  # not a view of the product: a leaf then need not copy it
        matmul(_as_matrix(grad_output), weight, out=_as_matrix(grad))
        return grad

    def weight_gradient(self, x: np.ndarray, grad_output: np.ndarray) -> np.ndarray:
        """dW = Gᵀ X, summed over all leading axes."""
        return matmul(_as_matrix(grad_output).T, _as_matrix(x))


def _as_matrix(array: np.ndarray) -> np.ndarray:
    """(..., n) as (rows, n)."""
    return array if array.ndim == 2 else array.reshape(-1, array.shape[-1])
