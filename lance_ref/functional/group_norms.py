"""Normalisation within one sample: groups of channels, single channels, and the root mean square.

With x̂ = (x − mean)·inv_std over each group of n elements, y = x̂·weight + bias, and g the gradient of x̂,

    dx = inv_std·(g − Σg/n − x̂·Σ(g·x̂)/n)

The root mean square norm takes no mean away, so that Σg/n is missing there.
"""
# mypy: disable-error-code="override"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lance_ref.engine.arguments import Context, Gradients, positive, require_floating
from lance_ref.engine.autograd import Function
from lance_ref.engine.blocks import pieces
from lance_ref.engine.tensor import Shape, Tensor, as_tensor


class GroupNorm(Function):
    """Inputs: x (B, C, ...)[, weight, bias (C,)]."""

    op = "group_norm"

    @classmethod
    def output_shape(cls, x: Tensor, *others: Tensor, num_groups: int, eps: float, affine: bool) -> Shape:
        named = dict(zip(("weight", "bias"), others, strict=False))
        require_floating(cls.op, x=x, **named)
        if x.ndim < 2 or 0 in x.shape[1:]:
            raise ValueError(f"{cls.op}: x has shape {x.shape}, expected (B, C, ...) with sizes of at least 1 behind B")
        if num_groups < 1 or x.shape[1] % num_groups:
            raise ValueError(f"{cls.op}: num_groups is {num_groups}, expected a divisor of C = {x.shape[1]}")
        for name, tensor in named.items():
            if tensor.shape != (x.shape[1],):
                raise ValueError(
                    f"{cls.op}: {name} has shape {tensor.shape}, expected ({x.shape[1]},) for x of shape {x.shape}"
                )
        if math.prod(x.shape[1:]) == num_groups:
            raise ValueError(f"{cls.op}: x has shape {x.shape}, expected more than one value in each group")
        return x.shape

    @staticmethod
    def forward(
        ctx: Context, x: np.ndarray, *others: np.ndarray, num_groups: int, eps: float, affine: bool
    ) -> np.ndarray:
        ctx.num_groups, ctx.affine = num_groups, affine
        grouped = x.reshape(len(x), num_groups, -1)  # (B, G, n)
        mean = grouped.mean(axis=2, keepdims=True)
        result = np.empty(x.shape, x.dtype)
        out = np.subtract(grouped, mean, out=result.reshape(grouped.shape))  # the same memory
        inv_std = 1 / np.sqrt(np.square(out).mean(axis=2, keepdims=True) + x.dtype.type(eps))
        out *= inv_std
        if affine:
            weight, bias = others
            result *= _channels(weight, x)
            result += _channels(bias, x)
        if any(ctx.needs_input_grad[:2]):  # x or weight
            ctx.save_input("x", 0)
            ctx.save_for_backward(mean=mean, inv_std=inv_std)
        if affine and ctx.needs_input_grad[0]:
            ctx.save_input("weight", 1)
        return result

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        needs_x, needs_weight, needs_bias = (*ctx.needs_input_grad, False, False)[:3]
        axes = (0, *range(2, grad_output.ndim))
        grad_x = grad_weight = grad_bias = None
        if needs_bias:
            grad_bias = grad_output.sum(axis=axes)
        if needs_x or needs_weight:
            x = ctx["x"]
            grad_x = np.empty(x.shape, x.dtype)  # no view of x̂: a leaf then need not copy it
            x_hat = grad_x.reshape(len(x), ctx.num_groups, -1)  # (B, G, n), the same memory
            np.subtract(x.reshape(x_hat.shape), ctx["mean"], out=x_hat)
            x_hat *= ctx["inv_std"]
        if needs_weight:
            grad_weight = (grad_output * x_hat.reshape(x.shape)).sum(axis=axes)
        if needs_x:
            g = grad_output * _channels(ctx["weight"], x) if ctx.affine else grad_output
            g = g.reshape(x_hat.shape)
            x_hat *= (g * x_hat).mean(axis=2, keepdims=True)
            np.subtract(g, x_hat, out=x_hat)
            x_hat -= g.mean(axis=2, keepdims=True)
            x_hat *= ctx["inv_std"]
        else:
            grad_x = None
        return (grad_x, grad_weight, grad_bias) if ctx.affine else (grad_x,)


class InstanceNorm(GroupNorm):
    """Each channel of each sample by itself."""

    op = "instance_norm"


def _channels(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """(C,) as (C, 1, ...), so that it broadcasts against (B, C, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 2))


class RmsNorm(Function):
    """Inputs: x[, weight]."""

    op = "rms_norm"

    @staticmethod
    def output_shape(x: Tensor, *weight: Tensor, normalized_shape: Shape, eps: float) -> Shape:
        require_floating("rms_norm", x=x, **dict(zip(["weight"], weight, strict=False)))
        k = len(normalized_shape)
        if not k or x.shape[-k:] != normalized_shape or 0 in normalized_shape:
            raise ValueError(
                f"rms_norm: x has shape {x.shape}, expected it to end in normalized_shape {normalized_shape}"
            )
        if weight and weight[0].shape != normalized_shape:
            raise ValueError(
                f"rms_norm: weight has shape {weight[0].shape}, expected normalized_shape {normalized_shape}"
            )
        return x.shape

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, *weight: np.ndarray, normalized_shape: Shape, eps: float) -> np.ndarray:
        ctx.k = len(normalized_shape)
        axes = tuple(range(x.ndim - ctx.k, x.ndim))
        inv_rms = 1 / np.sqrt(np.square(x).mean(axis=axes, keepdims=True) + x.dtype.type(eps))
        if any(ctx.needs_input_grad):
            ctx.save_input("x", 0)
            ctx.save_for_backward(inv_rms=inv_rms)
        if weight and ctx.needs_input_grad[0]:
            ctx.save_input("weight", 1)
        out = x * inv_rms
        if weight:
            out *= weight[0]
        return out

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        outer = tuple(range(grad_output.ndim - ctx.k))
        inner = tuple(range(grad_output.ndim - ctx.k, grad_output.ndim))
        weighted = len(ctx.needs_input_grad) > 1
        grad_x = grad_weight = None
        if weighted and ctx.needs_input_grad[1]:
            grad_weight = np.zeros(grad_output.shape[grad_output.ndim - ctx.k :], grad_output.dtype)
        if ctx.needs_input_grad[0]:
            over = ctx.reused(grad_output, ctx["x"])
            grad_x = np.empty_like(ctx["x"]) if over is None else over
        for part in pieces(grad_output.shape, inner):
            g, inv_rms = grad_output[part], ctx["inv_rms"][part]
            x_hat = ctx["x"][part] * inv_rms
            if grad_weight is not None:
                grad_weight += (g * x_hat).sum(axis=outer)
            if grad_x is not None:
                g = g * ctx["weight"] if weighted else g
                x_hat *= (g * x_hat).mean(axis=inner, keepdims=True)
                np.subtract(g, x_hat, out=x_hat)
                np.multiply(x_hat, inv_rms, out=grad_x[part])
        return (grad_x, grad_weight)[: len(ctx.needs_input_grad)]


def group_norm(x: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    """Normalise groups of channels of each sample (Wu and He 2018, arXiv 1803.08494).

    Parameters
    ----------
    x : Tensor (B, C, ...)
    num_groups : int
        A divisor of C.
    weight, bias : Tensor (C,), optional
        Both or neither.
    eps : float
        Added to the variance.

    Returns
    -------
    Tensor of the shape of ``x``
        The input is kept for backward, and two numbers for each group.

    Raises
    ------
    ValueError, TypeError
        If shapes or dtypes do not fit, or a group has a single value.
    """
    if isinstance(num_groups, bool) or not isinstance(num_groups, (int, np.integer)):
        raise ValueError(f"group_norm: num_groups is {num_groups!r}, expected a positive integer")
    inputs = _with_affine("group_norm", x, weight, bias)
    eps = positive("group_norm", "eps", eps)
    return GroupNorm.apply(*inputs, num_groups=int(num_groups), eps=eps, affine=weight is not None)


def instance_norm(x: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    """Normalise each channel of each sample by itself (Ulyanov et al. 2016, arXiv 1607.08022).

    Parameters
    ----------
    x : Tensor (B, C, ...)
        With more than one place behind the channels.
    weight, bias : Tensor (C,), optional
        Both or neither.
    eps : float
        Added to the variance.

    Raises
    ------
    ValueError, TypeError
        If shapes or dtypes do not fit, or a channel has a single value.
    """
    inputs = _with_affine("instance_norm", x, weight, bias)
    channels = inputs[0].shape[1] if inputs[0].ndim > 1 else 1
    eps = positive("instance_norm", "eps", eps)
    return InstanceNorm.apply(*inputs, num_groups=channels, eps=eps, affine=weight is not None)


def rms_norm(x: Any, normalized_shape: int | Sequence[int], weight: Any = None, eps: float | None = None) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last dimensions (Zhang and Sennrich 2019, arXiv 1910.07467).

    Parameters
    ----------
    x : Tensor of shape ``(..., *normalized_shape)``
    normalized_shape : int or sequence of int
        Sizes of the dimensions whose mean square is taken.
    weight : Tensor of ``normalized_shape``, optional
    eps : float, optional
        Added to the mean square; by default the spacing of numbers at 1 in the type of ``x``, as in PyTorch.

    Raises
    ------
    ValueError, TypeError
        If shapes or dtypes do not fit.
    """
    x = as_tensor(x)
    shape = (normalized_shape,) if isinstance(normalized_shape, (int, np.integer)) else tuple(normalized_shape)
    require_floating("rms_norm", x=x)
    eps = float(np.finfo(x.dtype).eps) if eps is None else positive("rms_norm", "eps", eps)
    inputs = [x] if weight is None else [x, as_tensor(weight)]
    return RmsNorm.apply(*inputs, normalized_shape=tuple(int(n) for n in shape), eps=eps)


def _with_affine(op: str, x: Any, weight: Any, bias: Any) -> list[Tensor]:
    if (weight is None) != (bias is None):
        missing = "weight" if weight is None else "bias"
        raise ValueError(f"{op}: {missing} is None, expected weight and bias together or neither")
    return [as_tensor(x)] if weight is None else [as_tensor(x), as_tensor(weight), as_tensor(bias)]
