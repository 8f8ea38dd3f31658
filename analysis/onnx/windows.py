"""ONNX's operations on windows of a sequence, an image or a volume: convolution, pooling, padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from analysis.onnx.file import Node
from analysis.onnx.host import argument, axes_of, integers
from analysis.onnx.numbers import Inputs, number
from lance_ref import functional as F
from lance_ref.engine.tensor import Tensor

Sizes = tuple[int, ...]
Sides = tuple[tuple[int, int], ...]
"""What is added before and after each axis."""


def sizes_of(node: Node, name: str, count: int, default: int | None = 1) -> Sizes:
    """An attribute with a number for each axis behind the channels."""
    value = integers(node.attributes.get(name) or ((default,) * count if default is not None else ()), name)
    if len(value) != count or (value and min(value) < 1):
        raise ValueError(f"{name} is {value}, expected {count} sizes, one for each axis of an image")
    return value


def padding_of(node: Node, size: Sequence[int], kernel: Sizes, stride: Sizes, dilation: Sizes) -> Sides:
    """((before, after), ...) of a convolution or pool on an image of this size."""
    mode, count = node.attributes.get("auto_pad", "NOTSET"), len(size)
    if mode == "VALID":
        return ((0, 0),) * count
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        pairs = []
        for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
            total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
            less, more = total // 2, total - total // 2
            pairs.append((less, more) if mode == "SAME_UPPER" else (more, less))
        return tuple(pairs)
    sides = integers(node.attributes.get("pads") or (0,) * (2 * count), "pads")
    if mode != "NOTSET" or len(sides) != 2 * count or min(sides, default=0) < 0:
        raise ValueError(f"auto_pad is {mode!r} and pads are {sides}, expected {2 * count} sizes")
    return tuple(zip(sides[:count], sides[count:], strict=True))


def as_pads(sides: Sides) -> list[int]:
    """PyTorch's order, last axis first."""
    return [n for pair in reversed(sides) for n in pair]


# ---- convolution ---------------------------------------------------------------------------


def conv_sizes(node: Node, weight_shape: Sequence[int]) -> dict[str, Any]:
    """Stride, dilation and groups of a Conv, for each axis of its kernel."""
    count = len(weight_shape) - 2
    if not 1 <= count <= 3:
        raise ValueError(f"weight has shape {tuple(weight_shape)}, expected 3 to 5 dimensions")
    sizes = {"stride": sizes_of(node, "strides", count), "dilation": sizes_of(node, "dilations", count)}
    return sizes | {"groups": node.attributes.get("group", 1)}


def convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, sides: Sides, sizes: dict[str, Any], **more: Any
) -> Tensor:
    """A convolution of any number of axes."""
    if len(sides) == 1:
        return F.conv1d(x, weight, bias, padding=sides[0], **_first(sizes), **more)
    if len(sides) == 2:
        return F.conv2d(x, weight, bias, padding=sides, **sizes, **more)
    if any(before != after for before, after in sides):
        x, sides = F.pad(x, as_pads(sides)), ((0, 0),) * 3
    return F.conv3d(x, weight, bias, padding=[before for before, _ in sides], **sizes, **more)


def _first(sizes: dict[str, Any]) -> dict[str, Any]:
    """Sizes of one axis as numbers."""
    return {name: value[0] if isinstance(value, tuple) else value for name, value in sizes.items()}


def _conv(node: Node, x: Inputs) -> Tensor:
    """A convolution whose weight is computed; one whose weight is stored is a layer."""
    image, weight, bias = (*x, None)[:3]
    sizes = conv_sizes(node, weight.shape)
    sides = padding_of(node, image.shape[2:], weight.shape[2:], sizes["stride"], sizes["dilation"])
    return convolved(image, weight, bias, sides, sizes)


def transposed_sizes(node: Node, size: Sequence[int], kernel: Sizes) -> dict[str, Any]:
    """Sizes of a ConvTranspose as :func:`lance_ref.functional.conv_transpose2d` takes them, and what is cut off beyond.

    "cut": ((before, after), ...), of the result without padding, where the two sides differ.
    """
    count = len(kernel)
    stride, dilation = sizes_of(node, "strides", count), sizes_of(node, "dilations", count)
    more = integers(node.attributes.get("output_padding") or (0,) * count, "output_padding")
    wanted = node.attributes.get("output_shape")
    full = [
        (n - 1) * s + d * (k - 1) + 1 + m for n, s, d, k, m in zip(size, stride, dilation, kernel, more, strict=True)
    ]
    mode = node.attributes.get("auto_pad", "NOTSET")
    if wanted or mode in ("SAME_UPPER", "SAME_LOWER"):
        target = integers(wanted, "output_shape") if wanted else tuple(n * s for n, s in zip(size, stride, strict=True))
        totals = [have - want for have, want in zip(full, target, strict=True)]
        if min(totals) < 0:
            raise ValueError(f"output_shape is {target}, expected at most {tuple(full)}")
        halves = [(t - t // 2, t // 2) if mode == "SAME_LOWER" else (t // 2, t - t // 2) for t in totals]
        sides: Sides = tuple(halves)
    else:
        sides = padding_of(node, size, kernel, stride, dilation)
    even = all(before == after for before, after in sides)
    padding = tuple(before for before, _ in sides) if even else (0,) * count
    cut = None if even else sides
    sizes = {"stride": stride, "dilation": dilation, "output_padding": more, "padding": padding}
    return sizes | {"groups": node.attributes.get("group", 1), "cut": cut}


def transposed(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: dict[str, Any], **more: Any) -> Tensor:
    """A transposed convolution of images, or of sequences, which are images of height 1."""
    sizes = dict(sizes)
    cut = sizes.pop("cut")
    if x.ndim == 3:
        image, kernel = F.reshape(x, (*x.shape[:2], 1, x.shape[2])), weight
        if weight.ndim == 3:
            kernel = F.reshape(weight, (*weight.shape[:2], 1, weight.shape[2]))
        zeros = {"output_padding": 0, "padding": 0}
        wide: dict[str, Any] = {n: (zeros.get(n, 1), *v) if isinstance(v, tuple) else v for n, v in sizes.items()}
        y = F.conv_transpose2d(image, kernel, bias, **wide, **more)
        y = F.reshape(y, (*y.shape[:2], y.shape[3]))
    elif x.ndim == 4:
        y = F.conv_transpose2d(x, weight, bias, **sizes, **more)
    else:
        raise ValueError(f"x has shape {x.shape}, expected a transposed convolution of sequences or images")
    if cut is None:
        return y
    inside = zip(cut, y.shape[2:], strict=True)
    return y[(slice(None), slice(None), *(slice(before, n - after) for (before, after), n in inside))]


def _conv_transpose(node: Node, x: Inputs) -> Tensor:
    image, weight, bias = (*x, None)[:3]
    return transposed(image, weight, bias, transposed_sizes(node, image.shape[2:], weight.shape[2:]))


# ---- pooling --------------------------------------------------------------------------------


def _pool(node: Node, x: Inputs) -> Tensor:
    """Windows that reach beyond one side alone, or are rounded up, are those of an image that is padded before."""
    tensor, largest = x[0], node.op == "MaxPool"
    if len(node.outputs) > 1 and node.outputs[1]:
        raise ValueError("the places of the maxima are asked for, expected their values alone")
    if not 3 <= tensor.ndim <= 5:
        raise ValueError(f"x has shape {tensor.shape}, expected sequences, images or volumes, 3 to 5 dimensions")
    if tensor.ndim == 3:
        y = _pool(_on_a_row(node), [F.reshape(tensor, (*tensor.shape[:2], 1, tensor.shape[2]))])
        return F.reshape(y, (*y.shape[:2], y.shape[3]))
    count = tensor.ndim - 2
    if sizes_of(node, "dilations", count) != (1,) * count:
        raise ValueError("dilations are not 1")
    kernel, stride = sizes_of(node, "kernel_shape", count, None), sizes_of(node, "strides", count)
    sides = padding_of(node, tensor.shape[2:], kernel, stride, (1,) * count)
    counted, ceil_mode = bool(node.attributes.get("count_include_pad", 0)), bool(node.attributes.get("ceil_mode", 0))
    even = all(before == after and 2 * before <= k for (before, after), k in zip(sides, kernel, strict=True))
    if even and (count == 2 or not ceil_mode):
        padding = tuple(before for before, _ in sides)
        options: dict[str, Any] = {} if count == 3 else {"ceil_mode": ceil_mode}
        if largest:
            return (F.max_pool2d if count == 2 else F.max_pool3d)(tensor, kernel, stride, padding, **options)
        return (F.avg_pool2d if count == 2 else F.avg_pool3d)(
            tensor, kernel, stride, padding, count_include_pad=counted, **options
        )
    whole = sides
    if ceil_mode:
        axes = zip(tensor.shape[2:], kernel, stride, sides, strict=True)
        whole = tuple(rounded_up(*of_axis) for of_axis in axes)
    if largest:
        return _largest(tensor, kernel, stride, whole)
    return _mean(tensor, kernel, stride, sides, whole, counted)


def _on_a_row(node: Node) -> Node:
    """A pool of sequences as one of images of height 1."""
    attributes = dict(node.attributes)
    for name in ("kernel_shape", "strides", "dilations"):
        if attributes.get(name):
            attributes[name] = (1, *integers(attributes[name], name))
    if attributes.get("pads"):
        before, after = integers(attributes["pads"], "pads")
        attributes["pads"] = (0, before, 0, after)
    return replace(node, attributes=attributes)


def _largest(x: Tensor, kernel: Sizes, stride: Sizes, sides: Sides) -> Tensor:
    """Padded by what one side has more than the other; the rest is the pool's own."""
    own = tuple(
        min(before, after) if 2 * min(before, after) <= k else 0
        for (before, after), k in zip(sides, kernel, strict=True)
    )
    odd = tuple((before - p, after - p) for (before, after), p in zip(sides, own, strict=True))
    padded = F.pad(x, as_pads(odd), value=-math.inf) if any(map(any, odd)) else x
    return (F.max_pool2d if len(own) == 2 else F.max_pool3d)(padded, kernel, stride, own)


def _mean(x: Tensor, kernel: Sizes, stride: Sizes, sides: Sides, whole: Sides, counted: bool) -> Tensor:
    """The mean of whole windows of the padded image, times what windows have more than they count."""
    padded = F.pad(x, as_pads(whole))
    y = (F.avg_pool2d if len(kernel) == 2 else F.avg_pool3d)(padded, kernel, stride)
    inside = np.ones([n + (sum(s) if counted else 0) for n, s in zip(x.shape[2:], sides, strict=True)])
    widths = [
        (total[0] - (s[0] if counted else 0), total[1] - (s[1] if counted else 0))
        for total, s in zip(whole, sides, strict=True)
    ]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(inside, widths), kernel)
    windows = windows[tuple(slice(None, None, s) for s in stride)]
    counts = windows.sum(axis=tuple(range(-len(kernel), 0)))
    if (counts == 0).any():
        raise ValueError("an average over a window that lies outside of the image")
    factors = (math.prod(kernel) / counts).astype(x.dtype)
    return y if (factors == 1).all() else y * Tensor(factors)


def rounded_up(n: int, kernel: int, stride: int, sides: tuple[int, int]) -> tuple[int, int]:
    """The padding of one axis with which whole windows alone are those of ceil_mode: none begins beyond the image."""
    before, after = sides
    beside_the_first = -(-(n + before + after - kernel) // stride)
    if beside_the_first * stride >= n + before:
        beside_the_first -= 1
    return before, max(beside_the_first * stride + kernel - n - before, 0)


def _global_pool(node: Node, x: Inputs) -> Tensor:
    if x[0].ndim == 4:
        return F.adaptive_avg_pool2d(x[0], 1)
    return F.mean(x[0], tuple(range(2, x[0].ndim)), True)


def _global_max_pool(node: Node, x: Inputs) -> Tensor:
    (tensor, *_), count = x, x[0].ndim - 2
    pools: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
    if count not in pools:
        raise ValueError(f"x has shape {tensor.shape}, expected 3 to 5 dimensions")
    return pools[count](tensor, tensor.shape[2:] if count > 1 else tensor.shape[2])


def _lrn(node: Node, x: Inputs) -> Tensor:
    """As PyTorch's: the mean of squares over neighbouring channels, by a pool of volumes."""
    (tensor, *_), size = x, node.attributes["size"]
    alpha, beta, bias = (
        float(node.attributes.get(name, default)) for name, default in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0))
    )
    squares = tensor * tensor
    B, C, *places = squares.shape
    around = F.pad(F.reshape(squares, (B, 1, C, *_two(places))), (0, 0, 0, 0, (size - 1) // 2, size // 2))
    means = F.reshape(F.avg_pool3d(around, (size, 1, 1), 1), squares.shape)
    return tensor / (means * alpha + bias) ** beta


def _two(places: Sequence[int]) -> tuple[int, int]:
    return (places[0], math.prod(places[1:])) if places else (1, 1)


# ---- padding --------------------------------------------------------------------------------


def _pad(node: Node, x: Inputs) -> Tensor:
    sides = integers(argument(node, x, 1, "pads"), "pads")
    axes = axes_of(x[3], x[0].ndim) if len(x) > 3 and x[3] is not None else list(range(x[0].ndim))
    if len(sides) != 2 * len(axes):
        raise ValueError(f"pads are {sides}, expected two for each of the axes {axes}")
    before, after = dict(zip(axes, sides, strict=False)), dict(zip(axes, sides[len(axes) :], strict=True))
    value = number(argument(node, x, 2, "value"), "the padding", 0.0)
    widths = [side.get(axis, 0) for axis in reversed(range(x[0].ndim)) for side in (before, after)]
    cut = tuple(slice(max(-before.get(i, 0), 0), n - max(-after.get(i, 0), 0)) for i, n in enumerate(x[0].shape))
    inside = x[0][cut] if min(widths, default=0) < 0 else x[0]  # a negative width takes away
    wide = [max(n, 0) for n in widths]
    mode = node.attributes.get("mode", "constant")
    if mode == "constant":
        return F.pad(inside, wide, value=value)
    if mode not in ("reflect", "edge", "wrap"):
        raise ValueError(f"mode is {mode!r}, expected 'constant', 'reflect', 'edge' or 'wrap'")
    for axis, n in enumerate(inside.shape):
        first, last = wide[2 * (inside.ndim - 1 - axis) : 2 * (inside.ndim - axis)]
        if first or last:
            places = np.pad(np.arange(n), (first, last), mode=mode)
            inside = inside[(slice(None),) * axis + (places,)]
    return inside


WINDOWS = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_max_pool,
    "LRN": _lrn,
    "Pad": _pad,
}
"""What each of these operations is here."""
