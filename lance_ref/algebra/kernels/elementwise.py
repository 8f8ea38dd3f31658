"""Compiled loops for bit masks, frozen batch norm and max-pooling; see :mod:`lance_ref.algebra.kernels.threads`.

None of it counts as multiply-adds of products: these loops move, compare and scale. Masks are packed as
``numpy.packbits`` packs them, eight elements to a byte, the first in the highest bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from lance_ref.algebra.kernels.threads import Loops, Pair, numba_enabled
from lance_ref.engine.tensor import Shape
from lance_ref.engine.workers import share_out, threads

SHORT_PLANE = 8
"""Planes of fewer elements are left to NumPy's own loops, which then run along the channels."""

PACKED_TOGETHER = 1 << 16
"""Elements whose bits are packed at a time, a multiple of 8."""


def clamp_and_pack(x: np.ndarray, ceiling: float) -> tuple[np.ndarray, np.ndarray]:
    """min(max(x, 0), ceiling), and the packed mask of where the gradient passes.

    It passes where 0 < x < ceiling, and, if the ceiling is infinite, at infinity too. Plain NumPy: a
    compiled loop that packs bits one by one took twice as long.

    Returns
    -------
    (array like x, uint8 array of ceil(x.size / 8) bytes)
        NaN stays NaN.
    """
    source = np.ascontiguousarray(x).reshape(-1)
    out, largest = np.empty(x.shape, x.dtype), x.dtype.type(ceiling)
    if x.size <= PACKED_TOGETHER and ceiling == np.inf:  # in as few calls as there can be
        np.maximum(0, source, out=out.reshape(-1))  # in this order −0.0 stays what it is, as clip leaves it
        return out, np.packbits(source > 0)
    flat, mask = out.reshape(-1), np.empty(-(-source.size // 8), np.uint8)

    def part(start: int, stop: int) -> None:
        for block in _blocks(start, stop, source.size):
            seen, written = source[block], flat[block]
            seen.clip(0, largest, out=written)
            passes = seen > 0
            if ceiling < np.inf:
                passes &= seen < largest
            mask[block.start // 8 : -(-block.stop // 8)] = np.packbits(passes)

    _shared(source.size, part)
    return out, mask


def _blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    """Blocks ``start`` to ``stop``, of :data:`PACKED_TOGETHER` elements each; the last one may be shorter."""
    for block in range(start, stop):
        yield slice(block * PACKED_TOGETHER, min((block + 1) * PACKED_TOGETHER, size))


def _shared(size: int, part: Callable[[int, int], None]) -> None:
    """Run ``part(start, stop)`` over the blocks of all elements, in several threads if there are several blocks."""
    share_out(threads(), -(-size // PACKED_TOGETHER), part)


def pack_blocks(condition: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """``np.packbits(condition(x))`` in C order, for an element-wise condition: the Booleans of a block at a time.

    Returns
    -------
    uint8 array of ceil(x.size / 8) bytes
    """
    flat = np.ascontiguousarray(x).reshape(-1)
    mask = np.empty(-(-flat.size // 8), np.uint8)

    def part(start: int, stop: int) -> None:
        for block in _blocks(start, stop, flat.size):
            mask[block.start // 8 : -(-block.stop // 8)] = np.packbits(condition(flat[block]))

    _shared(flat.size, part)
    return mask


def apply_mask(mask: np.ndarray, array: np.ndarray, scale: float = 1.0, over: np.ndarray | None = None) -> np.ndarray:
    """``array * scale`` where the packed ``mask`` has a bit, zero elsewhere.

    ``over`` is ``array``, if it may be written over: it is where it lies in C order.
    """
    if not numba_enabled():
        return apply_mask_numpy(mask, array, scale)
    source = np.ascontiguousarray(array)
    in_place = over is not None and over.flags.c_contiguous
    out = over if over is not None and in_place else np.empty(array.shape, source.dtype)
    _apply_mask.run(mask.size, source.size, mask, source.reshape(-1), out.reshape(-1), source.dtype.type(scale))
    return out


def apply_mask_numpy(mask: np.ndarray, array: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """NumPy twin of :func:`apply_mask`."""
    bits = np.unpackbits(mask, count=array.size).reshape(array.shape).astype(bool)
    return np.where(bits, array * array.dtype.type(scale), array.dtype.type(0))


@Loops
def _apply_mask(start, stop, mask, array, out, scale):  # type: ignore[no-untyped-def]
    zero = array.dtype.type(0)
    for byte in range(start, stop):
        bits = mask[byte]
        first = byte * 8
        if first + 8 <= array.size:
            for j in range(8):  # of known length: unrolled
                value = array[first + j] * scale
                out[first + j] = value if bits & (128 >> j) else zero
        else:
            for j in range(array.size - first):
                value = array[first + j] * scale
                out[first + j] = value if bits & (128 >> j) else zero


def scale_and_shift(x: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """x·scale + shift for each channel, (B, C, ...) with (C,) each; the compiled loops read x once."""
    if not numba_enabled() or math.prod(x.shape[2:]) < SHORT_PLANE or not x.flags.c_contiguous:
        return scale_and_shift_numpy(x, scale, shift)
    out = np.empty(x.shape, x.dtype)
    N = x.shape[0] * x.shape[1]
    numbers = [np.ascontiguousarray(values, x.dtype) for values in (scale, shift)]
    _scale_and_shift.run(N, x.size, x.reshape(N, -1), out.reshape(N, -1), *numbers)
    return out


def scale_and_shift_numpy(x: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """NumPy twin of :func:`scale_and_shift`."""
    channels = (-1, *[1] * (x.ndim - 2))
    out = x * scale.reshape(channels)
    out += shift.reshape(channels)
    return out


@Loops
def _scale_and_shift(start, stop, x, out, scale, shift):  # type: ignore[no-untyped-def]
    C = scale.size
    for n in range(start, stop):
        factor, summand = scale[n % C], shift[n % C]
        source, target = x[n], out[n]
        for i in range(source.size):
            target[i] = source[i] * factor + summand


def pooled_size(size: Pair, kernel: Pair, stride: Pair, padding: Pair, ceil_mode: bool = False) -> Pair:
    """(H_out, W_out): floor((n + 2·padding − kernel) / stride) + 1.

    With ``ceil_mode`` it is the ceiling, without a last window that would begin beyond the image and the padding
    before it.

    >>> pooled_size((6, 7), (3, 2), (2, 2), (0, 0)), pooled_size((6, 7), (3, 2), (2, 2), (0, 0), True)
    ((2, 3), (3, 4))
    """
    sizes = []
    for n, k, s, p in zip(size, kernel, stride, padding, strict=True):
        beside_the_first = (n + 2 * p - k + (s - 1 if ceil_mode else 0)) // s
        if ceil_mode and beside_the_first * s >= n + p:
            beside_the_first -= 1
        sizes.append(beside_the_first + 1)
    return sizes[0], sizes[1]


def max_pool_forward(
    x: np.ndarray, kernel: Pair, stride: Pair, padding: Pair, ceil_mode: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Maximum over each window, and which position of the window it was.

    Parameters
    ----------
    x : (B, C, H, W)
    ceil_mode : bool
        Whether the last windows may reach beyond the image; what is there is never chosen.

    Returns
    -------
    out, argmax : (B, C, H_out, W_out)
        ``argmax`` counts the window's positions row by row, in the smallest unsigned type that can;
        the first of equals wins, and a NaN wins over all. Padding is never chosen.
    """
    if not numba_enabled():
        return max_pool_forward_numpy(x, kernel, stride, padding, ceil_mode)
    source = np.ascontiguousarray(x)
    B, C, H, W = source.shape
    H_out, W_out = pooled_size((H, W), kernel, stride, padding, ceil_mode)
    out = np.empty((B, C, H_out, W_out), source.dtype)
    argmax = np.empty(out.shape, np.min_scalar_type(kernel[0] * kernel[1] - 1))
    flat = (source.reshape(-1, H, W), out.reshape(-1, H_out, W_out), argmax.reshape(-1, H_out, W_out))
    _max_pool_forward.run(B * C, out.size * kernel[0] * kernel[1], *flat, *kernel, *stride, *padding)
    return out, argmax


def max_pool_forward_numpy(
    x: np.ndarray, kernel: Pair, stride: Pair, padding: Pair, ceil_mode: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """NumPy twin of :func:`max_pool_forward`."""
    B, C, H, W = x.shape
    H_out, W_out = pooled_size((H, W), kernel, stride, padding, ceil_mode)
    rows = stride[0] * np.arange(H_out)[:, None] - padding[0]  # (H_out, 1): top of each window, maybe above the image
    columns = stride[1] * np.arange(W_out) - padding[1]  # (W_out,)
    out = np.full((B, C, H_out, W_out), -np.inf, x.dtype)
    argmax = np.empty(out.shape, np.min_scalar_type(kernel[0] * kernel[1] - 1))
    argmax[:] = np.maximum(-rows, 0) * kernel[1] + np.maximum(-columns, 0)  # first inside: for windows of -inf only
    for position, (p, q) in enumerate(np.ndindex(*kernel)):
        inside = (rows + p >= 0) & (rows + p < H) & (columns + q >= 0) & (columns + q < W)  # (H_out, W_out)
        seen = x[:, :, np.clip(rows + p, 0, H - 1), np.clip(columns + q, 0, W - 1)]  # (B, C, H_out, W_out)
        better = inside & ((seen > out) | (np.isnan(seen) & ~np.isnan(out)))
        np.copyto(out, seen, where=better)
        np.copyto(argmax, argmax.dtype.type(position), where=better)
    return out, argmax


@Loops
def _max_pool_forward(start, stop, x, out, argmax, k_h, k_w, s_h, s_w, p_h, p_w):  # type: ignore[no-untyped-def]
    _, H, W = x.shape
    _, H_out, W_out = out.shape
    for n in range(start, stop):
        for h in range(H_out):
            for w in range(W_out):
                best, where = -np.inf, -1
                for p in range(k_h):
                    row = h * s_h + p - p_h
                    if row < 0 or row >= H:
                        continue
                    for q in range(k_w):
                        column = w * s_w + q - p_w
                        if column < 0 or column >= W:
                            continue
                        value = x[n, row, column]
                        if where < 0 or value > best or (value != value and best == best):
                            best, where = value, p * k_w + q
                out[n, h, w] = best
                argmax[n, h, w] = where


def max_pool_backward(
    argmax: np.ndarray, grad_output: np.ndarray, input_shape: Shape, kernel: Pair, stride: Pair, padding: Pair
) -> np.ndarray:
    """Each output's gradient, added where its maximum was: (B, C, H, W)."""
    if not numba_enabled():
        return max_pool_backward_numpy(argmax, grad_output, input_shape, kernel, stride, padding)
    H, W = input_shape[2:]
    grad = np.zeros(input_shape, grad_output.dtype)
    source = np.ascontiguousarray(grad_output)
    planes = (argmax.reshape(-1, *argmax.shape[2:]), source.reshape(-1, *source.shape[2:]), grad.reshape(-1, H, W))
    _max_pool_backward.run(input_shape[0] * input_shape[1], source.size, *planes, kernel[1], *stride, *padding)
    return grad


def max_pool_backward_numpy(
    argmax: np.ndarray, grad_output: np.ndarray, input_shape: Shape, kernel: Pair, stride: Pair, padding: Pair
) -> np.ndarray:
    """NumPy twin of :func:`max_pool_backward`."""
    B, C, H, W = input_shape
    p, q = np.divmod(argmax.astype(np.intp), kernel[1])
    rows = p + stride[0] * np.arange(argmax.shape[2])[:, None] - padding[0]
    columns = q + stride[1] * np.arange(argmax.shape[3]) - padding[1]
    planes = np.arange(B * C).reshape(B, C, 1, 1)
    grad = np.zeros(B * C * H * W, grad_output.dtype)
    np.add.at(grad, ((planes * H + rows) * W + columns).reshape(-1), grad_output.reshape(-1))
    return grad.reshape(input_shape)


@Loops
def _max_pool_backward(start, stop, argmax, grad_output, grad, k_w, s_h, s_w, p_h, p_w):  # type: ignore[no-untyped-def]
    _, H_out, W_out = grad_output.shape
    for n in range(start, stop):
        for h in range(H_out):
            for w in range(W_out):
                p, q = argmax[n, h, w] // k_w, argmax[n, h, w] % k_w
                grad[n, h * s_h + p - p_h, w * s_w + q - p_w] += grad_output[n, h, w]
