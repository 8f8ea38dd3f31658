"""Functions, operators and methods of PyTorch's tensors, as functions of this library, by their names.

One table for all three: ``torch.flatten(x, 1)``, ``x.flatten(1)`` and an operator such as ``+`` differ in how they are
written alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from lance_ref import functional as F
from lance_ref.convert.layers import silu
from lance_ref.engine.tensor import Tensor


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


def _linear(x: Any, weight: Any, bias: Any = None) -> Tensor:
    return F.linear(x, weight, bias)


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


def _attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """softmax(Q Kᵀ · scale + mask) V"""
    if is_causal or enable_gqa:
        raise ValueError("attention is causal or shares keys between heads, which has no counterpart in this library")
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = F.matmul(query, F.transpose(key, -2, -1)) * factor
    shares = F.softmax(scores if attn_mask is None else scores + attn_mask, -1)
    return F.matmul(F.dropout(shares, dropout_p) if dropout_p else shares, value)


def _max_pool(
    x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:  # fmt: skip
    if dilation not in (1, (1, 1), [1, 1]) or return_indices:
        raise ValueError("max_pool2d has a dilation or returns indices, which has no counterpart in this library")
    return F.max_pool2d(x, kernel_size, stride, padding, ceil_mode=ceil_mode)


def _batch_norm(
    x: Any, mean: Any, variance: Any, weight: Any = None, bias: Any = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Statistics are parameters that do not train; their arrays are moved on where the batch's own are used."""
    means, variances = (None if each is None else each.data for each in (mean, variance))
    return F.batch_norm(x, means, variances, weight, bias, training=training, momentum=momentum, eps=eps)


def without_inplace(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same; results never overwrite what they were computed from here."""

    def call(x: Any, inplace: bool = False) -> Any:
        return function(x)

    return call


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": _add, "iadd": _add, "add_": _add, "sub": _sub, "isub": _sub, "mul": operator.mul, "imul": operator.mul,
    "truediv": operator.truediv, "div": operator.truediv, "neg": operator.neg, "pow": operator.pow,
    "matmul": F.matmul, "bmm": F.matmul, "exp": F.exp, "log": F.log, "sqrt": F.sqrt,
    "floordiv": operator.floordiv, "mod": operator.mod, "getitem": operator.getitem, "getattr": getattr,
    "eq": operator.eq, "gt": operator.gt, "lt": operator.lt,
    **{name: without_inplace(getattr(F, name)) for name in ("relu", "relu6", "hardswish", "hardsigmoid")},
    "silu": without_inplace(silu), "sigmoid": F.sigmoid, "tanh": F.tanh, "gelu": _gelu, "erf": F.erf,
    "softmax": lambda x, dim=-1, **_: F.softmax(x, dim), "log_softmax": lambda x, dim=-1, **_: F.log_softmax(x, dim),
    "dropout": _dropout, "linear": _linear,
    "conv2d": lambda x, weight, bias=None, *rest, **options: F.conv2d(x, weight, bias, *rest, **options),
    "batch_norm": _batch_norm, "_assert": lambda *_: None,
    "layer_norm": F.layer_norm, "adaptive_avg_pool2d": F.adaptive_avg_pool2d, "avg_pool2d": F.avg_pool2d,
    "max_pool2d": _max_pool, "boolean_dispatch": _max_pool,
    "scaled_dot_product_attention": _attention,
    "flatten": F.flatten, "reshape": lambda x, *sizes: F.reshape(x, _sizes(sizes)),
    "view": lambda x, *sizes: F.reshape(x, _sizes(sizes)), "permute": lambda x, *dims: F.permute(x, _sizes(dims)),
    "transpose": F.transpose, "t": lambda x: F.transpose(x, 0, 1), "squeeze": _squeeze, "unsqueeze": _unsqueeze,
    "cat": F.concatenate, "concat": F.concatenate, "stack": _stack, "split": _split, "chunk": _chunk,
    "unbind": _unbind, "expand": _expand, "pad": F.pad, "_pad": F.pad, "contiguous": lambda x: x, "size": _size,
    "dim": lambda x: x.ndim,
    "mean": F.mean, "sum": F.sum, "var": F.var,
}  # fmt: skip
"""By name; arguments as PyTorch has them."""


def name_of(target: Any) -> str:
    """The name of a function or method that a traced graph calls."""
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))
