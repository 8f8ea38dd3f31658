"""What the layers with weights hold at a time: convolutions and linear layers.

A layer's forward pass makes its result and then what its activation store keeps; its backward pass makes the
gradients of input, weight and bias one after the other. A convolution that is neither pointwise nor depthwise lays
out its patches in the blocks that the library's geometry declares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from analysis.peak import updates
from analysis.peak.arrays import UFUNC_BUFFER, like_input, packing, reshaping
from analysis.peak.rules import Backward, Making, backward, forward
from analysis.peak.stores import STORES, Layer, StorePeak
from analysis.rules import subspace
from analysis.rules.layouts import Layout, Storage
from analysis.rules.op_cost import Call
from analysis.rules.products import IN_COORDINATES
from analysis.rules.stores import STORES as COSTS
from lance_ref.algebra.geometry import ConvGeometry
from lance_ref.algebra.kernels import threads
from lance_ref.algebra.kernels.depthwise import along_channels
from lance_ref.algebra.volumes import TransposedGeometry, VolumeGeometry


@dataclass(frozen=True)
class Convolution(Layer):
    """What the three products of a convolution take; a layout of None is that of a packed array."""

    geometry: ConvGeometry
    itemsize: int

    def forward_workspace(self, x: Layout | None) -> int:
        if self.geometry.is_depthwise:
            return self._copied(x) + self._loops(self.geometry.input_shape[0])
        if self.geometry.is_pointwise:
            return self._copied(x)
        outputs = 0 if self._block[0] == 1 else self._of_block(self.geometry.weight_shape[0])  # channels first
        return self._packed(x) + self._laid_out + self._threads * outputs

    def input_workspace(self, g: Layout | None) -> int:
        if self.geometry.is_depthwise:
            return self._copied(g) + self._loops(self.geometry.input_shape[0])
        if self.geometry.is_pointwise:
            return self._copied(g)
        together = self._block[0] > 1  # channels first
        grouped = self._of_block(self.geometry.weight_shape[0]) if together or self._copied(g) else 0
        return self._laid_out + self._threads * grouped

    def weight_workspace(self, g: Layout | None, x: Layout | None) -> int:
        if self.geometry.is_depthwise:
            return self._copied(g) + self._copied(x) + self._loops(1)
        (C_out, _, k_h, k_w), C_in, groups = (
            self.geometry.weight_shape,
            self.geometry.input_shape[1],
            self.geometry.groups,
        )
        parts = self.geometry.channel_parts()  # each lays out some of the channels
        total = self._packed(x)
        for i in range(parts):
            channels = C_in * (i + 1) // parts - C_in * i // parts
            block = self.geometry.channel_block(self.itemsize, channels)
            places = math.prod(block) * self.geometry.output_size[1]
            product = C_out * (channels // groups) * k_h * k_w
            total += (channels * k_h * k_w * places + product) * self.itemsize + self._grouped(block)
        return total

    def smaller(self, x: tuple[int, ...], weight: tuple[int, ...]) -> int:
        groups = self.geometry.groups if weight[:2] == self.geometry.weight_shape[:2] else 1
        geometry = replace(self.geometry, input_shape=x, weight_shape=weight, groups=groups)
        return Convolution(geometry, self.itemsize).weight_workspace(None, None)

    def on_places(self, places: tuple[int, int]) -> int:
        (B, C_in, *_), weight = self.geometry.input_shape, self.geometry.weight_shape
        point = ConvGeometry((B, C_in, *places), (*weight[:2], 1, 1), groups=self.geometry.groups)
        return Convolution(point, self.itemsize).weight_workspace(None, None)

    def _copied(self, layout: Layout | None) -> int:
        """Bytes of the copy of an input or output gradient that a product needs: packed, or plane by plane."""
        if layout is None:
            return 0
        if self.geometry.is_depthwise:
            return packing(layout, self.itemsize)
        return reshaping(layout, (*layout.shape[:2], math.prod(layout.shape[2:])), self.itemsize)

    def _packed(self, x: Layout | None) -> int:
        """Bytes of the copy of an input whose patches are laid out, unless it is packed."""
        return 0 if x is None else packing(x, self.itemsize)

    # ---- the depthwise loops -------------------------------------------------------------

    def _loops(self, parts: int) -> int:
        """Bytes that the depthwise loops lay out themselves: an image, channels innermost, or a plane, per thread.

        The channels of the weight gradient are shared out instead (``parts`` 1).
        """
        (B, C, *_), (C_out, _, k_h, k_w) = self.geometry.input_shape, self.geometry.weight_shape
        plane = math.prod(self._padded_size)
        if not along_channels(C, C_out, self.geometry.output_size[1]):
            return min(threads._threads(), B * C) * plane * self.itemsize
        return min(threads._threads(), parts) * (plane + k_h * k_w + 1) * C * self.itemsize

    @property
    def _padded_size(self) -> tuple[int, int]:
        (_, _, H, W), (rows, columns) = self.geometry.input_shape, self.geometry.padding
        return H + sum(rows), W + sum(columns)

    # ---- blocks of patches ---------------------------------------------------------------

    @cached_property
    def _block(self) -> tuple[int, int]:
        """(images, output rows) of a block."""
        return self.geometry.image_block(self.itemsize)

    def _of_block(self, numbers: int) -> int:
        """Bytes of so many numbers for every place of a block."""
        return math.prod(self._block) * self.geometry.output_size[1] * numbers * self.itemsize

    @property
    def _laid_out(self) -> int:
        """Bytes of a block of patches for each thread that lays out its own."""
        columns = self._of_block(self.geometry.input_shape[1] * math.prod(self.geometry.weight_shape[2:]))
        return self._threads * columns

    @property
    def _threads(self) -> int:
        """How many share out the images."""
        return self.geometry.image_parts()

    def _grouped(self, of: tuple[int, int]) -> int:
        """Bytes of a block of the output gradient, channels first; 0 where that is a view."""
        (images, rows), (_, C_out, H_out, W_out), groups = of, self.geometry.output_shape, self.geometry.groups
        block = Layout(Storage(0), (C_out, images, rows, W_out), (H_out * W_out, C_out * H_out * W_out, W_out, 1))
        by_group = block.reshaped((groups, C_out // groups, images * rows * W_out))
        return 0 if by_group is not None else images * rows * W_out * C_out * self.itemsize


@dataclass(frozen=True)
class Linear(Layer):
    itemsize: int

    def forward_workspace(self, x: Layout | None) -> int:
        """The copy that laying out the rows makes, if it makes one."""
        return 0 if x is None else reshaping(x, (math.prod(x.shape[:-1]), x.shape[-1]), self.itemsize)

    def input_workspace(self, g: Layout | None) -> int:
        return self.forward_workspace(g)

    def weight_workspace(self, g: Layout | None, x: Layout | None) -> int:
        return self.forward_workspace(g) + self.forward_workspace(x)

    def smaller(self, x: tuple[int, ...], weight: tuple[int, ...]) -> int:
        return 0

    def on_places(self, places: tuple[int, int]) -> int:
        return 0


@dataclass(frozen=True)
class Transposed(Layer):
    """A transposed convolution: the products of its mirror, with input and output gradient in each other's place."""

    geometry: TransposedGeometry
    itemsize: int

    @property
    def mirror(self) -> Convolution:
        return Convolution(self.geometry.mirror, self.itemsize)

    def forward_workspace(self, x: Layout | None) -> int:
        return self.mirror.input_workspace(x)

    def input_workspace(self, g: Layout | None) -> int:
        return self.mirror.forward_workspace(g)

    def weight_workspace(self, g: Layout | None, x: Layout | None) -> int:
        return self.mirror.weight_workspace(x, g)

    def smaller(self, x: tuple[int, ...], weight: tuple[int, ...]) -> int:
        groups = self.geometry.groups if weight[:2] == self.geometry.weight_shape[:2] else 1
        geometry = replace(self.geometry, input_shape=x, weight_shape=weight, groups=groups)
        return Transposed(geometry, self.itemsize).weight_workspace(None, None)

    def on_places(self, places: tuple[int, int]) -> int:
        return 0


@dataclass(frozen=True)
class Volume(Layer):
    """A convolution of volumes: the products of all frames that one depth of the kernel sees, and what they add to."""

    geometry: VolumeGeometry
    itemsize: int

    @property
    def frames(self) -> Convolution:
        return Convolution(self.geometry.frames, self.itemsize)

    def forward_workspace(self, x: Layout | None) -> int:
        """The frames, the weights of one depth and what they add to the sum; then the result beside the sum."""
        result = self._bytes(self.geometry.output_shape)
        adding = self._seen + self._of_depth + result + self.frames.forward_workspace(None)
        return self._padded + max(adding, result)

    def input_workspace(self, g: Layout | None) -> int:
        """The output gradient as frames; the padded volume, or the gradient itself, and what one depth adds to it."""
        adding = self._of_depth + self._seen + self.frames.input_workspace(None)
        if self._padded:
            adding = max(self._padded + adding - self._bytes(self.geometry.input_shape), self._padded)
        return self._bytes(self.geometry.output_shape) + adding

    def weight_workspace(self, g: Layout | None, x: Layout | None) -> int:
        product = self._seen + self._of_depth + self.frames.weight_workspace(None, None)
        return self._padded + self._bytes(self.geometry.output_shape) + product

    def smaller(self, x: tuple[int, ...], weight: tuple[int, ...]) -> int:
        groups = self.geometry.groups if weight[:2] == self.geometry.weight_shape[:2] else 1
        geometry = replace(self.geometry, input_shape=x, weight_shape=weight, groups=groups)
        return Volume(geometry, self.itemsize).weight_workspace(None, None)

    def on_places(self, places: tuple[int, int]) -> int:
        return 0

    def _bytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self.itemsize

    @property
    def _seen(self) -> int:
        """Bytes of the frames that one depth of the kernel sees."""
        return self._bytes(self.geometry.frames.input_shape)

    @property
    def _of_depth(self) -> int:
        """Bytes of the weights of one depth."""
        return self._bytes(self.geometry.frames.weight_shape)

    @property
    def _padded(self) -> int:
        """Bytes of the volume with its padding in depth; 0 without."""
        B, C, D, *size = self.geometry.input_shape
        before = self.geometry.padding[0]
        return self._bytes((B, C, D + sum(before), *size)) if any(before) else 0


def layer_of(call: Call) -> Layer:
    """The products of the layer whose call this is, with its whole weight."""
    if call.record.op == "linear":
        return Linear(call.itemsize)
    if call.record.op == "conv2d":
        return Convolution(_geometry(call), call.itemsize)
    a = call.record.attributes
    pads = tuple((p, p) for p in a["padding"])
    sizes = call.record.inputs[0].shape, call.weight.shape, tuple(a["stride"]), pads, tuple(a["dilation"]), a["groups"]
    if call.record.op == "conv3d":
        return Volume(VolumeGeometry(*sizes), call.itemsize)
    more = a["output_padding"]
    return Transposed(TransposedGeometry(*sizes, output_padding=(more[0], more[1])), call.itemsize)


def _geometry(call: Call) -> ConvGeometry:
    a = call.record.attributes
    stride, padding, dilation = tuple(a["stride"]), a["padding"], tuple(a["dilation"])
    return ConvGeometry(call.record.inputs[0].shape, call.weight.shape, stride, padding, dilation, a["groups"])


@forward("conv2d", "linear", "conv_transpose2d", "conv3d")
def weighted(call: Call) -> int:
    """The result with the workspace of the product, or the result with what the store makes."""
    layer, result = layer_of(call), call.n_out * call.itemsize
    workspace = layer.forward_workspace(call.inputs[0])
    if subspace.update_of(call.record) is not None:
        workspace = updates.forward(call, result, workspace, _narrow(call)) - result
    saving = _store(call).save(call, layer) if call.needs(1) else 0
    bias = min(UFUNC_BUFFER, call.n_out) * call.itemsize if call.has_bias else 0  # of adding it
    return result + max(workspace, saving, bias)


@backward("conv2d", "linear", "conv_transpose2d", "conv3d")
def weighted_backward(call: Call, g: Layout) -> Backward:
    """The three gradients one after the other; what is made stays."""
    store, layer, made = _store(call), layer_of(call), Making(call)
    updated = subspace.update_of(call.record) is not None
    if call.needs(0):
        beside = layer.input_workspace(g)
        made.add(0, like_input(call), 0 if store.input_gradient or updated else beside)
        if updated:
            made.most = updates.input_gradient(call, made.held, beside, _narrow(call))
        elif store.input_gradient:
            made.most = store.input_gradient(call, layer, g)
    if call.needs(1):
        name = call.record.attributes["store"]["name"]
        own = subspace.of_update(call) if updated and name == "lance" else call
        making = store.weight_gradient(own, layer_of(own), g)
        if updated and name not in IN_COORDINATES:
            making += updates.coordinates(call)
        made.add(1, like_input(call, 1), making)
    if call.has_bias and call.needs(2):
        made.add(2, like_input(call, 2), layer.forward_workspace(g) if call.record.op == "linear" else 0)
    if updated and call.needs(len(call.inputs) - 1):  # of s, one number
        made.gradients[-1] = like_input(call, len(call.inputs) - 1)
    return made.done((1,) if store.shared(call) else ())


def _narrow(call: Call) -> updates.Narrow:
    """The two narrow layers of an update: elements between them, and what their products take."""
    x, weight, out = call.record.inputs[0].shape, call.weight.shape, call.record.output.shape
    r, item = call.record.attributes["update"]["rank"], call.itemsize
    if call.record.op == "linear":
        return updates.Narrow(math.prod(x[:-1]) * r * item)
    geometry, D, groups = _geometry(call), call.record.inputs[1].shape, call.record.attributes["groups"]
    if call.record.attributes["update"]["patches"]:
        between = (x[0], r, *out[2:])
        down, up = replace(geometry, weight_shape=(r, *weight[1:])), ConvGeometry(between, D)
    else:
        between = (x[0], groups * r, *x[2:])
        down = ConvGeometry(x, (groups * r, weight[1], 1, 1), groups=groups)
        up = replace(geometry, input_shape=between, weight_shape=D)
    layers = [Convolution(each, item) for each in (down, up)]
    outputs = [layer.forward_workspace(None) for layer in layers]
    gradients = [layer.input_workspace(None) for layer in layers]
    return updates.Narrow(math.prod(between) * item, *outputs, *gradients)


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
