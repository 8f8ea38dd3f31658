"""Arithmetic: + - * / ** neg, exp, log, sqrt. Broadcasting follows NumPy.

Values outside a function's domain give NaN or infinity, with NumPy's own warning in the forward
pass; gradients there are NaN or infinity as well (the slope of sqrt at 0 is infinite), silently.
"""
# mypy: disable-error-code="override"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lance_ref.algebra.kernels.elementwise import apply_mask
from lance_ref.engine.arguments import (
    NUMBERS,
    Context,
    Gradients,
    broadcast_shape,
    operands,
    unbroadcast,
    unbroadcast_product,
)
from lance_ref.engine.autograd import Function
from lance_ref.engine.blocks import blockwise
from lance_ref.engine.tensor import Shape, Tensor, as_tensor


class Unary(Function):
    """A function of one floating tensor whose result has its shape; attributes may say more."""

    @classmethod
    def output_shape(cls, x: Tensor, **attributes: Any) -> Shape:
        return x.shape


def along_slope(
    ctx: Context, grad_output: np.ndarray, saved: np.ndarray, formula: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> Gradients:
    """``formula(grad_output, saved)``, element by element; over the gradient, where nobody else can see that."""
    return (blockwise(formula, grad_output, saved, over=ctx.reused(grad_output, saved)),)


class Masked(Unary):
    """One that lets the gradient through where a bit of the saved ``mask`` is set."""

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        return (apply_mask(ctx["mask"], grad_output, over=ctx.reused(grad_output)),)


class Binary(Function):
    """A function of two tensors, element by element, with broadcasting."""

    @classmethod
    def output_shape(cls, a: Tensor, b: Tensor) -> Shape:
        return broadcast_shape(cls.op, a, b)


class Add(Binary):
    op = "add"

    @staticmethod
    def forward(ctx: Context, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray(a + b)

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        needed, shapes = ctx.needs_input_grad, ctx.input_shapes
        return tuple(unbroadcast(grad_output, shapes[i]) if needed[i] else None for i in (0, 1))


class Sub(Binary):
    op = "sub"

    @staticmethod
    def forward(ctx: Context, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray(a - b)

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        (needs_a, needs_b), (shape_a, shape_b) = ctx.needs_input_grad, ctx.input_shapes
        grad_b = None
        if needs_b:
            summed = unbroadcast(grad_output, shape_b)
            over = summed if summed is not grad_output else None if needs_a else ctx.reused(grad_output)
            grad_b = np.asarray(np.negative(summed, out=over))
        return unbroadcast(grad_output, shape_a) if needs_a else None, grad_b


class Mul(Binary):
    op = "mul"

    @staticmethod
    def forward(ctx: Context, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        needs_a, needs_b = ctx.needs_input_grad
        if needs_b:
            ctx.save_input("a", 0)
        if needs_a:
            ctx.save_input("b", 1)
        return np.asarray(a * b)

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        shapes, shape = ctx.input_shapes, grad_output.shape
        # Sums first, because the last product of the gradient's own shape may be written over the gradient.
        order = (1, 0) if shapes[0] == shape != shapes[1] else (0, 1)
        needed = [i for i in order if ctx.needs_input_grad[i]]
        grads: list[np.ndarray | None] = [None, None]
        for i in needed:
            other = ctx["ba"[i]]
            over = ctx.reused(grad_output, other) if i == needed[-1] and shapes[i] == shape else None
            grads[i] = unbroadcast_product(grad_output, other, shapes[i], over)
        return tuple(grads)


class Div(Binary):
    op = "div"

    @staticmethod
    def forward(ctx: Context, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if ctx.needs_input_grad[1]:
            ctx.save_input("a", 0)
        ctx.save_input("b", 1)
        return np.asarray(a / b)

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        (needs_a, needs_b), (shape_a, shape_b) = ctx.needs_input_grad, ctx.input_shapes
        with np.errstate(divide="ignore", invalid="ignore"):
            quotient = np.divide(grad_output, ctx["b"], out=ctx.reused(grad_output, ctx["b"]))
            return (
                unbroadcast(quotient, shape_a) if needs_a else None,
                unbroadcast(-quotient * (ctx["a"] / ctx["b"]), shape_b) if needs_b else None,
            )


class Neg(Unary):
    op = "neg"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray) -> np.ndarray:
        return np.asarray(-x)

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        return (np.asarray(np.negative(grad_output, out=ctx.reused(grad_output))),)


class Pow(Unary):
    op = "pow"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, exponent: float) -> np.ndarray:
        ctx.exponent = exponent
        ctx.save_input("x", 0)
        return np.asarray(x**exponent)

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        n, x = ctx.exponent, ctx["x"]
        if n == 0:  # a constant, also where x is 0
            return (np.zeros_like(grad_output),)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return along_slope(ctx, grad_output, x, lambda g, x: g * (n * x ** (n - 1)))


class Exp(Unary):
    op = "exp"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray) -> np.ndarray:
        output = np.asarray(np.exp(x))
        ctx.save_for_backward(output=output)
        return output

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        output = ctx["output"]
        return (np.asarray(np.multiply(grad_output, output, out=ctx.reused(grad_output, output))),)


class Log(Unary):
    op = "log"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray) -> np.ndarray:
        ctx.save_input("x", 0)
        return np.asarray(np.log(x))

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        with np.errstate(divide="ignore", invalid="ignore"):
            x = ctx["x"]
            return (np.asarray(np.divide(grad_output, x, out=ctx.reused(grad_output, x))),)


class Sqrt(Unary):
    op = "sqrt"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray) -> np.ndarray:
        output = np.asarray(np.sqrt(x))
        ctx.save_for_backward(output=output)
        return output

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        with np.errstate(divide="ignore", invalid="ignore"):
            return along_slope(ctx, grad_output, ctx["output"], lambda g, y: g / (2 * y))


def add(a: Any, b: Any) -> Tensor:
    """a + b"""
    return Add.apply(*operands(a, b))


def sub(a: Any, b: Any) -> Tensor:
    """a − b"""
    return Sub.apply(*operands(a, b))


def mul(a: Any, b: Any) -> Tensor:
    """a · b, element by element. Keeps each operand only if the other needs a gradient."""
    return Mul.apply(*operands(a, b))


def div(a: Any, b: Any) -> Tensor:
    """a / b, element by element."""
    return Div.apply(*operands(a, b))


def neg(x: Any) -> Tensor:
    """−x"""
    return Neg.apply(as_tensor(x))


def pow(x: Any, exponent: float) -> Tensor:
    """x to the power of a number.

    Raises
    ------
    TypeError
        If ``exponent`` is a tensor or array; write ``exp(exponent * log(x))`` for that.
    """
    if not isinstance(exponent, NUMBERS):
        raise TypeError(f"pow: exponent is a {type(exponent).__name__}, expected a number")
    return Pow.apply(as_tensor(x), exponent=float(exponent))


def exp(x: Any) -> Tensor:
    """e to the power of x. Keeps its result for backward."""
    return Exp.apply(as_tensor(x))


def log(x: Any) -> Tensor:
    """Natural logarithm."""
    return Log.apply(as_tensor(x))


def sqrt(x: Any) -> Tensor:
    """Square root. Its slope at 0 is infinite, as in PyTorch."""
    return Sqrt.apply(as_tensor(x))
