"""Pooling of images: the maximum or the mean of each window.

The mean handles one window position ("tap") at a time for all windows at once, on the strided part
of the image that it sees; positions that fall into the padding are left out, so nothing is padded.
The loops of the maximum are in :mod:`lance_ref.algebra.kernels.elementwise`.
"""
# mypy: disable-error-code="override"

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lance_ref.algebra.kernels.elementwise import max_pool_backward, max_pool_forward, pooled_size
from lance_ref.engine.arguments import Context, Gradients, require_images
from lance_ref.engine.autograd import Function
from lance_ref.engine.tensor import Shape, Tensor, as_tensor
from lance_ref.functional.convolution import pair

Pair = tuple[int, int]


def _output_shape(op: str, x: Tensor, kernel: Pair, stride: Pair, padding: Pair, ceil_mode: bool) -> Shape:
    require_images(op, x)
    if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        raise ValueError(f"{op}: padding is {padding}, expected at most half of kernel_size {kernel}")
    size = pooled_size((x.shape[2], x.shape[3]), kernel, stride, padding, ceil_mode)
    if min(size) < 1:
        raise ValueError(
            f"{op}: the output would be empty, {(*x.shape[:2], *size)}: x has shape {x.shape}, kernel_size {kernel}, "
            f"stride {stride}, padding {padding}"
        )
    return (*x.shape[:2], *size)


def _taps(n: int, n_out: int, kernel: int, stride: int, padding: int) -> Iterator[tuple[slice, slice]]:
    """Along one axis, for each offset in the window: (windows that see the image there, what they see)."""
    for offset in range(kernel):
        first = max(0, -((offset - padding) // stride))
        last = min(n_out - 1, (n - 1 + padding - offset) // stride)
        if first <= last:
            start = first * stride + offset - padding
            yield slice(first, last + 1), slice(start, start + (last - first) * stride + 1, stride)


def _windows(
    size: Pair, kernel: Pair, stride: Pair, padding: Pair, ceil_mode: bool
) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """Both axes, one window position after the other: (index into the output, index into the image)."""
    (H, W), (H_out, W_out) = size, pooled_size(size, kernel, stride, padding, ceil_mode)
    for out_rows, rows in _taps(H, H_out, kernel[0], stride[0], padding[0]):
        for out_columns, columns in _taps(W, W_out, kernel[1], stride[1], padding[1]):
            yield (..., out_rows, out_columns), (..., rows, columns)


class MaxPool2d(Function):
    op = "max_pool2d"

    @staticmethod
    def output_shape(x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, ceil_mode: bool) -> Shape:
        return _output_shape("max_pool2d", x, kernel_size, stride, padding, ceil_mode)

    @staticmethod
    def forward(
        ctx: Context, x: np.ndarray, kernel_size: Pair, stride: Pair, padding: Pair, ceil_mode: bool
    ) -> np.ndarray:
        out, argmax = max_pool_forward(x, kernel_size, stride, padding, ceil_mode)
        if ctx.needs_input_grad[0]:
            ctx.geometry = kernel_size, stride, padding
            ctx.save_for_backward(argmax=argmax)
        return out

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        return (max_pool_backward(ctx["argmax"], grad_output, ctx.input_shapes[0], *ctx.geometry),)


class AvgPool2d(Function):
    op = "avg_pool2d"

    @staticmethod
    def output_shape(
        x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, ceil_mode: bool, count_include_pad: bool
    ) -> Shape:
        return _output_shape("avg_pool2d", x, kernel_size, stride, padding, ceil_mode)

    @staticmethod
    def forward(
        ctx: Context,
        x: np.ndarray,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        ceil_mode: bool,
        count_include_pad: bool,
    ) -> np.ndarray:
        size = (x.shape[2], x.shape[3])
        ctx.geometry = kernel_size, stride, padding, ceil_mode
        out = np.zeros((*x.shape[:2], *pooled_size(size, *ctx.geometry)), x.dtype)
        for outside, inside in _windows(size, *ctx.geometry):
            out[outside] += x[inside]
        ctx.count_include_pad = count_include_pad
        out /= _counts(size, ctx.geometry, count_include_pad, x.dtype)
        return out

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        shape = ctx.input_shapes[0]
        size = shape[2:]
        share = grad_output / _counts(size, ctx.geometry, ctx.count_include_pad, grad_output.dtype)
        grad = np.zeros(shape, grad_output.dtype)
        for outside, inside in _windows(size, *ctx.geometry):
            grad[inside] += share[outside]
        return (grad,)


def _counts(
    size: Pair, geometry: tuple[Pair, Pair, Pair, bool], count_include_pad: bool, dtype: np.dtype
) -> np.ndarray:
    """Elements that each window's mean is over: all k_h·k_w, or those inside the image, (H_out, W_out).

    Where windows reach beyond the padding (``ceil_mode``), what is there never counts.
    """
    kernel_size, stride, padding, ceil_mode = geometry
    if count_include_pad and not ceil_mode:
        return np.asarray(kernel_size[0] * kernel_size[1], dtype)
    if count_include_pad:
        rows, columns = (
            np.minimum(k, n + 2 * p - s * np.arange(n_out))
            for n, k, s, p, n_out in zip(size, kernel_size, stride, padding, pooled_size(size, *geometry), strict=True)
        )
        return (rows[:, None] * columns).astype(dtype)
    counts = np.zeros(pooled_size(size, *geometry), dtype)
    for outside, _ in _windows(size, *geometry):
        counts[outside] += 1
    return counts


class AdaptiveAvgPool2d(Function):
    op = "adaptive_avg_pool2d"

    @staticmethod
    def output_shape(x: Tensor, output_size: Pair) -> Shape:
        require_images("adaptive_avg_pool2d", x)
        if 0 in x.shape[2:]:
            raise ValueError(f"adaptive_avg_pool2d: x has shape {x.shape}, expected a non-empty image")
        return (*x.shape[:2], *output_size)

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, output_size: Pair) -> np.ndarray:
        out = np.empty((*x.shape[:2], *output_size), x.dtype)
        for i, j, rows, columns in _adaptive_windows((x.shape[2], x.shape[3]), output_size):
            x[:, :, rows, columns].mean(axis=(2, 3), out=out[:, :, i, j])
        ctx.output_size = output_size
        return out

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        shape = ctx.input_shapes[0]
        grad = np.zeros(shape, grad_output.dtype)
        for i, j, rows, columns in _adaptive_windows(shape[2:], ctx.output_size):
            count = (rows.stop - rows.start) * (columns.stop - columns.start)
            grad[:, :, rows, columns] += (grad_output[:, :, i, j] / count)[:, :, None, None]
        return (grad,)


def _adaptive_windows(size: Pair, output_size: Pair) -> Iterator[tuple[int, int, slice, slice]]:
    """Window i of m covers floor(i·n/m) up to ceil((i + 1)·n/m), as in PyTorch."""
    rows, columns = (
        [slice(i * n // m, -(-(i + 1) * n // m)) for i in range(m)] for n, m in zip(size, output_size, strict=True)
    )
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            yield i, j, row, column


def _window_arguments(
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    ceil_mode: bool,
) -> dict[str, Any]:
    kernel = pair("kernel_size", kernel_size, 1)
    return {
        "kernel_size": kernel,
        "stride": kernel if stride is None else pair("stride", stride, 1),
        "padding": pair("padding", padding, 0),
        "ceil_mode": bool(ceil_mode),
    }


def max_pool2d(
    x: Any,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    *,
    ceil_mode: bool = False,
) -> Tensor:
    """The maximum of each window; of equal maxima the first in reading order gets the gradient.

    Parameters
    ----------
    x : Tensor (B, C, H, W)
    kernel_size : int or pair
    stride : int or pair, optional
        ``kernel_size`` by default.
    padding : int or pair
        At most half of ``kernel_size``; what is outside never wins.
    ceil_mode : bool
        Whether a last window that is not whole counts too, if it begins inside the image or the padding before it.

    Returns
    -------
    Tensor (B, C, H_out, W_out)
        One small integer per window is kept for backward (a byte for windows up to 256 elements).

    Raises
    ------
    ValueError, TypeError
        If the shapes do not fit or the output would be empty.
    """
    return MaxPool2d.apply(as_tensor(x), **_window_arguments(kernel_size, stride, padding, ceil_mode))


def avg_pool2d(
    x: Any,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    *,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """The mean of each window. Keeps nothing.

    Parameters
    ----------
    x : Tensor (B, C, H, W)
    kernel_size, stride, padding, ceil_mode
        As in :func:`max_pool2d`; the padding is zeros.
    count_include_pad : bool
        Whether the zeros of the padding count as elements of the mean.
    """
    arguments = _window_arguments(kernel_size, stride, padding, ceil_mode)
    return AvgPool2d.apply(as_tensor(x), **arguments, count_include_pad=bool(count_include_pad))


def adaptive_avg_pool2d(x: Any, output_size: int | Sequence[int | None] | None) -> Tensor:
    """Means over a grid of ``output_size`` windows that cover the image, ``(B, C, *output_size)``. Keeps nothing.

    Where ``output_size``, or one of its two numbers, is None, that is the size of the image.
    """
    x = as_tensor(x)
    asked = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    if None in asked and len(asked) == 2 and x.ndim == 4:
        output_size = [own if n is None else n for n, own in zip(asked, x.shape[2:], strict=True)]
    return AdaptiveAvgPool2d.apply(x, output_size=pair("output_size", output_size, 1))  # type: ignore[arg-type]
