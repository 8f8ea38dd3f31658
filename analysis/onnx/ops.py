"""ONNX's operations in terms of the library's own: one function per operation.

Each takes a node and its inputs, Tensors or small arrays (None: absent), at least one a Tensor, and gives a
Tensor, or a list of them.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.onnx.file import Node
from analysis.onnx.host import argument, axes_of, integers, new_shape, pieces, reduced_axes, slices
from analysis.rules.operations import OPERATIONS
from lance_ref import functional as F
from lance_ref.algebra.geometry import Pair
from lance_ref.engine.tensor import Tensor

Inputs = Sequence[Any]
TensorOp = Callable[[Node, Inputs], Any]


@dataclass(frozen=True)
class Quantized:
    """What QuantizeLinear gives: the tensor, and the grid it is rounded to when DequantizeLinear takes it back."""

    x: Tensor
    scale: float
    zero_point: int
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape


def number(value: Any, what: str, default: float | None = None) -> float:
    """The one number of an array."""
    if value is None and default is not None:
        return default
    array = np.zeros(0) if isinstance(value, Tensor) else np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "iufb":
        raise ValueError(f"{what} is not one number, known beforehand")
    return float(array.reshape(()))


def operand(value: Any, like: Tensor) -> Any:
    """An array beside a Tensor: a number where it has one element, else a Tensor of the same type."""
    if isinstance(value, np.ndarray):
        if value.size == 1 and value.ndim <= like.ndim:
            return float(value.reshape(()))
        return Tensor(value.astype(like.dtype))
    return value


def _binary(function: Callable[[Any, Any], Tensor]) -> TensorOp:
    def run(node: Node, x: Inputs) -> Tensor:
        like = x[0] if isinstance(x[0], Tensor) else x[1]
        return function(operand(x[0], like), operand(x[1], like))

    return run


def _unary(function: Callable[[Tensor], Tensor]) -> TensorOp:
    return lambda node, x: function(x[0])


def _clip(node: Node, x: Inputs) -> Tensor:
    """Between 0 and 6, and from 0 up, it goes by the name of the activation function."""
    low = number(argument(node, x, 1, "min"), "the lower bound", -math.inf)
    high = number(argument(node, x, 2, "max"), "the upper bound", math.inf)
    if low == 0 and high in (6, math.inf):
        return F.relu6(x[0]) if high == 6 else F.relu(x[0])
    return F.clip(x[0], low, high)


def _hard_sigmoid(node: Node, x: Inputs) -> Tensor:
    alpha, beta = node.attributes.get("alpha", 0.2), node.attributes.get("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-5) and beta == 0.5:
        return F.hardsigmoid(x[0])
    return F.clip(x[0] * float(alpha) + float(beta), 0, 1)


def _gelu(node: Node, x: Inputs) -> Tensor:
    return F.gelu_tanh(x[0]) if node.attributes.get("approximate", "none") == "tanh" else F.gelu(x[0])


def _softmax(function: Callable[[Tensor, int], Tensor]) -> TensorOp:
    def run(node: Node, x: Inputs) -> Tensor:
        (tensor, *_), ndim = x, x[0].ndim
        (axis,) = axes_of([node.attributes.get("axis", -1 if node.opset >= 13 else 1)], ndim)
        if node.opset >= 13 or axis == ndim - 1:
            return function(tensor, axis)
        flat = tensor.reshape(math.prod(tensor.shape[:axis]), -1)  # (rows, columns): as older operator sets have it
        return function(flat, 1).reshape(tensor.shape)

    return run


def over_all_of_an_input(node: Node, shape: Sequence[int]) -> bool:
    """Whether a Softmax of a value of this shape, batch first, is over all numbers of each input of the batch."""
    (axis,) = axes_of([node.attributes.get("axis", -1 if node.opset >= 13 else 1)], len(shape))
    columns = shape[axis] if node.opset >= 13 else math.prod(shape[axis:])
    return axis > 0 and columns == math.prod(shape[1:])


def _reduce(function: Callable[..., Tensor]) -> TensorOp:
    def run(node: Node, x: Inputs) -> Tensor:
        axes = reduced_axes(node, x[0].ndim, x)
        return function(x[0], axes, bool(node.attributes.get("keepdims", 1))) if axes else x[0]

    return run


def _reshaped(node: Node, x: Inputs) -> Tensor:
    return F.reshape(x[0], new_shape(node, x[0].shape, x))


def _concat(node: Node, x: Inputs) -> Tensor:
    like = next(v for v in x if isinstance(v, Tensor))
    tensors = [v if isinstance(v, Tensor) else Tensor(v.astype(like.dtype)) for v in x]
    return F.concatenate(tensors, node.attributes["axis"])


def _split(node: Node, x: Inputs) -> list[Tensor]:
    (axis,) = axes_of([node.attributes.get("axis", 0)], x[0].ndim)
    return [x[0][(slice(None),) * axis + (part,)] for part in pieces(node, x[0].shape[axis], x)]


def _gather(node: Node, x: Inputs) -> Tensor:
    """One position is a look at the same memory; several are a copy."""
    (axis,) = axes_of([node.attributes.get("axis", 0)], x[0].ndim)
    positions = x[1]
    if not isinstance(positions, np.ndarray) or positions.dtype.kind not in "iu":
        raise ValueError("the positions are not known beforehand")
    where: Any = int(positions) if positions.ndim == 0 else positions
    return x[0][(slice(None),) * axis + (where,)]


def _pad(node: Node, x: Inputs) -> Tensor:
    sides = integers(argument(node, x, 1, "pads"), "pads")
    if node.attributes.get("mode", "constant") != "constant":
        raise ValueError(f"mode is {node.attributes['mode']!r}, expected 'constant'")
    axes = axes_of(x[3], x[0].ndim) if len(x) > 3 and x[3] is not None else list(range(x[0].ndim))
    if len(sides) != 2 * len(axes):
        raise ValueError(f"pads are {sides}, expected two for each of the axes {axes}")
    before, after = dict(zip(axes, sides, strict=False)), dict(zip(axes, sides[len(axes) :], strict=True))
    value = number(argument(node, x, 2, "value"), "the padding", 0.0)
    widths = [side.get(axis, 0) for axis in reversed(range(x[0].ndim)) for side in (before, after)]
    cut = tuple(slice(max(-before.get(i, 0), 0), n - max(-after.get(i, 0), 0)) for i, n in enumerate(x[0].shape))
    inside = x[0][cut] if min(widths, default=0) < 0 else x[0]  # a negative width takes away
    return F.pad(inside, [max(n, 0) for n in widths], value=value)


def _matmul(node: Node, x: Inputs) -> Tensor:
    """A product, with the summand that :mod:`analysis.onnx.patterns` joined it with."""
    like = x[0] if isinstance(x[0], Tensor) else x[1]
    a, b, *summand = (v if isinstance(v, Tensor) else Tensor(v.astype(like.dtype)) for v in x)
    return F.matmul(a, b) + summand[0] if summand else F.matmul(a, b)


def _gemm(node: Node, x: Inputs) -> Tensor:
    """alpha·A B + beta·C, of activations."""
    a = x[0].transpose(0, 1) if node.attributes.get("transA", 0) else x[0]
    b = x[1].transpose(0, 1) if node.attributes.get("transB", 0) else x[1]
    alpha, beta = node.attributes.get("alpha", 1.0), node.attributes.get("beta", 1.0)
    product = F.matmul(a, b)
    product = product if alpha == 1 else product * float(alpha)
    if len(x) < 3 or x[2] is None:
        return product
    c = operand(x[2], product)
    return product + (c if beta == 1 else c * float(beta))


def _conv(node: Node, x: Inputs) -> Tensor:
    """A convolution whose weight is computed; one whose weight is stored is a layer."""
    options = conv_options(node, x[1].shape)
    options["padding"] = padding_of(node, x[0].shape[2:], x[1].shape[2:], options["stride"], options["dilation"])
    return F.conv2d(x[0], x[1], x[2] if len(x) > 2 else None, **options)


def conv_options(node: Node, weight_shape: Sequence[int]) -> dict[str, Any]:
    """Stride, dilation and groups of a Conv."""
    if len(weight_shape) != 4:
        raise ValueError(f"weight has shape {tuple(weight_shape)}, expected a convolution of images, 4 dimensions")
    pairs = {"stride": "strides", "dilation": "dilations"}
    options: dict[str, Any] = {ours: pair_of(node, theirs) for ours, theirs in pairs.items()}
    return options | {"groups": node.attributes.get("group", 1)}


def pair_of(node: Node, name: str, default: Pair = (1, 1)) -> Pair:
    """An attribute with a number for height and width each."""
    value = integers(node.attributes.get(name) or default, name)
    if len(value) != 2:
        raise ValueError(f"{name} is {value}, expected two numbers, of height and width")
    return value


def padding_of(
    node: Node, size: Sequence[int], kernel: Sequence[int], stride: Pair, dilation: Pair = (1, 1)
) -> tuple[Pair, Pair]:
    """((top, bottom), (left, right)) of a convolution or pool on an image of this size."""
    mode = node.attributes.get("auto_pad", "NOTSET")
    if mode == "VALID":
        return (0, 0), (0, 0)
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        pairs = []
        for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
            total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
            less, more = total // 2, total - total // 2
            pairs.append((less, more) if mode == "SAME_UPPER" else (more, less))
        return pairs[0], pairs[1]
    sides = integers(node.attributes.get("pads") or (0, 0, 0, 0), "pads")
    if mode != "NOTSET" or len(sides) != 4 or min(sides) < 0:
        raise ValueError(f"auto_pad is {mode!r} and pads are {sides}, expected four sizes")
    return (sides[0], sides[2]), (sides[1], sides[3])


def _pool(node: Node, x: Inputs) -> Tensor:
    """A pool with unequal sides is one of an image that is padded by what one side has more than the other."""
    tensor, largest = x[0], node.op == "MaxPool"
    if tensor.ndim != 4:
        raise ValueError(f"x has shape {tensor.shape}, expected images, 4 dimensions")
    if pair_of(node, "dilations") != (1, 1):
        raise ValueError("dilations are not 1")
    kernel, stride = pair_of(node, "kernel_shape"), pair_of(node, "strides")
    sides = padding_of(node, tensor.shape[2:], kernel, stride)
    counts_padding = bool(node.attributes.get("count_include_pad", 0))
    ceil_mode = bool(node.attributes.get("ceil_mode", 0))
    (top, bottom), (left, right) = sides
    if (top, left) != (bottom, right):
        if not largest and (ceil_mode or not counts_padding):
            raise ValueError("an average over windows that reach beyond the image on one side")
        if ceil_mode:
            sizes = zip(tensor.shape[2:], kernel, stride, sides, strict=True)
            (top, bottom), (left, right) = (_rounded_up(*of_axis) for of_axis in sizes)
            ceil_mode = False
        rows, columns = min(top, bottom), min(left, right)
        odd = (left - columns, right - columns, top - rows, bottom - rows)
        tensor = F.pad(tensor, odd, value=-math.inf if largest else 0.0)
        top, left = rows, columns
    if largest:
        return F.max_pool2d(tensor, kernel, stride, (top, left), ceil_mode=ceil_mode)
    options = {"ceil_mode": ceil_mode, "count_include_pad": counts_padding}
    return F.avg_pool2d(tensor, kernel, stride, (top, left), **options)


def _rounded_up(n: int, kernel: int, stride: int, sides: Pair) -> Pair:
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


def _cast(node: Node, x: Inputs) -> Tensor:
    """Nothing from one precision to another: everything is in the one that was asked for."""
    if node.attributes.get("to") not in (1, 10, 11, 16):
        raise ValueError("an activation is cast to a type that is not floating")
    return x[0]


def _quantize(node: Node, x: Inputs) -> Quantized:
    if len(x) > 2 and x[2] is not None:
        zero_point = int(number(x[2], "the zero point"))
        dtype = np.asarray(x[2]).dtype
    else:
        zero_point, dtype = 0, np.dtype(np.uint8)
    return Quantized(x[0], number(x[1], "the scale of an activation"), zero_point, dtype)


def _dequantize(node: Node, x: Inputs) -> Tensor:
    quantized = x[0]
    if not isinstance(quantized, Quantized) or quantized.dtype.kind not in "iu":
        raise ValueError("its input does not come from QuantizeLinear to integers")
    limits = np.iinfo(quantized.dtype)
    return F.fake_quantize(quantized.x, quantized.scale, quantized.zero_point, int(limits.min), int(limits.max))


def tensor_ops() -> Mapping[str, TensorOp]:
    """What each operation of ONNX is here: ours, and what operations of somebody's own are read from."""
    return ChainMap(TENSOR_OPS, *(dict(row.onnx) for row in OPERATIONS.values() if row.onnx))


TENSOR_OPS: dict[str, TensorOp] = {
    **{op: _binary(getattr(F, op.lower())) for op in ("Add", "Sub", "Mul", "Div")},
    "Pow": lambda node, x: F.pow(x[0], number(x[1], "the exponent")),
    **{op: _unary(getattr(F, op.lower())) for op in ("Sqrt", "Exp", "Log", "Neg", "Erf", "Tanh", "Relu", "Sigmoid")},
    "HardSwish": _unary(F.hardswish),
    "Reciprocal": lambda node, x: 1.0 / x[0],
    "Clip": _clip,
    "HardSigmoid": _hard_sigmoid,
    "Gelu": _gelu,
    "Softmax": _softmax(F.softmax),
    "LogSoftmax": _softmax(F.log_softmax),
    "ReduceMean": _reduce(F.mean),
    "ReduceSum": _reduce(F.sum),
    "MaxPool": _pool,
    "AveragePool": _pool,
    "GlobalAveragePool": _global_pool,
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), _reshaped),
    "Transpose": lambda node, x: F.permute(x[0], node.attributes.get("perm") or range(x[0].ndim)[::-1]),
    "Concat": _concat,
    "Split": _split,
    "Slice": lambda node, x: x[0][slices(node, x[0].ndim, x)],
    "Gather": _gather,
    "Expand": lambda node, x: F.expand(x[0], np.broadcast_shapes(x[0].shape, integers(x[1], "shape"))),
    "Pad": _pad,
    "Identity": lambda node, x: x[0],
    "Cast": _cast,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
}
