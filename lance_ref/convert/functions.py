"""Functions, operators and methods of PyTorch's tensors, as functions of this library, by their names.

One table for all three: ``torch.flatten(x, 1)``, ``x.flatten(1)`` and an operator such as ``+`` differ in how they are
written alone.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lance_ref import functional as F
from lance_ref.convert.layer_functions import LAYER_FUNCTIONS
from lance_ref.engine.tensor import Tensor, as_tensor


def _sizes(sizes: tuple[Any, ...]) -> Sequence[int]:
    """One sequence of sizes, or several numbers."""
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


def _dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return F.dropout(x, p, training)


def _gelu(x: Any, approximate: str = "none") -> Tensor:
    return F.gelu_tanh(x) if approximate == "tanh" else F.gelu(x)


def _add(a: Any, b: Any, *, alpha: float = 1) -> Any:
    return a + (b if alpha == 1 else alpha * b)


def _sub(a: Any, b: Any, *, alpha: float = 1) -> Any:
    return a - (b if alpha == 1 else alpha * b)


def _linear(x: Any, weight: Any, bias: Any = None, **options: Any) -> Tensor:
    return F.linear(x, weight, bias, **options)


def _size(x: Any, dim: int | None = None) -> Any:
    return x.shape if dim is None else x.shape[dim]


def _squeeze(x: Any, dim: int | None = None) -> Tensor:
    keep = [n for i, n in enumerate(x.shape) if n != 1 or (dim is not None and i != dim % x.ndim)]
    return F.reshape(x, keep)


def _unsqueeze(x: Any, dim: int) -> Tensor:
    at = dim % (x.ndim + 1)
    return F.reshape(x, (*x.shape[:at], 1, *x.shape[at:]))


def _split(x: Any, size: int | Sequence[int], dim: int = 0) -> tuple[Tensor, ...]:
    total = x.shape[dim]
    sizes = [min(size, total - at) for at in range(0, total, size)] if isinstance(size, int) else list(size)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(_narrow(x, dim, end - n, end) for n, end in zip(sizes, ends, strict=True))


def _chunk(x: Any, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    return _split(x, -(-x.shape[dim] // chunks), dim)


def _unbind(x: Any, dim: int = 0) -> tuple[Tensor, ...]:
    parts = [slice(None)] * (dim % x.ndim)
    return tuple(F.index(x, (*parts, i)) for i in range(x.shape[dim]))


def _narrow(x: Any, dim: int, start: int, end: int) -> Tensor:
    return F.index(x, (*[slice(None)] * (dim % x.ndim), slice(start, end)))


def _stack(tensors: Sequence[Any], dim: int = 0) -> Tensor:
    return F.concatenate([_unsqueeze(each, dim) for each in tensors], dim)


def _expand(x: Any, *sizes: Any) -> Tensor:
    shape = list(_sizes(sizes))
    old = [1] * (len(shape) - x.ndim) + list(x.shape)
    return F.expand(x, [m if n == -1 else n for n, m in zip(shape, old, strict=True)])


def _tensor_split(
    x: Any, indices_or_sections: Any = None, dim: int = 0, *, indices: Any = None, sections: int | None = None
) -> tuple[Tensor, ...]:
    """By places, or into so many parts, the first of which are longer where it does not come out even."""
    parts = next(each for each in (indices_or_sections, indices, sections) if each is not None)
    total = x.shape[dim]
    if isinstance(parts, int):
        size, longer = divmod(total, parts)
        return _split(x, [size + (i < longer) for i in range(parts)], dim)
    places = [0, *parts, total]
    return tuple(_narrow(x, dim, first, last) for first, last in itertools.pairwise(places))


def _repeat(x: Any, *times: Any) -> Tensor:
    """Copies beside each other along every dimension."""
    counts = list(_sizes(times))
    shape = [1] * (len(counts) - x.ndim) + list(x.shape)
    apart = [n for size in shape for n in (1, size)]
    wide = F.expand(F.reshape(x, apart), [n for pair in zip(counts, shape, strict=True) for n in pair])
    return F.reshape(wide, [n * m for n, m in zip(counts, shape, strict=True)])


def _roll(x: Any, shifts: Any, dims: Any = None) -> Tensor:
    """What falls off at the end of a dimension comes back at its start."""
    if dims is None:
        raise ValueError("roll has no dims, expected them")
    pairs = [(shifts, dims)] if isinstance(dims, int) else zip(shifts, dims, strict=True)
    for shift, dim in pairs:
        at = -shift % x.shape[dim]
        if at:
            x = F.concatenate([_narrow(x, dim, at, x.shape[dim]), _narrow(x, dim, 0, at)], dim)
    return as_tensor(x)


def _unflatten(x: Any, dim: int, sizes: Sequence[int]) -> Tensor:
    at = dim % x.ndim
    return F.reshape(x, (*x.shape[:at], *sizes, *x.shape[at + 1 :]))


def _clamp(x: Any, min: float | None = None, max: float | None = None) -> Tensor:
    return F.clip(x, -math.inf if min is None else min, math.inf if max is None else max)


def _hardtanh(x: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    return F.relu6(x) if (min_val, max_val) == (0, 6) else F.clip(x, min_val, max_val)


def _leaky_relu(x: Any, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    return F.leaky_relu(x, negative_slope)


def _pad(x: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    return F.pad(x, pad, mode, 0.0 if value is None else value)


def _cat(tensors: Sequence[Any], dim: int = 0) -> Tensor:
    """Empty ones of one dimension count for nothing, as in PyTorch."""
    return F.concatenate([x for x in tensors if x.shape != (0,)] or list(tensors), dim)


def _rsqrt(x: Any) -> Tensor:
    return F.pow(x, -0.5)


def _addmm(x: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """x + a·b; with a vector x, and a matrix b, a linear layer whose weight lies transposed."""
    if (beta, alpha) != (1, 1):
        return F.add(x * beta, F.matmul(a, b) * alpha)
    if x.ndim == 1 and a.ndim == b.ndim == 2:
        return F.linear(a, F.transpose(b, 0, 1), x)
    return F.add(x, F.matmul(a, b))


def _baddbmm(x: Any, batch1: Any, batch2: Any, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _addmm(x, batch1, batch2, beta=beta, alpha=alpha)


def _addcmul(x: Any, a: Any, b: Any, *, value: float = 1) -> Tensor:
    return F.add(x, F.mul(a, b) if value == 1 else F.mul(a, b) * value)


def _einsum(equation: str, *operands: Any) -> Tensor:
    """The einsum of two operands without repeated letters: letters of both that the result lacks are summed."""
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    left, arrow, result = equation.replace(" ", "").partition("->")
    names = left.split(",")
    plain = arrow and len(names) == len(tensors) == 2 and all(len({*n}) == len(n) and n.isalpha() for n in names)
    if not plain or {*result} - {*left} or any(c not in result for c in {*names[0]} ^ {*names[1]}):
        raise ValueError(f"einsum {equation!r}, expected two operands and letters that stand once in each")
    a, b = tensors
    sizes = {**dict(zip(names[0], a.shape, strict=True)), **dict(zip(names[1], b.shape, strict=True))}
    shared = [c for c in names[0] if c in names[1]]
    groups = [c for c in shared if c in result], [c for c in shared if c not in result]
    (batch, summed), rows = groups, [c for c in names[0] if c not in shared]
    columns = [c for c in names[1] if c not in shared]

    def matrices(x: Any, letters: str, *order: list[str]) -> Tensor:
        """(batch, first, second)"""
        moved = F.permute(x, [letters.index(c) for group in order for c in group])
        return F.reshape(moved, [math.prod(sizes[c] for c in group) for group in order])

    product = F.matmul(matrices(a, names[0], batch, rows, summed), matrices(b, names[1], batch, summed, columns))
    order = [*batch, *rows, *columns]
    return F.permute(F.reshape(product, [sizes[c] for c in order]), [order.index(c) for c in result])


def _item(x: Any, index: Any) -> Any:
    """``x[index]`` of a tensor, by lists of positions too; of anything else what Python gives."""
    if not isinstance(x, Tensor):
        return x[index]
    parts = index if isinstance(index, tuple) else (index,)
    return F.index(x, tuple(np.asarray(part) if isinstance(part, list) else part for part in parts))


def without_inplace(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same; results never overwrite what they were computed from here."""

    def call(x: Any, inplace: bool = False) -> Any:
        return function(x)

    return call


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": _add, "iadd": _add, "add_": _add, "sub": _sub, "isub": _sub, "mul": operator.mul, "imul": operator.mul,
    "truediv": operator.truediv, "div": operator.truediv, "neg": operator.neg, "pow": operator.pow,
    "matmul": F.matmul, "bmm": F.matmul, "exp": F.exp, "log": F.log, "sqrt": F.sqrt,
    "floordiv": operator.floordiv, "mod": operator.mod, "getitem": _item, "getattr": getattr,
    "eq": operator.eq, "gt": operator.gt, "lt": operator.lt,
    **{name: without_inplace(getattr(F, name)) for name in ("relu", "relu6", "hardswish", "hardsigmoid")},
    "silu": without_inplace(F.silu), "sigmoid": F.sigmoid, "tanh": F.tanh, "gelu": _gelu, "erf": F.erf,
    "softmax": lambda x, dim=-1, **_: F.softmax(x, dim), "log_softmax": lambda x, dim=-1, **_: F.log_softmax(x, dim),
    "dropout": _dropout, "linear": _linear,
    "conv2d": lambda x, weight, bias=None, *rest, **options: F.conv2d(x, weight, bias, *rest, **options),
    "_assert": lambda *_: None,
    "hardtanh": _hardtanh, "leaky_relu": _leaky_relu,
    "elu": lambda x, alpha=1.0, inplace=False: F.elu(x, alpha), "mish": without_inplace(F.mish),
    "softplus": F.softplus, "prelu": F.prelu, "glu": F.glu, "clamp": _clamp, "clip": _clamp,
    "rsqrt": _rsqrt, "square": lambda x: F.pow(x, 2),
    "where": F.where, "masked_fill": lambda x, mask, value: F.where(mask, value, x),
    "addmm": _addmm, "baddbmm": _baddbmm, "addcmul": _addcmul, "einsum": _einsum,
    **LAYER_FUNCTIONS,
    "flatten": F.flatten, "reshape": lambda x, *sizes: F.reshape(x, _sizes(sizes)),
    "view": lambda x, *sizes: F.reshape(x, _sizes(sizes)), "permute": lambda x, *dims: F.permute(x, _sizes(dims)),
    "transpose": F.transpose, "swapaxes": F.transpose, "swapdims": F.transpose, "tensor_split": _tensor_split,
    "repeat": _repeat, "roll": _roll, "unflatten": _unflatten,
    "reshape_as": lambda x, other: F.reshape(x, other.shape), "view_as": lambda x, other: F.reshape(x, other.shape),
    "expand_as": lambda x, other: F.expand(x, other.shape), "t": lambda x: F.transpose(x, 0, 1),
    "squeeze": _squeeze, "unsqueeze": _unsqueeze,
    "cat": _cat, "concat": _cat, "stack": _stack, "split": _split, "chunk": _chunk,
    "unbind": _unbind, "expand": _expand, "pad": _pad, "_pad": _pad, "contiguous": lambda x: x, "size": _size,
    "dim": lambda x: x.ndim,
    "mean": F.mean, "sum": F.sum, "var": F.var,
}  # fmt: skip
"""By name; arguments as PyTorch has them."""


def name_of(target: Any) -> str:
    """The name of a function or method that a traced graph calls."""
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))
