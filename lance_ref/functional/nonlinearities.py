"""Activation functions, softmax, and dropout."""
# mypy: disable-error-code="override"

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lance_ref.algebra.kernels.elementwise import apply_mask, clamp_and_pack, pack_blocks
from lance_ref.engine.arguments import Context, Gradients, one_dim, share, with_numpy_names
from lance_ref.engine.blocks import BLOCK_ELEMENTS, blockwise, pieces
from lance_ref.engine.random import as_generator, will_draw
from lance_ref.engine.tensor import Tensor, as_tensor
from lance_ref.functional.elementwise import Masked, Unary, along_slope


class Tanh(Unary):
    op = "tanh"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray) -> np.ndarray:
        output = np.asarray(np.tanh(x))
        ctx.save_for_backward(output=output)
        return output

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        return along_slope(ctx, grad_output, ctx["output"], lambda g, y: g * (1 - y**2))


class Sigmoid(Unary):
    op = "sigmoid"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray) -> np.ndarray:
        output = blockwise(logistic, x)
        ctx.save_for_backward(output=output)
        return output

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        return along_slope(ctx, grad_output, ctx["output"], lambda g, y: g * (y * (1 - y)))


def logistic(x: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(x))  # in (0, 1]: never overflows
    return np.asarray(np.where(x >= 0, x.dtype.type(1), small) / (1 + small))


class Gelu(Unary):
    op = "gelu"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray) -> np.ndarray:
        ctx.save_input("x", 0)
        return blockwise(lambda x: x * _normal_cdf(x), x)

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        return along_slope(ctx, grad_output, ctx["x"], lambda g, x: g * (_normal_cdf(x) + x * _normal_density(x)))


def _normal_cdf(x: np.ndarray) -> np.ndarray:
    """Φ(x) = (1 + erf(x / √2)) / 2"""
    from scipy.special import erf

    return np.asarray(0.5 * (1 + erf(x * math.sqrt(0.5))))


def _normal_density(x: np.ndarray) -> np.ndarray:
    """φ(x) = exp(−x²/2) / √(2π)"""
    return np.asarray(np.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi)))


class Hardswish(Unary):
    op = "hardswish"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray) -> np.ndarray:
        ctx.save_input("x", 0)
        return blockwise(lambda x: x * np.clip(x + 3, 0, 6) / 6, x)

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        return along_slope(ctx, grad_output, ctx["x"], lambda g, x: g * _hardswish_slope(x))


def _hardswish_slope(x: np.ndarray) -> np.ndarray:
    zero, one = x.dtype.type(0), x.dtype.type(1)
    return np.where(x <= -3, zero, np.where(x < 3, x / 3 + 0.5, one))


class Hardsigmoid(Unary):
    op = "hardsigmoid"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray) -> np.ndarray:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(mask=pack_blocks(lambda x: (x > -3) & (x < 3), x))
        return blockwise(lambda x: np.clip(x + 3, 0, 6) / 6, x)

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        return (apply_mask(ctx["mask"], grad_output, 1 / 6, over=ctx.reused(grad_output)),)


class Relu(Masked):
    op = "relu"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray) -> np.ndarray:
        return _clamped(ctx, x, math.inf)


class Relu6(Masked):
    op = "relu6"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray) -> np.ndarray:
        return _clamped(ctx, x, 6.0)


def _clamped(ctx: Context, x: np.ndarray, ceiling: float) -> np.ndarray:
    """``x`` in [0, ceiling]; the mask is made only if backward will need it."""
    if not ctx.needs_input_grad[0]:
        return np.asarray(np.clip(x, 0, x.dtype.type(ceiling)))
    output, mask = clamp_and_pack(x, ceiling)
    ctx.save_for_backward(mask=mask)
    return output


class Softmax(Unary):
    op = "softmax"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, dim: int) -> np.ndarray:
        output = x - x.max(axis=dim, keepdims=True)
        np.exp(output, out=output)
        output /= output.sum(axis=dim, keepdims=True)
        ctx.dim = dim
        ctx.save_for_backward(output=output)
        return output

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        output = ctx["output"]
        product = np.multiply(grad_output, output, out=ctx.reused(grad_output, output))
        along = product.sum(axis=ctx.dim, keepdims=True)
        for part in pieces(product.shape, [ctx.dim]):
            product[part] -= output[part] * along[part]
        return (product,)


class LogSoftmax(Unary):
    op = "log_softmax"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, dim: int) -> np.ndarray:
        output = x - x.max(axis=dim, keepdims=True)
        total = np.empty(tuple(1 if i == dim else n for i, n in enumerate(x.shape)), x.dtype)
        for part in pieces(x.shape, [dim]):
            np.exp(output[part]).sum(axis=dim, keepdims=True, out=total[part])
        output -= np.log(total)
        ctx.dim = dim
        ctx.save_for_backward(output=output)
        return output

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        output, total = ctx["output"], grad_output.sum(axis=ctx.dim, keepdims=True)
        over = ctx.reused(grad_output, output)
        return (blockwise(lambda g, y, total: g - np.exp(y) * total, grad_output, output, total, over=over),)


class _Chance:
    """The probability of dropout and where its random numbers come from; a record shows ``p`` alone."""

    def __init__(self, p: float, rng: np.random.Generator) -> None:
        self.p = p
        self.rng = rng

    def describe(self) -> float:
        return self.p


class Dropout(Unary):
    op = "dropout"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, p: _Chance) -> np.ndarray:
        will_draw(p.rng)
        ctx.scale = 1 / (1 - p.p) if p.p < 1 else 0.0
        mask = np.empty(-(-x.size // 8), np.uint8)
        for start in range(0, x.size, BLOCK_ELEMENTS):  # the generator's numbers are the same in blocks as at once
            stop = min(start + BLOCK_ELEMENTS, x.size)
            kept = p.rng.random(stop - start, dtype=np.float32) >= p.p
            mask[start // 8 : -(-stop // 8)] = np.packbits(kept)
        ctx.save_for_backward(mask=mask)
        return apply_mask(mask, x, ctx.scale)

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        return (apply_mask(ctx["mask"], grad_output, ctx.scale, over=ctx.reused(grad_output)),)


def tanh(x: Any) -> Tensor:
    """Hyperbolic tangent. Keeps its result for backward."""
    return Tanh.apply(as_tensor(x))


def sigmoid(x: Any) -> Tensor:
    """1 / (1 + e^−x), without overflow. Keeps its result for backward."""
    return Sigmoid.apply(as_tensor(x))


def gelu(x: Any) -> Tensor:
    """x·Φ(x) with the exact normal distribution function Φ, not its tanh approximation."""
    return Gelu.apply(as_tensor(x))


def hardswish(x: Any) -> Tensor:
    """x·relu6(x + 3) / 6 (MobileNetV3)."""
    return Hardswish.apply(as_tensor(x))


def hardsigmoid(x: Any) -> Tensor:
    """relu6(x + 3) / 6 (MobileNetV3); NaN stays NaN. The slope is 1/6 for −3 < x < 3. Keeps one bit per element."""
    return Hardsigmoid.apply(as_tensor(x))


def relu(x: Any) -> Tensor:
    """max(x, 0); NaN stays NaN. Keeps one bit per element."""
    return Relu.apply(as_tensor(x))


def relu6(x: Any) -> Tensor:
    """min(max(x, 0), 6); NaN stays NaN. The slope is 1 for 0 < x < 6. Keeps one bit per element."""
    return Relu6.apply(as_tensor(x))


@with_numpy_names
def softmax(x: Any, dim: int = -1) -> Tensor:
    """e^x / Σ e^x along ``dim``, shifted by the maximum so that nothing overflows."""
    x = as_tensor(x)
    return Softmax.apply(x, dim=_scores("softmax", x, dim))


@with_numpy_names
def log_softmax(x: Any, dim: int = -1) -> Tensor:
    """x − log Σ e^x along ``dim``, shifted by the maximum so that nothing overflows."""
    x = as_tensor(x)
    return LogSoftmax.apply(x, dim=_scores("log_softmax", x, dim))


def _scores(op: str, x: Tensor, dim: int) -> int:
    """``dim`` counted from the front, of a size of at least 1: there is no maximum of nothing."""
    dim = one_dim(op, x, dim)
    if not x.shape[dim]:
        raise ValueError(f"{op}: x has shape {x.shape}, expected at least one entry along dim {dim}")
    return dim


def dropout(x: Any, p: float = 0.5, training: bool = True, rng: np.random.Generator | int | None = None) -> Tensor:
    """Zero every element with probability ``p``, and scale the others by 1 / (1 − p).

    Parameters
    ----------
    p : float in [0, 1]
    training : bool
        If False, or if ``p`` is 0, ``x`` itself is returned and nothing is recorded.
    rng : numpy.random.Generator or int, optional
        Where the random numbers come from: a generator, a seed, or by default the generator that
        :func:`lance_ref.manual_seed` seeds.

    Returns
    -------
    Tensor
        Of the shape of ``x``; one bit per element is kept for backward.
    """
    x = as_tensor(x)
    p = share("dropout", "p", p)
    if not training or p == 0:
        return x
    return Dropout.apply(x, p=_Chance(p, as_generator(rng)))
