"""What the products hold at a time: convolutions, linear layers and matrix products.

A layer's forward pass makes its result and then what its activation store keeps; its backward pass makes the
gradients of input, weight and bias one after the other. A convolution that is neither pointwise nor depthwise lays
out its patches in blocks of :data:`COLUMNS` bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from analysis.peak import updates
from analysis.peak.arrays import UFUNC_BUFFER, like_input, new, packing, reshaping
from analysis.peak.rules import Backward, backward, forward
from analysis.peak.stores import STORES, Layer, StorePeak, threads
from analysis.rules import subspace
from analysis.rules.layouts import Layout, Storage
from analysis.rules.op_cost import Call
from analysis.rules.products import IN_COORDINATES
from analysis.rules.stores import STORES as COSTS

COLUMNS = 8 * 2**20
"""Bytes of a block of patches."""

ONE_BY_ONE = 512
"""Images with so many places in the output are not put together in a block."""

NO_PADDING = ((0, 0), (0, 0))

NARROW_MAP, FEW_CHANNELS = 28, 8
"""Depthwise maps up to this width, with at least so many channels, are worked on with the channels innermost."""


@dataclass(frozen=True)
class Convolution:
    """The sizes of one convolution, and what its three products take beside input, weight and output gradient."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    out: tuple[int, ...]
    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    groups: int
    itemsize: int

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.weight[1] == 1

    @property
    def pointwise(self) -> bool:
        return self.weight[2:] == (1, 1) and self.stride == (1, 1) and not self._padded and self.groups == 1

    @property
    def _padded(self) -> bool:
        return any(n for side in self.padding for n in side)

    @property
    def _block(self) -> tuple[int, int]:
        """(images, output rows) of a block."""
        B, _, H_out, W_out = self.out
        row = self.x[1] * self.weight[2] * self.weight[3] * W_out * self.itemsize
        images = 1 if H_out * W_out >= ONE_BY_ONE else max(1, min(B, COLUMNS // (row * H_out)))
        return images, H_out if images > 1 else max(1, min(H_out, COLUMNS // row))

    @property
    def _columns(self) -> int:
        """Bytes of a block of patches."""
        images, rows = self._block
        return images * rows * self.x[1] * self.weight[2] * self.weight[3] * self.out[3] * self.itemsize

    @property
    def _outputs(self) -> int:
        """Bytes of a block of the output, channels first, which one image has already."""
        images, rows = self._block
        return 0 if images == 1 else images * self.out[1] * rows * self.out[3] * self.itemsize

    @property
    def _grouped(self) -> int:
        """Bytes of a block of the output gradient, channels first; 0 where that is a view."""
        (images, rows), (_, C_out, H_out, W_out) = self._block, self.out
        block = Layout(Storage(0), (C_out, images, rows, W_out), (H_out * W_out, C_out * H_out * W_out, W_out, 1))
        by_group = block.reshaped((self.groups, C_out // self.groups, images * rows * W_out))
        return 0 if by_group is not None else images * C_out * rows * W_out * self.itemsize

    @property
    def _window(self) -> int:
        """Bytes of the padded piece of the input under a block; 0 where nothing is padded."""
        if not self._padded:
            return 0
        images, _ = self._block
        return images * self.x[1] * self._window_height * self._width * self.itemsize

    @property
    def _window_height(self) -> int:
        """Rows of the input, with its padding, under a block."""
        return min((self._block[1] - 1) * self.stride[0] + (self.weight[2] - 1) * self.dilation[0] + 1, self._height)

    def _loops(self, parts: int) -> int:
        """Bytes that the depthwise loops lay out themselves: an image, channels innermost, or a plane, per thread.

        The channels of the weight gradient are shared out instead (``parts`` 1).
        """
        C, k_h, k_w = self.x[1], *self.weight[2:]
        plane = self._height * self._width
        if not (C == self.weight[0] >= FEW_CHANNELS and self.out[3] <= NARROW_MAP):
            return min(threads(), self.x[0] * C) * plane * self.itemsize
        return min(threads(), parts) * (plane + k_h * k_w + 1) * C * self.itemsize

    @property
    def _height(self) -> int:
        return self.x[2] + sum(self.padding[0])

    @property
    def _width(self) -> int:
        return self.x[3] + sum(self.padding[1])

    @property
    def _patches_are_views(self) -> bool:
        (images, rows), (C, (k_h, k_w), W) = self._block, (self.x[1], self.weight[2:], self._width)
        plane = W * (self._window_height if self._padded else self.x[2])
        patches = Layout(
            Storage(0),
            (C, k_h, k_w, images, rows, self.out[3]),
            (plane, W * self.dilation[0], self.dilation[1], C * plane, W * self.stride[0], self.stride[1]),
        )
        columns = (self.groups, C // self.groups * k_h * k_w, images * rows * self.out[3])
        return patches.reshaped(columns) is not None

    def copied(self, layout: Layout) -> int:
        """Bytes of the copy of an input or output gradient that a product needs: packed, or plane by plane."""
        if self.depthwise:
            return packing(layout, self.itemsize)
        return reshaping(layout, (*layout.shape[:2], math.prod(layout.shape[2:])), self.itemsize)

    @property
    def _laid_out(self) -> int:
        """Bytes of a block of patches; 0 where they are a view of the input, or of its padded piece."""
        return 0 if self._patches_are_views else self._columns

    def forward_workspace(self, x_copy: int) -> int:
        """``x_copy``: a copy of the input."""
        if self.depthwise:
            return x_copy + self._loops(self.x[0])
        if self.pointwise:
            return x_copy
        return self._laid_out + max(self._window, self._outputs)

    def input_workspace(self, g_copy: int) -> int:
        """Beside the input gradient."""
        if self.depthwise:
            return g_copy + self._loops(self.x[0])
        if self.pointwise:
            return g_copy
        images, rows = self._block
        copied = images * self.out[1] * rows * self.out[3] * self.itemsize if g_copy else self._grouped
        return copied + self._columns

    def weight_workspace(self, copies: int) -> int:
        """Beside the weight gradient."""
        if self.depthwise:
            return copies + self._loops(1)
        weights = math.prod(self.weight) * self.itemsize
        return self._laid_out + max(self._window, self._grouped + weights)


def convolution(call: Call) -> Convolution:
    """The sizes of a conv2d record."""
    x, weight, a = call.record.inputs[0], call.weight, call.record.attributes
    return Convolution(
        x.shape, weight.shape, call.record.output.shape, tuple(a["stride"]), a["padding"], tuple(a["dilation"]),
        a["groups"], call.itemsize,
    )  # fmt: skip


def resized(layer: Convolution, x: tuple[int, ...], weight: tuple[int, ...], out: tuple[int, ...]) -> Convolution:
    """Another convolution with the strides, padding and dilation of this one."""
    groups = layer.groups if weight[1] == layer.weight[1] and weight[0] == layer.weight[0] else 1
    return Convolution(x, weight, out, layer.stride, layer.padding, layer.dilation, groups, layer.itemsize)


@forward("conv2d", "linear")
def weighted(call: Call) -> int:
    """The result with the workspace of the product, or the result with what the store makes."""
    result = call.n_out * call.itemsize
    workspace = _product(call)
    if subspace.update_of(call.record) is not None:
        workspace = updates.forward(call, result, workspace, _narrow(call)) - result
    saving = _store(call).save(call, _layer(call)) if call.needs(1) else 0
    bias = min(UFUNC_BUFFER, call.n_out) * call.itemsize if call.has_bias else 0  # of adding it
    return result + max(workspace, saving, bias)


def _product(call: Call) -> int:
    """Bytes beside input, weight and result of the product itself."""
    x, layout = call.record.inputs[0], call.inputs[0]
    if call.record.op == "conv2d":
        return convolution(call).forward_workspace(convolution(call).copied(layout))
    return reshaping(layout, (x.size // x.shape[-1], x.shape[-1]), call.itemsize)


@backward("conv2d", "linear")
def weighted_backward(call: Call, g: Layout) -> Backward:
    """The three gradients one after the other; what is made stays."""
    item = call.itemsize
    store, layer = _store(call), _layer(call)
    grads: list[Layout | None] = [None] * len(call.inputs)
    held = most = 0
    updated = subspace.update_of(call.record) is not None
    if call.needs(0):
        grads[0] = like_input(call)
        held = call.n_in * item
        if updated:
            most = updates.input_gradient(call, held, layer.input_workspace(g), _narrow(call))
        else:
            most = store.input_gradient(call, layer, g) if store.input_gradient else held + layer.input_workspace(g)
    if call.needs(1):
        grads[1] = like_input(call, 1)
        weights = call.record.inputs[1].nbytes
        own, name = call, call.record.attributes["store"]["name"]
        if updated and name == "lance":
            own = subspace.of_update(call)
        making = store.weight_gradient(own, _layer(own), g)
        if updated and name not in IN_COORDINATES:
            making += updates.coordinates(call)
        most = max(most, held + weights + making)
        held += weights
    if updated and call.needs(len(call.inputs) - 1):
        grads[-1] = like_input(call, len(call.inputs) - 1)
    if call.has_bias and call.needs(2):
        grads[2] = like_input(call, 2)
        rows = call.n_out // call.record.output.shape[-1]
        copy = reshaping(g, (rows, call.record.output.shape[-1]), item) if call.record.op == "linear" else 0
        most = max(most, held + call.record.inputs[2].nbytes + copy)
    return Backward(most, tuple(grads), frozenset({1}) if store.shared(call) else frozenset())


def _narrow(call: Call) -> updates.Narrow:
    """The two narrow layers of an update: elements between them, and what their products take."""
    x, weight, out = call.record.inputs[0].shape, call.weight.shape, call.record.output.shape
    r, item = call.record.attributes["update"]["rank"], call.itemsize
    if call.record.op == "linear":
        return updates.Narrow(math.prod(x[:-1]) * r * item)
    layer, D = convolution(call), call.record.inputs[1].shape
    if call.record.attributes["update"]["patches"]:
        between = (x[0], r, *out[2:])
        down = replace(layer, weight=(r, *weight[1:]), out=between)
        up = Convolution(between, D, out, (1, 1), NO_PADDING, (1, 1), 1, item)
    else:
        between = (x[0], layer.groups * r, *x[2:])
        down = Convolution(x, (between[1], weight[1], 1, 1), between, (1, 1), NO_PADDING, (1, 1), layer.groups, item)
        up = replace(layer, x=between, weight=D)
    size = math.prod(between) * item
    works = [(each.forward_workspace(0), each.input_workspace(0)) for each in (down, up)]
    return updates.Narrow(size, *(each[0] for each in works), *(each[1] for each in works))


def _store(call: Call) -> StorePeak:
    """The rules of the layer's store; for one without, an upper estimate."""
    return STORES.get(call.record.attributes["store"]["name"], ESTIMATED)


def _estimated_save(call: Call, layer: Layer) -> int:
    """What it keeps, and an array of the input's size to make that from."""
    kept = COSTS[call.record.attributes["store"]["name"]](call, 0).tape
    return sum(saved.storage.nbytes for saved in kept) + call.n_in * call.itemsize


def _estimated_weight(call: Call, layer: Layer, g: Layout) -> int:
    """The input made again, another array of its size, and the exact product."""
    return 2 * call.n_in * call.itemsize + layer.weight_workspace(g, call.inputs[0])


ESTIMATED = StorePeak(_estimated_save, _estimated_weight)
"""Of an activation store without rules of its own; the report says so."""


@dataclass(frozen=True)
class _Convolved(Layer):
    conv: Convolution

    def input_workspace(self, g: Layout) -> int:
        return self.conv.input_workspace(self.conv.copied(g))

    def weight_workspace(self, g: Layout, x: Layout | None) -> int:
        copies = self.conv.copied(g) + (0 if x is None else self.conv.copied(x))
        return self.conv.weight_workspace(copies)

    def smaller(self, x: tuple[int, ...], weight: tuple[int, ...], out: tuple[int, ...]) -> int:
        return resized(self.conv, x, weight, out).weight_workspace(0)


@dataclass(frozen=True)
class _Linear(Layer):
    itemsize: int

    def input_workspace(self, g: Layout) -> int:
        return reshaping(g, (math.prod(g.shape[:-1]), g.shape[-1]), self.itemsize)

    def weight_workspace(self, g: Layout, x: Layout | None) -> int:
        both = [g] if x is None else [g, x]
        return sum(reshaping(a, (math.prod(a.shape[:-1]), a.shape[-1]), self.itemsize) for a in both)

    def smaller(self, x: tuple[int, ...], weight: tuple[int, ...], out: tuple[int, ...]) -> int:
        return 0


def _layer(call: Call) -> Layer:
    return _Convolved(convolution(call)) if call.record.op == "conv2d" else _Linear(call.itemsize)


@forward("matmul")
def matmul(call: Call) -> int:
    return call.n_out * call.itemsize


@backward("matmul")
def matmul_backward(call: Call, g: Layout) -> Backward:
    """One product for each operand that needs it; where broadcasting repeated the operand, it is summed afterwards."""
    batch = call.record.output.shape[: -2 if min(len(v.shape) for v in call.record.inputs) > 1 else -1]
    held = most = 0
    grads: list[Layout | None] = [None, None]
    for position in (0, 1):
        if not call.needs(position):
            continue
        value = call.record.inputs[position]
        grads[position] = new(value.shape, call.itemsize)
        full = value.nbytes
        if len(value.shape) > 2 or position == 0:
            full = max(full, math.prod(batch) * math.prod(value.shape[-2:]) * call.itemsize)
        summed = value.nbytes if full > value.nbytes else 0
        most = max(most, held + full + summed)
        held += value.nbytes
    return Backward(most, tuple(grads), frozenset({0, 1}))
