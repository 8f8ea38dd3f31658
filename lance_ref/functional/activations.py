"""Activation functions beyond ReLU and GELU: SiLU, Mish, ELU, softplus, leaky and parametric ReLU, and the gated unit.

Each keeps what its slope is worked out from: its input, its result (ELU), or one bit per element (leaky ReLU).
"""
# mypy: disable-error-code="override"

from __future__ import annotations

from typing import Any

import numpy as np

from lance_ref.algebra.kernels.elementwise import pack_blocks
from lance_ref.engine.arguments import Context, Gradients, number, one_dim, positive, require_floating, with_numpy_names
from lance_ref.engine.autograd import Function
from lance_ref.engine.blocks import blockwise, pieces
from lance_ref.engine.tensor import Shape, Tensor, as_tensor
from lance_ref.functional.elementwise import Unary, along_slope
from lance_ref.functional.nonlinearities import logistic


class Silu(Unary):
    op = "silu"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray) -> np.ndarray:
        ctx.save_input("x", 0)
        return blockwise(lambda x: x * logistic(x), x)

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        return along_slope(ctx, grad_output, ctx["x"], _silu_gradient)


def _silu_gradient(g: np.ndarray, x: np.ndarray) -> np.ndarray:
    """σ·(1 + x·(1 − σ))·g"""
    s = logistic(x)
    return np.asarray(g * (s * (1 + x * (1 - s))))


class Mish(Unary):
    op = "mish"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray) -> np.ndarray:
        ctx.save_input("x", 0)
        return blockwise(lambda x: x * np.tanh(np.logaddexp(x, x.dtype.type(0))), x)

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        return along_slope(ctx, grad_output, ctx["x"], _mish_gradient)


def _mish_gradient(g: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(t + x·(1 − t²)·σ)·g with t = tanh(softplus(x))"""
    t = np.tanh(np.logaddexp(x, x.dtype.type(0)))
    return np.asarray(g * (t + x * (1 - t * t) * logistic(x)))


class Softplus(Unary):
    op = "softplus"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, beta: float, threshold: float) -> np.ndarray:
        ctx.beta, ctx.threshold = beta, threshold
        ctx.save_input("x", 0)
        return blockwise(lambda x: _softplus(x, beta, threshold), x)

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        def gradient(g: np.ndarray, x: np.ndarray) -> np.ndarray:
            scaled = x * x.dtype.type(ctx.beta)
            return np.where(scaled > ctx.threshold, g, g * logistic(scaled))

        return along_slope(ctx, grad_output, ctx["x"], gradient)


def _softplus(x: np.ndarray, beta: float, threshold: float) -> np.ndarray:
    scaled = x * x.dtype.type(beta)
    return np.where(scaled > threshold, x, np.logaddexp(scaled, x.dtype.type(0)) / x.dtype.type(beta))


class Elu(Unary):
    op = "elu"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, alpha: float) -> np.ndarray:
        ctx.alpha = alpha
        output = blockwise(lambda x: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0))), x)
        ctx.save_for_backward(output=output)
        return output

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        """The slope α·eˣ below 0 is y + α."""
        alpha = ctx.alpha
        return along_slope(ctx, grad_output, ctx["output"], lambda g, y: np.where(y > 0, g, g * (y + alpha)))


class LeakyRelu(Unary):
    op = "leaky_relu"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, negative_slope: float) -> np.ndarray:
        ctx.slope = negative_slope
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(mask=pack_blocks(lambda x: x > 0, x))
        return blockwise(lambda x: np.where(x > 0, x, x * negative_slope), x)

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        below = np.unpackbits(ctx["mask"], count=grad_output.size).view(np.bool_).reshape(grad_output.shape)
        np.logical_not(below, out=below)
        over = ctx.reused(grad_output)
        grad = np.array(grad_output) if over is None else over
        np.multiply(grad, grad.dtype.type(ctx.slope), out=grad, where=below)
        return (grad,)


class Prelu(Function):
    """Inputs: x and the slopes below 0, one for each channel or one for all."""

    op = "prelu"

    @staticmethod
    def output_shape(x: Tensor, weight: Tensor) -> Shape:
        require_floating("prelu", x=x, weight=weight)
        channels = x.shape[1] if x.ndim > 1 else 1
        if weight.shape not in ((1,), (channels,)):
            raise ValueError(
                f"prelu: weight has shape {weight.shape}, expected (1,) or ({channels},) for x of shape {x.shape}"
            )
        return x.shape

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        if any(ctx.needs_input_grad):
            ctx.save_input("x", 0)
        if ctx.needs_input_grad[0]:
            ctx.save_input("weight", 1)
        return np.where(x > 0, x, x * _by_channel(weight, x))

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        x, grad_x, grad_weight = ctx["x"], None, None
        if ctx.needs_input_grad[0]:
            grad_x = np.where(x > 0, grad_output, grad_output * _by_channel(ctx["weight"], x))
        if ctx.needs_input_grad[1]:
            below = grad_output * np.minimum(x, 0)
            (size,) = ctx.input_shapes[1]
            axes = tuple(axis for axis in range(x.ndim) if axis != 1) if size > 1 else None
            grad_weight = np.asarray(below.sum(axis=axes)).reshape(size)
        return grad_x, grad_weight


def _by_channel(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(C,) as (C, 1, ...), so that it broadcasts against (B, C, ...)."""
    return weight.reshape(-1, *[1] * (x.ndim - 2)) if x.ndim > 1 else weight


class Glu(Function):
    """a·σ(b) of the two halves of x along a dimension."""

    op = "glu"

    @staticmethod
    def output_shape(x: Tensor, dim: int) -> Shape:
        require_floating("glu", x=x)
        if x.shape[dim] % 2 or not x.shape[dim]:
            raise ValueError(f"glu: x has shape {x.shape}, expected an even size, at least 2, along dim {dim}")
        return (*x.shape[:dim], x.shape[dim] // 2, *x.shape[dim + 1 :])

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, dim: int) -> np.ndarray:
        ctx.dim = dim
        ctx.save_input("x", 0)
        a, b = np.split(x, 2, axis=dim)
        out = np.empty(a.shape, a.dtype)
        for part in pieces(out.shape, ()):
            np.multiply(a[part], logistic(b[part]), out=out[part])
        return out

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        grad = np.empty(ctx.input_shapes[0], grad_output.dtype)
        (a, b), (grad_a, grad_b) = (np.split(array, 2, axis=ctx.dim) for array in (ctx["x"], grad))
        for part in pieces(grad_output.shape, ()):
            g, s = grad_output[part], logistic(b[part])
            s_g = g * s
            grad_a[part] = s_g
            grad_b[part] = s_g * (1 - s) * a[part]
        return (grad,)


def silu(x: Any) -> Tensor:
    """x / (1 + e^−x), also called swish (Elfwing et al. 2018, arXiv 1702.03118). Keeps its input."""
    return Silu.apply(as_tensor(x))


def mish(x: Any) -> Tensor:
    """x·tanh(ln(1 + e^x)) (Misra 2019, arXiv 1908.08681). Keeps its input."""
    return Mish.apply(as_tensor(x))


def softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """ln(1 + e^(beta·x)) / beta, and x itself where beta·x is above ``threshold``, as in PyTorch. Keeps its input.

    Raises
    ------
    ValueError
        If ``beta`` is not positive and finite, or ``threshold`` is not finite.
    """
    beta = positive("softplus", "beta", beta)
    threshold = number("softplus", "threshold", threshold, "a finite number", lambda x: True)
    return Softplus.apply(as_tensor(x), beta=beta, threshold=threshold)


def elu(x: Any, alpha: float = 1.0) -> Tensor:
    """x above 0 and alpha·(e^x − 1) below (Clevert et al. 2016, arXiv 1511.07289). Keeps its result.

    Raises
    ------
    ValueError
        If ``alpha`` is negative or not finite: then the result does not tell the slope.
    """
    return Elu.apply(as_tensor(x), alpha=number("elu", "alpha", alpha, "a number of at least 0", lambda x: x >= 0))


def leaky_relu(x: Any, negative_slope: float = 0.01) -> Tensor:
    """x above 0 and negative_slope·x below. Keeps one bit per element.

    Raises
    ------
    ValueError
        If ``negative_slope`` is not finite.
    """
    slope = number("leaky_relu", "negative_slope", negative_slope, "a finite number", lambda x: True)
    return LeakyRelu.apply(as_tensor(x), negative_slope=slope)


def prelu(x: Any, weight: Any) -> Tensor:
    """x above 0 and weight·x below (He et al. 2015, arXiv 1502.01852).

    Parameters
    ----------
    x : Tensor (B, C, ...)
    weight : Tensor (C,) or (1,)
        The slopes below 0.

    Returns
    -------
    Tensor of the shape of ``x``
        Input and slopes are kept for backward.

    Raises
    ------
    ValueError, TypeError
        If shapes or dtypes do not fit.
    """
    return Prelu.apply(as_tensor(x), as_tensor(weight))


@with_numpy_names
def glu(x: Any, dim: int = -1) -> Tensor:
    """a·σ(b), where a and b are the two halves of ``x`` along ``dim`` (Dauphin et al. 2017, arXiv 1612.08083).

    Raises
    ------
    ValueError
        If the size along ``dim`` is odd or 0. All of ``x`` is kept for backward.
    """
    x = as_tensor(x)
    return Glu.apply(x, dim=one_dim("glu", x, dim))
