"""Operations that exported graphs contain and the library's own nets do without.

The error function, a clamp between any two bounds, GELU by tanh, repetition along dimensions, and the
rounding of activations to a grid.
"""
# mypy: disable-error-code="override"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lance_ref.algebra.kernels.elementwise import pack_blocks
from lance_ref.engine.arguments import NUMBERS, Context, Gradients, unbroadcast
from lance_ref.engine.autograd import Function
from lance_ref.engine.blocks import blockwise
from lance_ref.engine.tensor import Shape, Tensor, as_tensor
from lance_ref.functional.elementwise import Masked, Unary

TANH_SCALE, TANH_CUBE = math.sqrt(2 / math.pi), 0.044715
"""GELU by tanh: Φ(x) ≈ (1 + tanh(√(2/π)·(x + 0.044715·x³))) / 2."""


class Erf(Unary):
    op = "erf"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray) -> np.ndarray:
        from scipy.special import erf

        ctx.save_input("x", 0)
        return np.asarray(erf(x))

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        x = ctx["x"]
        return (np.asarray(grad_output * (np.exp(-x * x) * (2 / math.sqrt(math.pi)))),)


class GeluTanh(Unary):
    op = "gelu_tanh"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray) -> np.ndarray:
        ctx.save_input("x", 0)
        return np.asarray(x * (0.5 * (1 + _gelu_tanh(x))))

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        x = ctx["x"]
        t = _gelu_tanh(x)
        inner = TANH_SCALE * (1 + 3 * TANH_CUBE * x * x)
        return (np.asarray(grad_output * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner)),)


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.tanh(TANH_SCALE * (x + TANH_CUBE * x * x * x)))


class Clip(Masked):
    op = "clip"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, low: float, high: float) -> np.ndarray:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(mask=pack_blocks(lambda x: (x >= low) & (x <= high), x))
        return np.asarray(np.clip(x, x.dtype.type(low), x.dtype.type(high)))


class Expand(Function):
    op = "expand"

    @staticmethod
    def output_shape(x: Tensor, shape: Shape) -> Shape:
        return shape

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, shape: Shape) -> np.ndarray:
        return np.broadcast_to(x, shape).copy()

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        return (unbroadcast(grad_output, ctx.input_shapes[0]),)


class FakeQuantize(Masked):
    op = "fake_quantize"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, scale: float, zero_point: int, low: int, high: int) -> np.ndarray:
        def steps(x: np.ndarray) -> np.ndarray:
            return np.rint(x / x.dtype.type(scale)) + zero_point

        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(mask=pack_blocks(lambda x: (low <= steps(x)) & (steps(x) <= high), x))
        return blockwise(lambda x: (np.clip(steps(x), low, high) - zero_point) * x.dtype.type(scale), x)


def erf(x: Any) -> Tensor:
    """2/√π · ∫₀ˣ e^(−t²) dt"""
    return Erf.apply(as_tensor(x))


def gelu_tanh(x: Any) -> Tensor:
    """x·Φ(x) with Φ approximated by tanh (Hendrycks and Gimpel 2016, arXiv 1606.08415). Keeps its input."""
    return GeluTanh.apply(as_tensor(x))


def clip(x: Any, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """x no smaller than ``low`` and no greater than ``high``; from bound to bound the slope is 1. Keeps bits.

    Raises
    ------
    ValueError
        If a bound is no number, or ``low`` is greater than ``high``.
    """
    if not isinstance(low, NUMBERS) or not isinstance(high, NUMBERS) or not low <= high:
        raise ValueError(f"clip: low is {low!r} and high is {high!r}, expected numbers with low <= high")
    return Clip.apply(as_tensor(x), low=float(low), high=float(high))


def expand(x: Any, shape: Sequence[int]) -> Tensor:
    """``x`` repeated to ``shape`` by NumPy's broadcasting; a copy, which keeps nothing.

    Raises
    ------
    ValueError
        If ``x`` cannot be broadcast to ``shape``.
    """
    x, sizes = as_tensor(x), tuple(int(n) for n in shape)
    lead = len(sizes) - x.ndim
    if (
        lead < 0
        or min(sizes, default=0) < 0
        or any(n not in (1, m) for n, m in zip(x.shape, sizes[lead:], strict=True))
    ):
        raise ValueError(f"expand: x has shape {x.shape}, which does not broadcast to {sizes}")
    return Expand.apply(x, shape=sizes)


def fake_quantize(x: Any, scale: float, zero_point: int = 0, low: int = -128, high: int = 127) -> Tensor:
    """The nearest values of a grid of ``high − low + 1`` steps: scale·(clip(round(x/scale) + zero_point) − zero_point).

    Backward lets the gradient through where nothing was cut off (Jacob et al. 2018, arXiv 1712.05877). Keeps one
    bit per element.

    Raises
    ------
    ValueError
        If ``scale`` is not positive and finite, or ``zero_point`` not between ``low`` and ``high``.
    """
    if not isinstance(scale, NUMBERS) or not 0 < scale < math.inf:
        raise ValueError(f"fake_quantize: scale is {scale!r}, expected a positive number")
    if not low <= zero_point <= high:
        raise ValueError(f"fake_quantize: zero_point is {zero_point}, expected an integer from {low} to {high}")
    return FakeQuantize.apply(
        as_tensor(x), scale=float(scale), zero_point=int(zero_point), low=int(low), high=int(high)
    )
