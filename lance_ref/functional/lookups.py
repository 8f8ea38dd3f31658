"""Operations that choose: rows of a table by their numbers, and one of two tensors element by element."""
# mypy: disable-error-code="override"

from __future__ import annotations

from typing import Any

import numpy as np

from lance_ref.engine.arguments import Context, Gradients, operands, require_floating, smallest_unsigned, unbroadcast
from lance_ref.engine.autograd import Function
from lance_ref.engine.tensor import Shape, Tensor, as_tensor


class Embedding(Function):
    """Inputs: indices, weight (K, D)."""

    op = "embedding"

    @staticmethod
    def output_shape(indices: Tensor, weight: Tensor, padding_idx: int | None) -> Shape:
        require_floating("embedding", weight=weight)
        if indices.dtype.kind not in "iu":
            raise TypeError(f"embedding: indices have dtype {indices.dtype}, expected integers")
        if weight.ndim != 2:
            raise ValueError(f"embedding: weight has shape {weight.shape}, expected 2 dimensions (rows, features)")
        K = weight.shape[0]
        if not indices.is_meta and indices.size and not 0 <= indices.data.min() <= indices.data.max() < K:
            low, high = indices.data.min(), indices.data.max()
            raise ValueError(f"embedding: indices are from {low} to {high}, expected rows in [0, {K})")
        return (*indices.shape, weight.shape[1])

    @staticmethod
    def forward(ctx: Context, indices: np.ndarray, weight: np.ndarray, padding_idx: int | None) -> np.ndarray:
        ctx.padding_idx = padding_idx
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(indices=indices.astype(smallest_unsigned(max(len(weight) - 1, 0))))
        return weight[indices]

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        grad = np.zeros(ctx.input_shapes[1], grad_output.dtype)
        np.add.at(grad, ctx["indices"], grad_output)
        if ctx.padding_idx is not None:
            grad[ctx.padding_idx] = 0
        return None, grad


class Where(Function):
    """Inputs: condition, a, b, which broadcast."""

    op = "where"

    @staticmethod
    def output_shape(condition: Tensor, a: Tensor, b: Tensor) -> Shape:
        require_floating("where", a=a, b=b)
        if condition.dtype.kind != "b":
            raise TypeError(f"where: condition has dtype {condition.dtype}, expected Booleans")
        try:
            return np.broadcast_shapes(condition.shape, a.shape, b.shape)
        except ValueError:
            raise ValueError(
                f"where: condition has shape {condition.shape}, a {a.shape} and b {b.shape}, expected shapes that "
                "broadcast"
            ) from None

    @staticmethod
    def forward(ctx: Context, condition: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        ctx.shape = condition.shape
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(mask=np.packbits(condition))
        return np.where(condition, a, b)

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        count = int(np.prod(ctx.shape))
        condition = np.unpackbits(ctx["mask"], count=count).view(np.bool_).reshape(ctx.shape)
        zero = grad_output.dtype.type(0)
        grads: list[np.ndarray | None] = [None, None, None]
        if ctx.needs_input_grad[1]:
            grads[1] = unbroadcast(np.where(condition, grad_output, zero), ctx.input_shapes[1])
        if ctx.needs_input_grad[2]:
            grads[2] = unbroadcast(np.where(condition, zero, grad_output), ctx.input_shapes[2])
        return tuple(grads)


def embedding(indices: Any, weight: Any, padding_idx: int | None = None) -> Tensor:
    """Rows of a table: ``weight[indices]``.

    Parameters
    ----------
    indices : integers of any shape
        In [0, K).
    weight : Tensor (K, D)
    padding_idx : int, optional
        A row that gets no gradient.

    Returns
    -------
    Tensor (..., D), with the shape of the indices in place of ...
        The indices are kept for backward, in the smallest type that fits.

    Raises
    ------
    ValueError, TypeError
        If shapes or dtypes do not fit, or an index or ``padding_idx`` is outside of the table.
    """
    table = as_tensor(weight)
    rows = table.shape[0] if table.ndim else 0
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise ValueError(f"embedding: padding_idx is {padding_idx!r}, expected a row in [{-rows}, {rows})")
    row = None if padding_idx is None else int(padding_idx) % rows
    positions = indices if isinstance(indices, Tensor) else Tensor(np.asarray(indices))
    return Embedding.apply(positions, table, padding_idx=row)


def where(condition: Any, a: Any, b: Any) -> Tensor:
    """``a`` where the condition holds and ``b`` elsewhere; the shapes broadcast. Keeps one bit per condition.

    Raises
    ------
    ValueError, TypeError
        If the shapes do not broadcast, the condition is not Boolean, or a and b are not of one floating type.
    """
    chosen = condition if isinstance(condition, Tensor) else Tensor(np.asarray(condition))
    return Where.apply(chosen, *operands(a, b))
