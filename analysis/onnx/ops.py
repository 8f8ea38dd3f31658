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

from analysis.onnx.choosing import CHOOSING, OF_INTEGERS, WITHOUT_GRADIENT
from analysis.onnx.file import Node
from analysis.onnx.host import HOST, argument, axes_of, integers, new_shape, reduced_axes, slices
from analysis.onnx.numbers import Inputs, number, operand
from analysis.onnx.resizing import RESIZING
from analysis.onnx.windows import WINDOWS
from analysis.rules.operations import OPERATIONS
from lance_ref import functional as F
from lance_ref.engine.tensor import Tensor

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


def _binary(function: Callable[[Any, Any], Tensor]) -> TensorOp:
    def run(node: Node, x: Inputs) -> Tensor:
        like = x[0] if isinstance(x[0], Tensor) else x[1]
        return function(operand(x[0], like), operand(x[1], like))

    return run


def _unary(function: Callable[[Tensor], Tensor]) -> TensorOp:
    return lambda node, x: function(x[0])


def _clip(node: Node, x: Inputs) -> Tensor:
    """Between 0 and 6 it goes by the name of the activation function, which exporters write so."""
    low = number(argument(node, x, 1, "min"), "the lower bound", -math.inf)
    high = number(argument(node, x, 2, "max"), "the upper bound", math.inf)
    return F.relu6(x[0]) if (low, high) == (0, 6) else F.clip(x[0], low, high)


def _hard_sigmoid(node: Node, x: Inputs) -> Tensor:
    alpha, beta = node.attributes.get("alpha", 0.2), node.attributes.get("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-5) and beta == 0.5:
        return F.hardsigmoid(x[0])
    return F.clip(x[0] * float(alpha) + float(beta), 0, 1)


def _gelu(node: Node, x: Inputs) -> Tensor:
    return F.gelu_tanh(x[0]) if node.attributes.get("approximate", "none") == "tanh" else F.gelu(x[0])


def _pow(node: Node, x: Inputs) -> Tensor:
    if not isinstance(x[0], Tensor):
        raise ValueError("a constant to the power of what depends on the input")
    return F.pow(x[0], number(x[1], "the exponent"))


def _sum(node: Node, x: Inputs) -> Tensor:
    like = next(v for v in x if isinstance(v, Tensor))
    total = operand(x[0], like)
    for value in x[1:]:
        total = F.add(total, operand(value, like))
    return total if isinstance(total, Tensor) else like


def _extreme(larger: bool) -> TensorOp:
    """The larger or smaller of two values: a bound where one of them is a number, else b + relu(a − b)."""

    def run(node: Node, x: Inputs) -> Tensor:
        like = next(v for v in x if isinstance(v, Tensor))
        result = operand(x[0], like)
        for value in x[1:]:
            other = operand(value, like)
            if isinstance(result, float) and isinstance(other, float):
                result = max(result, other) if larger else min(result, other)
            elif isinstance(other, float) or isinstance(result, float):
                tensor, bound = (result, other) if isinstance(other, float) else (other, result)
                result = F.clip(tensor, **{"low" if larger else "high": bound})
            else:
                result = other + F.relu(result - other) if larger else result - F.relu(result - other)
        return result if isinstance(result, Tensor) else like

    return run


def _celu(node: Node, x: Inputs) -> Tensor:
    """α·elu(x / α)"""
    alpha = float(node.attributes.get("alpha", 1.0))
    return F.elu(x[0]) if alpha == 1 else F.elu(x[0] / alpha) * alpha


def _selu(node: Node, x: Inputs) -> Tensor:
    alpha = float(node.attributes.get("alpha", 1.67326319217681884765625))
    gamma = float(node.attributes.get("gamma", 1.05070102214813232421875))
    return F.elu(x[0], alpha) * gamma


def _thresholded_relu(node: Node, x: Inputs) -> Tensor:
    """x above alpha, else 0."""
    alpha = float(node.attributes.get("alpha", 1.0))
    if x[0].is_meta:
        return F.where(Tensor.meta(x[0].shape, np.bool_), x[0], 0.0)
    return F.where(x[0].data > alpha, x[0], 0.0)


def _swish(node: Node, x: Inputs) -> Tensor:
    """x·σ(alpha·x)"""
    alpha = float(node.attributes.get("alpha", 1.0))
    return F.silu(x[0]) if alpha == 1 else x[0] * F.sigmoid(x[0] * alpha)


def _prelu(node: Node, x: Inputs) -> Tensor:
    """With one slope, or one for each channel; any others by two products."""
    tensor, slope = x
    if not isinstance(slope, Tensor):
        slope = Tensor(np.asarray(slope).astype(tensor.dtype))
    channels = tensor.shape[1] if tensor.ndim > 1 else 1
    per_channel = slope.shape == (channels, *[1] * (tensor.ndim - 2)) and tensor.ndim > 2
    if slope.size == 1 or per_channel:
        return F.prelu(tensor, F.reshape(slope, (slope.size,)))
    return F.relu(tensor) - slope * F.relu(-tensor)


def _group_norm(node: Node, x: Inputs) -> Tensor:
    """As PyTorch has it; weight and bias in any shape of so many numbers."""
    weight, bias = (F.reshape(v, (v.size,)) for v in x[1:]) if len(x) > 1 else (None, None)
    return F.group_norm(x[0], node.attributes["num_groups"], weight, bias, float(node.attributes["epsilon"]))


def _vector(value: Any, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else Tensor(np.asarray(value).reshape(-1).astype(like.dtype))


def _group_normalization(node: Node, x: Inputs) -> Tensor:
    """Weight and bias for each channel; before operator set 21 for each group."""
    groups, channels = node.attributes["num_groups"], x[0].shape[1]
    weight, bias = (_vector(v, x[0]) for v in x[1:3])
    if weight.shape == (groups,) != (channels,):
        weight, bias = (
            F.reshape(F.expand(F.reshape(v, (groups, 1)), (groups, channels // groups)), (channels,))
            for v in (weight, bias)
        )
    return F.group_norm(x[0], groups, weight, bias, float(node.attributes.get("epsilon", 1e-5)))


def _instance_norm(node: Node, x: Inputs) -> Tensor:
    """With weight and bias, or without where they are the ones and zeros that an exporter puts there."""
    tensor, weight, bias = x[0], _vector(x[1], x[0]), _vector(x[2], x[0])
    eps = float(node.attributes.get("epsilon", 1e-5))
    if node.attributes.get("plain"):
        return F.instance_norm(tensor, eps=eps)
    return F.instance_norm(tensor, weight, bias, eps)


def _rms_normalization(node: Node, x: Inputs) -> Tensor:
    (axis,) = axes_of([node.attributes.get("axis", -1)], x[0].ndim)
    shape = x[0].shape[axis:]
    weight = x[1] if isinstance(x[1], Tensor) else Tensor(np.asarray(x[1]).astype(x[0].dtype))
    eps = float(node.attributes.get("epsilon", 1e-5))
    if weight.shape == shape:
        return F.rms_norm(x[0], shape, weight, eps)
    return F.rms_norm(x[0], shape, None, eps) * weight


def _mean_variance(node: Node, x: Inputs) -> Tensor:
    """(x − mean) / √(variance + 1e-9)"""
    axes = axes_of(node.attributes.get("axes", (0, 2, 3)), x[0].ndim)
    difference = x[0] - F.mean(x[0], axes, True)
    return difference / F.sqrt(F.mean(difference * difference, axes, True) + 1e-9)


def _lp_normalization(node: Node, x: Inputs) -> Tensor:
    (axis,) = axes_of([node.attributes.get("axis", -1)], x[0].ndim)
    if node.attributes.get("p", 2) == 1:
        return x[0] / F.clip(F.sum(F.relu(x[0]) + F.relu(-x[0]), axis, True), low=1e-12)
    return x[0] / F.sqrt(F.clip(F.sum(x[0] * x[0], axis, True), low=1e-24))  # of zeros alone: zeros


def _batch_norm(node: Node, x: Inputs) -> Tensor:
    """With weights that are computed; one whose weights are stored is a layer."""
    tensor, weight, bias, mean, var = (
        v if isinstance(v, Tensor) else Tensor(np.asarray(v).astype(x[0].dtype)) for v in x[:5]
    )
    eps = float(node.attributes.get("epsilon", 1e-5))
    return F.batch_norm(tensor, mean.detach(), var.detach(), weight, bias, eps=eps)


def _attention(node: Node, x: Inputs) -> Tensor:
    """Queries, keys turned round, values, mask, and the two factors of the scale."""
    q, turned, v, mask, *factors = x
    k = F.transpose(turned, -2, -1)
    scale = math.prod(number(f, "the scale") for f in factors)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if isinstance(mask, np.ndarray):
        L, S = q.shape[-2], k.shape[-2]
        causal = np.where(np.tri(L, S, dtype=bool), 0, -np.inf)
        if mask.shape == (L, S) and np.array_equal(mask, causal):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        mask = Tensor(mask.astype(q.dtype))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def _einsum(node: Node, x: Inputs) -> Tensor:
    """Of two operands, as PyTorch does it: permuted, put together, and one batched product; of one, a sum."""
    equation = str(node.attributes["equation"]).replace(" ", "")
    left, _, right = equation.partition("->")
    terms = left.split(",")
    like = next(v for v in x if isinstance(v, Tensor))
    tensors = [v if isinstance(v, Tensor) else Tensor(np.asarray(v).astype(like.dtype)) for v in x]
    plain = "->" in equation and "." not in equation and all(len(set(t)) == len(t) for t in [*terms, right])
    if not plain or len(terms) != len(tensors) or len(terms) > 2:
        raise ValueError(f"equation is {equation!r}, expected one or two operands with each letter once, and a result")
    if len(terms) == 1:
        lost = [i for i, letter in enumerate(terms[0]) if letter not in right]
        total = F.sum(tensors[0], lost) if lost else tensors[0]
        kept = [letter for letter in terms[0] if letter in right]
        return F.permute(total, [kept.index(letter) for letter in right])
    (a, b), (s, t) = tensors, terms
    for letter in {*s} ^ {*t}:
        if letter not in right:
            raise ValueError(f"equation is {equation!r}, with {letter!r} in one operand alone")
    sizes = {**dict(zip(s, a.shape, strict=True)), **dict(zip(t, b.shape, strict=True))}
    batch = [c for c in right if c in s and c in t]
    rows, columns = [c for c in right if c not in t], [c for c in right if c not in s]
    summed = [c for c in s if c in t and c not in right]

    def laid_out(tensor: Tensor, term: str, first: list[str], last: list[str]) -> Tensor:
        moved = F.permute(tensor, [term.index(c) for c in (*batch, *first, *last)])
        shape = (*(sizes[c] for c in batch), math.prod(sizes[c] for c in first), math.prod(sizes[c] for c in last))
        return F.reshape(moved, shape)

    product = F.matmul(laid_out(a, s, rows, summed), laid_out(b, t, summed, columns))
    order = [*batch, *rows, *columns]
    product = F.reshape(product, [sizes[c] for c in order])
    return F.permute(product, [order.index(c) for c in right])


def _reduce_extreme(function: Callable[..., Tensor]) -> TensorOp:
    """Over one axis, or over several as one."""

    def run(node: Node, x: Inputs) -> Tensor:
        tensor = x[0]
        axes = reduced_axes(node, tensor.ndim, x)
        keep = bool(node.attributes.get("keepdims", 1))
        if len(axes) <= 1:
            return function(tensor, axes[0], keep) if axes else tensor
        kept = [axis for axis in range(tensor.ndim) if axis not in axes]
        lines = F.reshape(F.permute(tensor, [*kept, *axes]), (*(tensor.shape[axis] for axis in kept), -1))
        shape = [1 if axis in axes else n for axis, n in enumerate(tensor.shape) if keep or axis not in axes]
        return F.reshape(function(lines, len(kept), False), shape)

    return run


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


def _tile(node: Node, x: Inputs) -> Tensor:
    result = x[0]
    for axis, times in enumerate(integers(x[1], "repeats")):
        result = F.concatenate([result] * times, axis) if times > 1 else result
    return result


def _concat(node: Node, x: Inputs) -> Tensor:
    like = next(v for v in x if isinstance(v, Tensor))
    tensors = [v if isinstance(v, Tensor) else Tensor(v.astype(like.dtype)) for v in x]
    return F.concatenate(tensors, node.attributes["axis"])


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


def _cast(node: Node, x: Inputs) -> Tensor:
    """Nothing from one precision to another: everything is in the one that was asked for."""
    if node.attributes.get("to") not in (1, 10, 11, 16):
        raise ValueError("an activation is cast to a type that is not floating")
    return x[0]


def _cast_like(node: Node, x: Inputs) -> Any:
    """As Cast to the type of another value."""
    if isinstance(x[0], Tensor) and x[0].dtype.kind == "f" and getattr(x[1], "dtype", np.dtype(float)).kind == "f":
        return x[0]
    raise ValueError("an activation is cast to a type that is not floating")


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
    return ChainMap(
        TENSOR_OPS,
        dict.fromkeys((WITHOUT_GRADIENT | OF_INTEGERS) & set(HOST), _refused),
        *(dict(row.onnx) for row in OPERATIONS.values() if row.onnx),
    )


def _refused(node: Node, x: Inputs) -> Any:
    if node.op in OF_INTEGERS:
        raise ValueError("it is of numbers that have a gradient, expected integers")
    raise ValueError("its operands are not known")


TENSOR_OPS: dict[str, TensorOp] = {
    **{op: _binary(getattr(F, op.lower())) for op in ("Add", "Sub", "Mul", "Div")},
    "Pow": _pow,
    **{op: _unary(getattr(F, op.lower())) for op in ("Sqrt", "Exp", "Log", "Neg", "Erf", "Tanh", "Relu", "Sigmoid")},
    "HardSwish": _unary(F.hardswish),
    "Reciprocal": lambda node, x: 1.0 / x[0],
    "Abs": lambda node, x: F.relu(x[0]) + F.relu(-x[0]),
    "Sum": _sum,
    "Max": _extreme(larger=True),
    "Min": _extreme(larger=False),
    "Softsign": lambda node, x: x[0] / (1.0 + F.relu(x[0]) + F.relu(-x[0])),
    "Softplus": _unary(F.softplus),
    "Mish": _unary(F.mish),
    "LeakyRelu": lambda node, x: F.leaky_relu(x[0], float(node.attributes.get("alpha", 0.01))),
    "Elu": lambda node, x: F.elu(x[0], float(node.attributes.get("alpha", 1.0))),
    "Celu": _celu,
    "Selu": _selu,
    "ThresholdedRelu": _thresholded_relu,
    "Swish": _swish,
    "PRelu": _prelu,
    "torch.silu": _unary(F.silu),
    "torch.mish": _unary(F.mish),
    "torch.glu": lambda node, x: F.glu(x[0], node.attributes["axis"]),
    "torch.rms_norm": lambda node, x: F.rms_norm(
        x[0], x[0].shape[-node.attributes["axes"] :], x[1] if len(x) > 1 else None, float(node.attributes["epsilon"])
    ),
    "torch.layer_norm": lambda node, x: F.layer_norm(
        x[0], x[0].shape[-node.attributes["axes"] :], eps=float(node.attributes["epsilon"])
    ),
    "torch.group_norm": _group_norm,
    "torch.scaled_dot_product_attention": _attention,
    "RMSNormalization": _rms_normalization,
    "GroupNormalization": _group_normalization,
    "InstanceNormalization": _instance_norm,
    "MeanVarianceNormalization": _mean_variance,
    "LpNormalization": _lp_normalization,
    "BatchNormalization": _batch_norm,
    "Einsum": _einsum,
    "Clip": _clip,
    "HardSigmoid": _hard_sigmoid,
    "Gelu": _gelu,
    "Softmax": _softmax(F.softmax),
    "LogSoftmax": _softmax(F.log_softmax),
    "ReduceMean": _reduce(F.mean),
    "ReduceSum": _reduce(F.sum),
    "ReduceMax": _reduce_extreme(F.max),
    "ReduceMin": _reduce_extreme(lambda x, dim, keepdim: -F.max(-x, dim, keepdim)),
    "ReduceSumSquare": _reduce(lambda x, dim, keepdim: F.sum(x * x, dim, keepdim)),
    "ReduceL1": _reduce(lambda x, dim, keepdim: F.sum(F.relu(x) + F.relu(-x), dim, keepdim)),
    "ReduceL2": _reduce(lambda x, dim, keepdim: F.sqrt(F.sum(x * x, dim, keepdim))),
    "ReduceLogSum": _reduce(lambda x, dim, keepdim: F.log(F.sum(x, dim, keepdim))),
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), _reshaped),
    "Transpose": lambda node, x: F.permute(x[0], node.attributes.get("perm") or range(x[0].ndim)[::-1]),
    "Concat": _concat,
    "Slice": lambda node, x: x[0][slices(node, x[0].ndim, x)],
    "Expand": lambda node, x: F.expand(x[0], np.broadcast_shapes(x[0].shape, integers(x[1], "shape"))),
    "Tile": _tile,
    "Identity": lambda node, x: x[0],
    "Cast": _cast,
    "CastLike": _cast_like,
    **CHOOSING,
    **WINDOWS,
    **RESIZING,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
}
