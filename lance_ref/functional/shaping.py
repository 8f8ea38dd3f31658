"""Operations that move elements about: reshape, permute, concatenate, pad."""
# mypy: disable-error-code="override"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lance_ref.engine.arguments import NUMBERS, Context, Gradients, one_dim, require_floating, with_numpy_names
from lance_ref.engine.autograd import Function
from lance_ref.engine.tensor import Shape, Tensor, as_tensor


class Reshape(Function):
    op = "reshape"
    returns_view = True

    @staticmethod
    def output_shape(x: Tensor, shape: Shape) -> Shape:
        return shape

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, shape: Shape) -> np.ndarray:
        return x.reshape(shape)

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        return (grad_output.reshape(ctx.input_shapes[0]),)


class Permute(Function):
    op = "permute"
    returns_view = True

    @staticmethod
    def output_shape(x: Tensor, dims: tuple[int, ...]) -> Shape:
        return tuple(x.shape[d] for d in dims)

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, dims: tuple[int, ...]) -> np.ndarray:
        ctx.dims = dims
        return x.transpose(dims)

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        return (grad_output.transpose(np.argsort(ctx.dims)),)


class Concatenate(Function):
    op = "concatenate"

    @staticmethod
    def output_shape(*inputs: Tensor, dim: int) -> Shape:
        first = inputs[0].shape
        for i, x in enumerate(inputs):
            require_floating("concatenate", **{f"tensors[{i}]": x})
            if x.ndim != len(first) or any(
                n != m for d, (n, m) in enumerate(zip(x.shape, first, strict=True)) if d != dim
            ):
                raise ValueError(
                    f"concatenate: tensors[{i}] has shape {x.shape} and tensors[0] {first}, "
                    f"expected the same sizes except in dim {dim}"
                )
        return (*first[:dim], sum(x.shape[dim] for x in inputs), *first[dim + 1 :])

    @staticmethod
    def forward(ctx: Context, *inputs: np.ndarray, dim: int) -> np.ndarray:
        ctx.dim = dim
        return np.concatenate(inputs, axis=dim)

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        sizes = [shape[ctx.dim] for shape in ctx.input_shapes]
        pieces = np.split(grad_output, np.cumsum(sizes)[:-1], axis=ctx.dim)
        return tuple(piece if needed else None for piece, needed in zip(pieces, ctx.needs_input_grad, strict=True))


class Pad(Function):
    op = "pad"

    @staticmethod
    def output_shape(x: Tensor, padding: tuple[tuple[int, int], ...], value: float) -> Shape:
        return tuple(n + before + after for n, (before, after) in zip(x.shape, padding, strict=True))

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, padding: tuple[tuple[int, int], ...], value: float) -> np.ndarray:
        ctx.inside = tuple(slice(before, before + n) for n, (before, _) in zip(x.shape, padding, strict=True))
        return np.pad(x, padding, constant_values=value)

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        return (grad_output[ctx.inside],)


def reshape(x: Any, shape: Sequence[int]) -> Tensor:
    """The same elements in another shape; one size may be -1. A view wherever NumPy can give one."""
    x = as_tensor(x)
    sizes: tuple[Any, ...] = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    if any(not isinstance(n, (int, np.integer)) or n < -1 for n in sizes) or list(sizes).count(-1) > 1:
        raise ValueError(f"reshape: shape is {shape!r}, expected non-negative integers and at most one -1")
    known = math.prod(n for n in sizes if n != -1)
    if -1 in sizes and known and x.size % known == 0:
        sizes = tuple(x.size // known if n == -1 else n for n in sizes)
    if math.prod(sizes) != x.size or -1 in sizes:
        raise ValueError(f"reshape: x has shape {x.shape} with {x.size} elements, which do not fit into shape {shape}")
    return Reshape.apply(x, shape=tuple(int(n) for n in sizes))


def flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """Merge the dimensions from ``start_dim`` to ``end_dim``, both included, into one."""
    x = as_tensor(x)
    if x.ndim == 0:
        return reshape(x, (1,))
    start, end = one_dim("flatten", x, start_dim, "start_dim"), one_dim("flatten", x, end_dim, "end_dim")
    if start > end:
        raise ValueError(f"flatten: start_dim is {start_dim} and end_dim is {end_dim}, expected start_dim <= end_dim")
    return reshape(x, (*x.shape[:start], math.prod(x.shape[start : end + 1]), *x.shape[end + 1 :]))


def permute(x: Any, dims: Sequence[int]) -> Tensor:
    """Reorder the dimensions: dimension ``i`` of the result is dimension ``dims[i]`` of ``x``. A view."""
    x = as_tensor(x)
    order = tuple(one_dim("permute", x, d, "an entry of dims") for d in dims)
    if sorted(order) != list(range(x.ndim)):
        raise ValueError(f"permute: dims is {tuple(dims)}, expected every dimension of shape {x.shape} once")
    return Permute.apply(x, dims=order)


def transpose(x: Any, dim0: int, dim1: int) -> Tensor:
    """Swap two dimensions (recorded as ``permute``). A view."""
    x = as_tensor(x)
    order = list(range(x.ndim))
    first, second = one_dim("transpose", x, dim0, "dim0"), one_dim("transpose", x, dim1, "dim1")
    order[first], order[second] = second, first
    return Permute.apply(x, dims=tuple(order))


@with_numpy_names
def concatenate(tensors: Sequence[Any], dim: int = 0) -> Tensor:
    """Join tensors along an existing dimension; all other sizes must agree.

    Raises
    ------
    ValueError
        If there is nothing to join, or the shapes do not fit.
    """
    if isinstance(tensors, (Tensor, np.ndarray)) or not len(tensors):
        raise ValueError("concatenate: tensors is empty or a single array, expected a sequence of at least one")
    inputs = [as_tensor(x) for x in tensors]
    return Concatenate.apply(*inputs, dim=one_dim("concatenate", inputs[0], dim))


cat = concatenate


def pad(x: Any, pad: Sequence[int], mode: str = "constant", value: float = 0.0) -> Tensor:
    """Surround ``x`` with a constant.

    Parameters
    ----------
    pad : sequence of int
        PyTorch's order, last dimension first: ``(left, right, top, bottom, ...)``. Dimensions
        that are not named are left alone.
    mode : str
        Only ``"constant"``.

    Raises
    ------
    ValueError
        If ``pad`` is negative, has an odd length, or names more dimensions than there are.
    """
    x = as_tensor(x)
    if mode != "constant":
        raise ValueError(f"pad: mode is {mode!r}, expected 'constant'")
    if not isinstance(value, NUMBERS):
        raise TypeError(f"pad: value is a {type(value).__name__}, expected a number")
    widths = tuple(pad)
    if (
        len(widths) % 2
        or len(widths) > 2 * x.ndim
        or any(not isinstance(n, (int, np.integer)) or n < 0 for n in widths)
    ):
        raise ValueError(
            f"pad: pad is {pad!r}, expected non-negative integers, two for each dimension from the last one on, "
            f"for x of shape {x.shape}"
        )
    pairs = [(int(widths[i]), int(widths[i + 1])) for i in range(0, len(widths), 2)]
    pairs += [(0, 0)] * (x.ndim - len(pairs))
    return Pad.apply(x, padding=tuple(reversed(pairs)), value=float(value))
