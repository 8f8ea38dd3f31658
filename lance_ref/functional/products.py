"""Matrix products."""
# mypy: disable-error-code="override"

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lance_ref.engine import counting
from lance_ref.engine.arguments import Context, Gradients, operands, require_floating, unbroadcast
from lance_ref.engine.autograd import Function
from lance_ref.engine.state import state
from lance_ref.engine.tensor import Shape, Tensor


class Matmul(Function):
    """C = A B for the last two dimensions; dA = G Bᵀ, dB = Aᵀ G."""

    op = "matmul"

    @staticmethod
    def output_shape(a: Tensor, b: Tensor) -> Shape:
        if a._dtype.kind != "f" or b._dtype.kind != "f":
            require_floating("matmul", a=a, b=b)
        if len(a._shape) == len(b._shape) == 2 and a._shape[1] == b._shape[0]:  # the usual case
            return a._shape[0], b._shape[1]
        if a.ndim < 1 or b.ndim < 1:
            raise ValueError(f"matmul: a has shape {a.shape} and b {b.shape}, expected at least one dimension each")
        rows, columns = _as_matrices(a.shape, b.shape)
        try:
            batch = np.broadcast_shapes(rows[:-2], columns[:-2])
        except ValueError:
            batch = None
        if batch is None or rows[-1] != columns[-2]:
            raise ValueError(
                f"matmul: a has shape {a.shape} and b has shape {b.shape}, expected (..., m, k) and (..., k, n)"
            )
        return (*batch, *rows[-2:-1][: a.ndim - 1], *columns[-1:][: b.ndim - 1])

    @staticmethod
    def forward(ctx: Context, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        needs_a, needs_b = ctx.needs_input_grad
        if needs_b:
            ctx.save_input("a", 0)
        if needs_a:
            ctx.save_input("b", 1)
        return np.asarray(counting.matmul(a, b))

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        shape_a, shape_b = ctx.input_shapes
        rows, columns = _as_matrices(shape_a, shape_b)
        if rows is not shape_a or columns is not shape_b:  # a vector, whose dimension comes back
            batch = grad_output.shape[: grad_output.ndim - (len(shape_a) > 1) - (len(shape_b) > 1)]
            grad_output = grad_output.reshape(*batch, rows[-2], columns[-1])  # (..., m, n)
        grad_a = grad_b = None
        outer = state.kind  # without a ``with``, whose overhead is that of a small product
        try:
            if ctx.needs_input_grad[0]:
                state.kind, b = _kind(ctx.edges[0]), ctx["b"].reshape(columns)
                grad_a = _summed(counting.matmul(grad_output, b.swapaxes(-1, -2)), rows, shape_a)  # of (..., m, k)
            if ctx.needs_input_grad[1]:
                state.kind, a = _kind(ctx.edges[1]), ctx["a"].reshape(rows)
                if len(columns) == 2:  # one matrix for the whole batch: one product instead of a sum of products
                    count = math.prod(
                        grad_output.shape[:-1]
                    )  # of rows: -1 would not tell it where there are no columns
                    a, grad_output = a.reshape(count, rows[-1]), grad_output.reshape(count, columns[-1])
                grad_b = _summed(counting.matmul(a.swapaxes(-1, -2), grad_output), columns, shape_b)  # of (..., k, n)
        finally:
            state.kind = outer
        return grad_a, grad_b


def _summed(grad: np.ndarray, matrices: Shape, shape: Shape) -> np.ndarray:
    """The gradient over what was repeated, without the dimension that a vector was given; a view only for a vector."""
    grad = unbroadcast(grad, matrices)
    return grad if matrices is shape else grad.reshape(shape)


def _as_matrices(a: Shape, b: Shape) -> tuple[Shape, Shape]:
    """A vector on the left is a row, a vector on the right a column."""
    return ((1, *a) if len(a) == 1 else a), ((*b, 1) if len(b) == 1 else b)


def _kind(edge: Any) -> str:
    """What the gradient of an operand is: that of a weight, or of an activation."""
    return "grad_weight" if getattr(edge, "is_parameter", False) else "grad_input"


def matmul(a: Any, b: Any) -> Tensor:
    """Matrix product, batched: (..., m, k) @ (..., k, n) -> (..., m, n).

    The leading dimensions broadcast. A vector on the left counts as a row and one on the right as a
    column, and the extra dimension disappears from the result.

    Raises
    ------
    ValueError
        If the inner sizes differ or the leading dimensions do not broadcast.
    """
    return Matmul.apply(*operands(a, b))
