"""Convolution and pooling in one and in three dimensions.

In one dimension they are those of images of height 1, on views.
"""
# mypy: disable-error-code="override"

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from lance_ref.algebra.convolution import Convolution
from lance_ref.algebra.volumes import VolumeGeometry
from lance_ref.engine.arguments import Context, Gradients, require_floating, smallest_unsigned
from lance_ref.engine.autograd import Function
from lance_ref.engine.tensor import Shape, Tensor, as_tensor
from lance_ref.functional.convolution import Convolved, conv2d
from lance_ref.functional.pooling import avg_pool2d, max_pool2d
from lance_ref.functional.shaping import reshape
from lance_ref.stores import EXACT, ActivationStore

Triple = tuple[int, int, int]


def numbers(name: str, value: Any, count: int, smallest: int) -> tuple[int, ...]:
    """``3`` and ``(3, 3, 3)`` mean the same; checks that there are ``count`` integers, large enough."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
    whole = all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in values)
    if len(values) != count or not whole or min(values) < smallest:
        raise ValueError(f"{name} is {value!r}, expected an integer of at least {smallest} or {count} of them")
    return tuple(int(v) for v in values)


# ---- three dimensions ------------------------------------------------------------------------


class Conv3d(Convolved):
    """Inputs: x (B, C_in, D, H, W), weight (C_out, C_in/g, k_d, k_h, k_w)[, bias (C_out,)]."""

    op = "conv3d"

    @staticmethod
    def geometry(x: Shape, weight: Shape, attributes: dict[str, Any]) -> Convolution:
        a = attributes
        return _geometry(x, weight, a["stride"], a["padding"], a["dilation"], a["groups"])


@lru_cache(maxsize=1024)
def _geometry(
    x: Shape, weight: Shape, stride: Triple, padding: Triple, dilation: Triple, groups: int
) -> VolumeGeometry:
    pads = tuple((p, p) for p in padding)
    return VolumeGeometry(x, weight, stride, pads, dilation, groups)


def _sizes(size: Shape, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape) -> Shape:
    """floor((n + 2·padding − dilation·(k − 1) − 1) / stride) + 1 along each axis."""
    axes = zip(size, kernel, stride, padding, dilation, strict=True)
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)


class _Pool3d(Function):
    """Windows of a volume, one position in the window after the other for all windows at once."""

    @classmethod
    def output_shape(cls, x: Tensor, kernel_size: Triple, stride: Triple, padding: Triple, **more: Any) -> Shape:
        if x.ndim != 5:
            raise ValueError(f"{cls.op}: x has shape {x.shape}, expected 5 dimensions (B, C, D, H, W)")
        if any(2 * p > k for p, k in zip(padding, kernel_size, strict=True)):
            raise ValueError(f"{cls.op}: padding is {padding}, expected at most half of kernel_size {kernel_size}")
        size = _sizes(x.shape[2:], kernel_size, stride, padding, (1, 1, 1))
        if min(size) < 1:
            raise ValueError(f"{cls.op}: the output would be empty, {(*x.shape[:2], *size)}: x has shape {x.shape}")
        return (*x.shape[:2], *size)


def _windows(shape: Shape, kernel: Shape, stride: Shape, padding: Shape) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """For each position in the window: its number, and where all windows see the padded volume there."""
    size = _sizes(shape, kernel, stride, padding, (1,) * len(kernel))
    for i, offsets in enumerate(itertools.product(*map(range, kernel))):
        steps = zip(offsets, size, stride, strict=True)
        yield i, (..., *(slice(o, o + s * (n - 1) + 1, s) for o, n, s in steps))


def _cut(padded: np.ndarray, padding: Shape, size: Shape) -> np.ndarray:
    """The volume without its padding, as an array of its own."""
    if not any(padding):
        return padded
    inside: Any = (..., *(slice(p, p + n) for p, n in zip(padding, size, strict=True)))
    result: np.ndarray = padded[inside].copy()
    return result


class MaxPool3d(_Pool3d):
    op = "max_pool3d"

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, kernel_size: Triple, stride: Triple, padding: Triple) -> np.ndarray:
        widths = [(0, 0), (0, 0), *((p, p) for p in padding)]
        padded = np.pad(x, widths, constant_values=-np.inf)
        out: Any = None
        count = int(np.prod(kernel_size))
        for i, seen in _windows(x.shape[2:], kernel_size, stride, padding):
            part = padded[seen]
            if out is None:
                out, argmax = part.copy(), np.zeros(part.shape, smallest_unsigned(count - 1))
                continue
            larger = (part > out) | (np.isnan(part) & ~np.isnan(out))
            np.copyto(out, part, where=larger)
            argmax[larger] = i
        ctx.sizes = kernel_size, stride, padding
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(argmax=argmax)
        result: np.ndarray = out
        return result

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        shape, (kernel, stride, padding) = ctx.input_shapes[0], ctx.sizes
        padded = np.zeros(
            (*shape[:2], *(n + 2 * p for n, p in zip(shape[2:], padding, strict=True))), grad_output.dtype
        )
        for i, seen in _windows(shape[2:], kernel, stride, padding):
            padded[seen] += np.where(ctx["argmax"] == i, grad_output, grad_output.dtype.type(0))
        return (_cut(padded, padding, shape[2:]),)


class AvgPool3d(_Pool3d):
    op = "avg_pool3d"

    @staticmethod
    def forward(
        ctx: Context, x: np.ndarray, kernel_size: Triple, stride: Triple, padding: Triple, count_include_pad: bool
    ) -> np.ndarray:
        ctx.sizes, ctx.counted = (kernel_size, stride, padding), count_include_pad
        padded = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in padding)])
        out = np.zeros((*x.shape[:2], *_sizes(x.shape[2:], kernel_size, stride, padding, (1, 1, 1))), x.dtype)
        for _, seen in _windows(x.shape[2:], *ctx.sizes):
            out += padded[seen]
        out /= _counts(x.shape[2:], ctx.sizes, count_include_pad, x.dtype)
        return out

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        shape, padding = ctx.input_shapes[0], ctx.sizes[2]
        share = grad_output / _counts(shape[2:], ctx.sizes, ctx.counted, grad_output.dtype)
        padded = np.zeros((*shape[:2], *(n + 2 * p for n, p in zip(shape[2:], padding, strict=True))), share.dtype)
        for _, seen in _windows(shape[2:], *ctx.sizes):
            padded[seen] += share
        return (_cut(padded, padding, shape[2:]),)


def _counts(size: Shape, sizes: tuple[Shape, Shape, Shape], counted: bool, dtype: np.dtype) -> np.ndarray:
    """Elements that each window's mean is over, (D_out, H_out, W_out), or the one number that all have."""
    if counted:
        return np.asarray(np.prod(sizes[0]), dtype)
    ones = np.pad(np.ones(size, dtype), [(p, p) for p in sizes[2]])
    return sum((ones[seen] for _, seen in _windows(size, *sizes)), np.zeros((), dtype))


def conv3d(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    store: ActivationStore = EXACT,
) -> Tensor:
    """3-D convolution (cross-correlation) of a batch of volumes.

    Parameters
    ----------
    x : Tensor (B, C_in, D, H, W)
    weight : Tensor (C_out, C_in/groups, k_d, k_h, k_w)
    bias : Tensor (C_out,), optional
    stride, padding, dilation : int or three
        For (depth, height, width); the padding is zeros on both sides.
    groups : int
        Divides C_in and C_out.
    store : ActivationStore
        What is kept of ``x`` for the weight gradient; all of it by default.

    Returns
    -------
    Tensor (B, C_out, D_out, H_out, W_out)

    Raises
    ------
    ValueError, TypeError
        If shapes or dtypes do not fit, ``groups`` does not divide, the output would be empty, or the store does not
        take volumes.
    """
    x, weight = as_tensor(x), as_tensor(weight)
    require_floating("conv3d", x=x, weight=weight)
    if x.ndim != 5 or weight.ndim != 5 or 0 in weight.shape:
        raise ValueError(
            f"conv3d: x has shape {x.shape} and weight {weight.shape}, expected (B, C_in, D, H, W) and "
            "(C_out, C_in/groups, k_d, k_h, k_w), sizes of at least 1"
        )
    C_in, C_out = x.shape[1], weight.shape[0]
    whole = isinstance(groups, (int, np.integer)) and not isinstance(groups, bool) and groups >= 1
    if not whole or C_in % groups or C_out % groups or weight.shape[1] != C_in // groups:
        raise ValueError(
            f"conv3d: groups is {groups!r} and weight has shape {weight.shape}, expected a divisor of C_in = {C_in} "
            f"and C_out = {C_out}, and a weight (C_out, C_in/groups, k_d, k_h, k_w)"
        )
    sizes: dict[str, Any] = {
        "stride": numbers("stride", stride, 3, 1),
        "padding": numbers("padding", padding, 3, 0),
        "dilation": numbers("dilation", dilation, 3, 1),
    }
    shape = _geometry(x.shape, weight.shape, *sizes.values(), int(groups)).output_shape
    if min(shape[2:]) < 1:
        raise ValueError(
            f"conv3d: the output would be empty, {shape}: x has shape {x.shape}, "
            f"weight {weight.shape}, {', '.join(f'{name} {value}' for name, value in sizes.items())}"
        )
    inputs = [x, weight] if bias is None else [x, weight, as_tensor(bias)]
    return Conv3d.apply(*inputs, **sizes, groups=int(groups), store=store)


def max_pool3d(
    x: Any,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
) -> Tensor:
    """The maximum of each window of a volume (B, C, D, H, W); of equal maxima the first gets the gradient.

    Parameters, result and errors as in :func:`max_pool2d`, in three dimensions.
    """
    kernel = numbers("kernel_size", kernel_size, 3, 1)
    strides = kernel if stride is None else numbers("stride", stride, 3, 1)
    return MaxPool3d.apply(as_tensor(x), kernel_size=kernel, stride=strides, padding=numbers("padding", padding, 3, 0))


def avg_pool3d(
    x: Any,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    *,
    count_include_pad: bool = True,
) -> Tensor:
    """The mean of each window of a volume (B, C, D, H, W). Keeps nothing.

    Parameters, result and errors as in :func:`avg_pool2d`, in three dimensions.
    """
    kernel = numbers("kernel_size", kernel_size, 3, 1)
    strides = kernel if stride is None else numbers("stride", stride, 3, 1)
    sizes = {"kernel_size": kernel, "stride": strides, "padding": numbers("padding", padding, 3, 0)}
    return AvgPool3d.apply(as_tensor(x), **sizes, count_include_pad=bool(count_include_pad))


# ---- one dimension ---------------------------------------------------------------------------


def _row(op: str, x: Any) -> Tensor:
    """A sequence (B, C, L) as images of height 1, (B, C, 1, L): a view."""
    x = as_tensor(x)
    if x.ndim != 3:
        raise ValueError(f"{op}: x has shape {x.shape}, expected 3 dimensions (B, C, L)")
    return reshape(x, (*x.shape[:2], 1, x.shape[2]))


def _sequence(x: Tensor) -> Tensor:
    """(B, C, 1, L) as (B, C, L): a view."""
    return reshape(x, (*x.shape[:2], x.shape[3]))


def conv1d(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[Any] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    store: ActivationStore = EXACT,
) -> Tensor:
    """1-D convolution of a batch of sequences (B, C_in, L): :func:`conv2d` of images of height 1, on views.

    ``weight`` has shape (C_out, C_in/groups, k); ``padding`` is a number, "same", "valid" or (before, after) alone.
    The rest, results and errors are those of :func:`conv2d`, and so are the stores.
    """
    images, weight = _row("conv1d", x), as_tensor(weight)
    if weight.ndim != 3:
        raise ValueError(f"conv1d: weight has shape {weight.shape}, expected 3 dimensions (C_out, C_in/groups, k)")
    kernel = reshape(weight, (*weight.shape[:2], 1, weight.shape[2]))
    sizes = (1, *numbers("stride", stride, 1, 1)), row_padding(padding), (1, *numbers("dilation", dilation, 1, 1))
    return _sequence(conv2d(images, kernel, bias, *sizes, groups, store=store))


def row_padding(padding: Any) -> Any:
    """The padding of a sequence as that of an image of height 1."""
    if isinstance(padding, str):
        return padding
    if isinstance(padding, (tuple, list)) and len(padding) == 2:
        before, after = numbers("padding", padding, 2, 0)
        return (0, 0), (before, after)
    return (0, *numbers("padding", padding, 1, 0))


def max_pool1d(
    x: Any, kernel_size: int, stride: int | None = None, padding: int = 0, *, ceil_mode: bool = False
) -> Tensor:
    """The maximum of each window of a sequence (B, C, L): :func:`max_pool2d` of images of height 1, on views."""
    sizes = _row_windows(kernel_size, stride, padding)
    return _sequence(max_pool2d(_row("max_pool1d", x), *sizes, ceil_mode=ceil_mode))


def avg_pool1d(
    x: Any,
    kernel_size: int,
    stride: int | None = None,
    padding: int = 0,
    *,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """The mean of each window of a sequence (B, C, L): :func:`avg_pool2d` of images of height 1, on views."""
    options = {"ceil_mode": ceil_mode, "count_include_pad": count_include_pad}
    return _sequence(avg_pool2d(_row("avg_pool1d", x), *_row_windows(kernel_size, stride, padding), **options))


def _row_windows(kernel_size: Any, stride: Any, padding: Any) -> tuple[Any, Any, Any]:
    kernel = numbers("kernel_size", kernel_size, 1, 1)
    strides = kernel if stride is None else numbers("stride", stride, 1, 1)
    return (1, *kernel), (1, *strides), (0, *numbers("padding", padding, 1, 0))
