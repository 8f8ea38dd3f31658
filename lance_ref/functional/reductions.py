"""Sums, means, maxima and variances over dimensions."""
# mypy: disable-error-code="override"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lance_ref.engine.arguments import Context, Gradients, many_dims, one_dim, smallest_unsigned, with_numpy_names
from lance_ref.engine.autograd import Function
from lance_ref.engine.tensor import Shape, Tensor, as_tensor

Dims = tuple[int, ...] | None


def _reduced_shape(shape: Shape, dim: Dims, keepdim: bool) -> Shape:
    dims = range(len(shape)) if dim is None else dim
    if keepdim:
        return tuple(1 if i in dims else n for i, n in enumerate(shape))
    return tuple(n for i, n in enumerate(shape) if i not in dims)


def _reduced_size(shape: Shape, dim: Dims) -> int:
    """How many elements go into each result."""
    return math.prod(shape if dim is None else (shape[d] for d in dim))


def _spread(reduced: Any, shape: Shape, dim: Dims) -> np.ndarray:
    """A reduced array repeated over the dimensions it lost; a read-only view."""
    return np.broadcast_to(reduced.reshape(_reduced_shape(shape, dim, True)), shape)


class Reduction(Function):
    """A function of all elements along some dimensions, or of all."""

    @staticmethod
    def output_shape(x: Tensor, dim: Dims, keepdim: bool) -> Shape:
        return _reduced_shape(x.shape, dim, keepdim)


class Sum(Reduction):
    op = "sum"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, dim: Dims, keepdim: bool) -> np.ndarray:
        ctx.dim = dim
        return np.asarray(x.sum(axis=dim, keepdims=keepdim))

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        return (_spread(grad_output, ctx.input_shapes[0], ctx.dim),)


class Mean(Reduction):
    op = "mean"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, dim: Dims, keepdim: bool) -> np.ndarray:
        ctx.dim = dim
        return np.asarray(x.mean(axis=dim, keepdims=keepdim))

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        shape = ctx.input_shapes[0]
        return (_spread(grad_output / _reduced_size(shape, ctx.dim), shape, ctx.dim),)


class Max(Function):
    op = "max"

    @staticmethod
    def output_shape(x: Tensor, dim: int | None, keepdim: bool) -> Shape:
        dims = None if dim is None else (dim,)
        if _reduced_size(x.shape, dims) == 0:
            raise ValueError(
                f"max: x has shape {x.shape} and dim is {dim}, expected at least one element to choose from"
            )
        return _reduced_shape(x.shape, dims, keepdim)

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, dim: int | None, keepdim: bool) -> np.ndarray:
        lines = x.reshape(-1) if dim is None else x
        axis = 0 if dim is None else dim
        argmax = np.expand_dims(lines.argmax(axis=axis), axis)  # the first of equals; NaN beats all
        ctx.dim = dim
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(argmax=argmax.astype(smallest_unsigned(lines.shape[axis] - 1)))
        dims = None if dim is None else (dim,)
        return np.take_along_axis(lines, argmax, axis).reshape(_reduced_shape(x.shape, dims, keepdim))

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        shape, dim = ctx.input_shapes[0], ctx.dim
        grad = np.zeros(math.prod(shape) if dim is None else shape, grad_output.dtype)
        argmax = ctx["argmax"].astype(np.intp)
        np.put_along_axis(grad, argmax, grad_output.reshape(argmax.shape), 0 if dim is None else dim)
        return (grad.reshape(shape),)


class Var(Function):
    op = "var"

    @staticmethod
    def output_shape(x: Tensor, dim: Dims, correction: int, keepdim: bool) -> Shape:
        n = _reduced_size(x.shape, dim)
        if n <= correction:
            raise ValueError(
                f"var: correction is {correction}, but x of shape {x.shape} has {n} element(s) along dim {dim}; "
                "expected more elements than the correction"
            )
        return _reduced_shape(x.shape, dim, keepdim)

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, dim: Dims, correction: int, keepdim: bool) -> np.ndarray:
        ctx.dim, ctx.correction = dim, correction
        ctx.save_input("x", 0)
        return np.asarray(x.var(axis=dim, ddof=correction, keepdims=keepdim))

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        x, dim = ctx["x"], ctx.dim
        slope = grad_output * (2 / (_reduced_size(x.shape, dim) - ctx.correction))
        return (np.asarray((x - x.mean(axis=dim, keepdims=True)) * _spread(slope, x.shape, dim)),)


@with_numpy_names
def sum(x: Any, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
    """Sum over ``dim``: an integer, several, or None for all."""
    x = as_tensor(x)
    return Sum.apply(x, dim=many_dims("sum", x, dim), keepdim=bool(keepdim))


@with_numpy_names
def mean(x: Any, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
    """Mean over ``dim``: an integer, several, or None for all."""
    x = as_tensor(x)
    return Mean.apply(x, dim=many_dims("mean", x, dim), keepdim=bool(keepdim))


@with_numpy_names
def max(x: Any, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """The largest values along one dimension, or of all.

    Only the values, not their positions as in PyTorch. Of several equal maxima the first one
    receives the whole gradient.
    """
    x = as_tensor(x)
    return Max.apply(x, dim=None if dim is None else one_dim("max", x, dim), keepdim=bool(keepdim))


@with_numpy_names
def var(
    x: Any,
    dim: int | Sequence[int] | None = None,
    correction: int = 1,
    keepdim: bool = False,
    *,
    unbiased: bool | None = None,
) -> Tensor:
    """Variance over ``dim``: Σ (x − mean)² / (n − correction); PyTorch's older ``unbiased`` is a correction of 1 or 0.

    Raises
    ------
    ValueError
        If there are not more elements than ``correction``.
    """
    x = as_tensor(x)
    correction = correction if unbiased is None else int(unbiased)
    if isinstance(correction, bool) or not isinstance(correction, (int, np.integer)) or correction < 0:
        raise ValueError(f"var: correction is {correction!r}, expected a non-negative integer")
    return Var.apply(x, dim=many_dims("var", x, dim), correction=int(correction), keepdim=bool(keepdim))
