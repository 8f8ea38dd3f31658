"""Depthwise convolution and its two gradients, in the manner of :mod:`lance_ref.algebra.kernels.threads`.

Two kinds of loops, which give the same result:

* channels: one image at a time is laid out with the channels innermost, and the innermost loop runs along
  them; where there are several, and the map is not so large that the copy leaves the cache;
* rows: the innermost loop runs along a row of the map; elsewhere.

Both run over the zero-padded map, so that they execute B·C_out·H_out·W_out·k_h·k_w multiply-adds.

:func:`depthwise_core_gradient` is the weight gradient of an input known by its core, along the channels too.
"""

from __future__ import annotations

import math

import numpy as np

from lance_ref.algebra.kernels.threads import Loops, Padding, Pair, numba_enabled
from lance_ref.algebra.modes import contraction_order
from lance_ref.engine import counting
from lance_ref.engine.tensor import Shape

NARROW, FEW = 28, 8
"""Maps at most ``NARROW`` wide with at least ``FEW`` channels, each with one output, run along the channels."""


LANES, MOST_PLACES = 64, 256
"""Channels at a time of :func:`depthwise_core_gradient`, and the places of the largest map where it is faster."""


def along_channels(C_in: int, C_out: int, W_out: int) -> bool:
    return C_in == C_out >= FEW and W_out <= NARROW


def depthwise_forward(
    x: np.ndarray, weight: np.ndarray, output_size: Pair, stride: Pair, padding: Padding, dilation: Pair
) -> np.ndarray:
    """Depthwise convolution: output channel o looks at input channel o // (C_out/C_in) alone.

    Parameters
    ----------
    x : (B, C_in, H, W)
    weight : (C_out, 1, k_h, k_w)

    Returns
    -------
    (B, C_out, H_out, W_out)
    """
    B, (C_out, _, k_h, k_w) = x.shape[0], weight.shape
    counting.add(B * C_out * math.prod(output_size) * k_h * k_w)
    arguments = (np.ascontiguousarray(x), np.ascontiguousarray(weight))
    if not numba_enabled():
        return depthwise_forward_numpy(*arguments, output_size, stride, padding, dilation)
    out = np.empty((B, C_out, *output_size), x.dtype)
    by_channel = along_channels(x.shape[1], C_out, output_size[1])
    loops, planes = (_forward_channels, B) if by_channel else (_depthwise_forward, B * C_out)
    loops.run(planes, out.size * k_h * k_w, *arguments, out, *_flat(stride, padding, dilation))
    return out


def depthwise_input_gradient(
    weight: np.ndarray, grad_output: np.ndarray, input_shape: Shape, stride: Pair, padding: Padding, dilation: Pair
) -> np.ndarray:
    """Gradient of :func:`depthwise_forward` with respect to its input, (B, C_in, H, W)."""
    counting.add(grad_output.size * math.prod(weight.shape[2:]))
    arguments = (np.ascontiguousarray(weight), np.ascontiguousarray(grad_output))
    if not numba_enabled():
        return depthwise_input_gradient_numpy(*arguments, input_shape, stride, padding, dilation)
    grad = np.empty(input_shape, grad_output.dtype)
    work = grad_output.size * math.prod(weight.shape[2:])
    B, C_in = input_shape[:2]
    by_channel = along_channels(C_in, weight.shape[0], grad_output.shape[3])
    loops, planes = (_input_gradient_channels, B) if by_channel else (_depthwise_input_gradient, B * C_in)
    loops.run(planes, work, *arguments, grad, *_flat(stride, padding, dilation))
    return grad


def depthwise_weight_gradient(
    x: np.ndarray, grad_output: np.ndarray, weight_shape: Shape, stride: Pair, padding: Padding, dilation: Pair
) -> np.ndarray:
    """Gradient of :func:`depthwise_forward` with respect to its weight, (C_out, 1, k_h, k_w)."""
    counting.add(grad_output.size * math.prod(weight_shape[2:]))
    arguments = (np.ascontiguousarray(x), np.ascontiguousarray(grad_output))
    if not numba_enabled():
        return depthwise_weight_gradient_numpy(*arguments, weight_shape, stride, padding, dilation)
    grad = np.zeros(weight_shape, grad_output.dtype)
    work = grad_output.size * math.prod(weight_shape[2:])
    by_channel = along_channels(x.shape[1], weight_shape[0], grad_output.shape[3])
    loops = _weight_gradient_channels if by_channel else _depthwise_weight_gradient
    loops.run(x.shape[1], work, *arguments, grad, *_flat(stride, padding, dilation))
    return grad


def _flat(stride: Pair, padding: Padding, dilation: Pair) -> tuple[int, ...]:
    (top, bottom), (left, right) = padding
    return (*stride, top, bottom, left, right, *dilation)


@Loops
def _depthwise_forward(start, stop, x, weight, out, s_h, s_w, top, bottom, left, right, d_h, d_w):  # type: ignore[no-untyped-def]
    _, C_in, H, W = x.shape
    _, C_out, H_out, W_out = out.shape
    k_h, k_w = weight.shape[2], weight.shape[3]
    padded = np.zeros((H + top + bottom, W + left + right), x.dtype)
    for plane in range(start, stop):
        b, o = plane // C_out, plane % C_out
        for h in range(H):
            for w in range(W):
                padded[top + h, left + w] = x[b, o // (C_out // C_in), h, w]
        for h in range(H_out):
            row = out[b, o, h]
            row[:] = 0
            for p in range(k_h):
                line, values = padded[h * s_h + p * d_h], weight[o, 0, p]
                for q in range(0, k_w - k_w % 3, 3):  # three positions at a time: a third of the reads and writes
                    first, second, third = line[q * d_w :], line[(q + 1) * d_w :], line[(q + 2) * d_w :]
                    v_1, v_2, v_3 = values[q], values[q + 1], values[q + 2]
                    if s_w == 1:
                        for w in range(W_out):
                            row[w] += v_1 * first[w] + v_2 * second[w] + v_3 * third[w]
                    else:
                        for w in range(W_out):
                            row[w] += v_1 * first[w * s_w] + v_2 * second[w * s_w] + v_3 * third[w * s_w]
                for q in range(k_w - k_w % 3, k_w):
                    first, v_1 = line[q * d_w :], values[q]
                    if s_w == 1:
                        for w in range(W_out):
                            row[w] += v_1 * first[w]
                    else:
                        for w in range(W_out):
                            row[w] += v_1 * first[w * s_w]


@Loops
def _depthwise_input_gradient(start, stop, weight, grad_output, grad, s_h, s_w, top, bottom, left, right, d_h, d_w):  # type: ignore[no-untyped-def]
    _, C_in, H, W = grad.shape
    _, C_out, H_out, W_out = grad_output.shape
    k_h, k_w = weight.shape[2], weight.shape[3]
    multiplier = C_out // C_in
    padded = np.zeros((H + top + bottom, W + left + right), grad.dtype)
    for plane in range(start, stop):
        b, c = plane // C_in, plane % C_in
        padded[:] = 0
        for o in range(c * multiplier, (c + 1) * multiplier):
            for h in range(H_out):
                source = grad_output[b, o, h]
                for p in range(k_h):
                    row = padded[h * s_h + p * d_h]
                    for q in range(k_w):
                        target, value = row[q * d_w :], weight[o, 0, p, q]
                        if s_w == 1:
                            for w in range(W_out):
                                target[w] += value * source[w]
                        else:
                            for w in range(W_out):
                                target[w * s_w] += value * source[w]
        for h in range(H):
            for w in range(W):
                grad[b, c, h, w] = padded[top + h, left + w]


@Loops
def _depthwise_weight_gradient(start, stop, x, grad_output, grad, s_h, s_w, top, bottom, left, right, d_h, d_w):  # type: ignore[no-untyped-def]
    B, C_in, H, W = x.shape
    _, C_out, H_out, W_out = grad_output.shape
    k_h, k_w = grad.shape[2], grad.shape[3]
    multiplier = C_out // C_in
    padded = np.zeros((H + top + bottom, W + left + right), x.dtype)
    for c in range(start, stop):
        for b in range(B):
            for h in range(H):
                for w in range(W):
                    padded[top + h, left + w] = x[b, c, h, w]
            for o in range(c * multiplier, (c + 1) * multiplier):
                for p in range(k_h):
                    for q in range(k_w):
                        total = grad[o, 0, p, q]
                        for h in range(H_out):
                            source = padded[h * s_h + p * d_h, q * d_w :]
                            row = grad_output[b, o, h]
                            if s_w == 1:
                                for w in range(W_out):
                                    total += row[w] * source[w]
                            else:
                                for w in range(W_out):
                                    total += row[w] * source[w * s_w]
                        grad[o, 0, p, q] = total


@Loops
def _forward_channels(start, stop, x, weight, out, s_h, s_w, top, bottom, left, right, d_h, d_w):  # type: ignore[no-untyped-def]
    _, C, H, W = x.shape
    _, _, H_out, W_out = out.shape
    k_h, k_w = weight.shape[2], weight.shape[3]
    padded = np.zeros((H + top + bottom, W + left + right, C), x.dtype)
    kernel = np.empty((k_h, k_w, C), x.dtype)
    for c in range(C):
        for p in range(k_h):
            for q in range(k_w):
                kernel[p, q, c] = weight[c, 0, p, q]
    total = np.empty(C, x.dtype)
    for b in range(start, stop):
        for c in range(C):
            for h in range(H):
                for w in range(W):
                    padded[top + h, left + w, c] = x[b, c, h, w]
        for h in range(H_out):
            for w in range(W_out):
                total[:] = 0
                for p in range(k_h):
                    for q in range(k_w):
                        source = padded[h * s_h + p * d_h, w * s_w + q * d_w]
                        values = kernel[p, q]
                        for c in range(C):
                            total[c] += values[c] * source[c]
                for c in range(C):
                    out[b, c, h, w] = total[c]


@Loops
def _input_gradient_channels(start, stop, weight, grad_output, grad, s_h, s_w, top, bottom, left, right, d_h, d_w):  # type: ignore[no-untyped-def]
    _, C, H, W = grad.shape
    _, _, H_out, W_out = grad_output.shape
    k_h, k_w = weight.shape[2], weight.shape[3]
    padded = np.empty((H + top + bottom, W + left + right, C), grad.dtype)
    kernel = np.empty((k_h, k_w, C), grad.dtype)
    for c in range(C):
        for p in range(k_h):
            for q in range(k_w):
                kernel[p, q, c] = weight[c, 0, p, q]
    source = np.empty(C, grad.dtype)
    for b in range(start, stop):
        padded[:] = 0
        for h in range(H_out):
            for w in range(W_out):
                for c in range(C):
                    source[c] = grad_output[b, c, h, w]
                for p in range(k_h):
                    for q in range(k_w):
                        target = padded[h * s_h + p * d_h, w * s_w + q * d_w]
                        values = kernel[p, q]
                        for c in range(C):
                            target[c] += values[c] * source[c]
        for c in range(C):
            for h in range(H):
                for w in range(W):
                    grad[b, c, h, w] = padded[top + h, left + w, c]


@Loops
def _weight_gradient_channels(start, stop, x, grad_output, grad, s_h, s_w, top, bottom, left, right, d_h, d_w):  # type: ignore[no-untyped-def]
    B, _, H, W = x.shape
    _, _, H_out, W_out = grad_output.shape
    k_h, k_w = grad.shape[2], grad.shape[3]
    C = stop - start
    padded = np.zeros((H + top + bottom, W + left + right, C), x.dtype)
    total = np.zeros((k_h, k_w, C), x.dtype)
    row = np.empty(C, x.dtype)
    for b in range(B):
        for c in range(C):
            for h in range(H):
                for w in range(W):
                    padded[top + h, left + w, c] = x[b, start + c, h, w]
        for h in range(H_out):
            for w in range(W_out):
                for c in range(C):
                    row[c] = grad_output[b, start + c, h, w]
                for p in range(k_h):
                    for q in range(k_w):
                        source = padded[h * s_h + p * d_h, w * s_w + q * d_w]
                        target = total[p, q]
                        for c in range(C):
                            target[c] += row[c] * source[c]
    for c in range(C):
        for p in range(k_h):
            for q in range(k_w):
                grad[start + c, 0, p, q] = total[p, q, c]


def depthwise_core_gradient(
    core: np.ndarray, grad_output: np.ndarray, rows: np.ndarray, columns: np.ndarray, kernel: Pair
) -> np.ndarray:
    """Weight gradient of a depthwise convolution whose input has height and width compressed alone.

    Z = G ×₃ rowsᵀ ×₄ columnsᵀ in the cheaper order, and dW[o,0,p,q] = Σ_{b,i,j} Z[b, o, (p,i), (q,j)] · S[b, c, i, j]
    with c = o // (C_out/C_in), in one pass over G. The plain code that it equals is that of
    :func:`lance_ref.algebra.projection.separable_order`, which also runs where there is no Numba.

    Parameters
    ----------
    core : (B, C_in, r3, r4)
        S.
    grad_output : (B, C_out, H_out, W_out)
        G.
    rows, columns : (H_out, k_h·r3), (W_out, k_w·r4)
        As :func:`lance_ref.algebra.projection.shifted_rows` makes them.
    kernel : (k_h, k_w)

    Returns
    -------
    (C_out, 1, k_h, k_w)
    """
    (B, C_out, H_out, W_out), (k_h, k_w), (r3, r4) = grad_output.shape, kernel, core.shape[2:]
    height_first = contraction_order((H_out, W_out), (k_h * r3, k_w * r4))[0] == 0
    half = W_out * k_h * r3 if height_first else H_out * k_w * r4  # elements of G's plane after the first product
    along = H_out if height_first else W_out
    counting.add(B * C_out * (half * along + k_h * r3 * k_w * r4 * (W_out if height_first else H_out)))
    counting.add(C_out * k_h * k_w * B * r3 * r4)
    grad = np.empty((C_out, 1, k_h, k_w), grad_output.dtype)
    first, second = (rows, columns) if height_first else (columns, rows)
    arguments = [np.ascontiguousarray(array, grad_output.dtype) for array in (core, grad_output, first, second)]
    work = grad_output.size * max(k_h * r3, k_w * r4)
    _core_gradient_channels.run(C_out, work, *arguments, grad, height_first, LANES)
    return grad


@Loops
def _core_gradient_channels(start, stop, core, grad_output, first, second, grad, height_first, lanes):  # type: ignore[no-untyped-def]
    B, _, H_out, W_out = grad_output.shape
    multiplier = grad_output.shape[1] // core.shape[1]
    k_h, k_w = grad.shape[2], grad.shape[3]
    r3, r4 = core.shape[2], core.shape[3]
    near, far = (H_out, W_out) if height_first else (W_out, H_out)  # summed first, and second
    plane = np.zeros((far, near, lanes), grad.dtype)
    half = np.empty((far, first.shape[1], lanes), grad.dtype)
    S = np.zeros((r3, r4, lanes), grad.dtype)
    total = np.empty((k_h, k_w, lanes), grad.dtype)
    z = np.empty(lanes, grad.dtype)
    for o in range(start, stop, lanes):
        many = min(lanes, stop - o)
        total[:] = 0
        for b in range(B):
            for c in range(many):
                if height_first:
                    for h in range(H_out):
                        for w in range(W_out):
                            plane[w, h, c] = grad_output[b, o + c, h, w]
                else:
                    for h in range(H_out):
                        for w in range(W_out):
                            plane[h, w, c] = grad_output[b, o + c, h, w]
                for i in range(r3):
                    for j in range(r4):
                        S[i, j, c] = core[b, (o + c) // multiplier, i, j]
            for m in range(far):
                for x in range(first.shape[1]):
                    target = half[m, x]
                    target[:] = 0
                    for n in range(near):
                        factor = first[n, x]
                        source = plane[m, n]
                        for c in range(lanes):
                            target[c] += factor * source[c]
            for x in range(first.shape[1]):
                for y in range(second.shape[1]):
                    z[:] = 0
                    for m in range(far):
                        factor = second[m, y]
                        source = half[m, x]
                        for c in range(lanes):
                            z[c] += factor * source[c]
                    row, column = (x, y) if height_first else (y, x)
                    target = total[row // r3, column // r4]
                    values = S[row % r3, column % r4]
                    for c in range(lanes):
                        target[c] += z[c] * values[c]
        for p in range(k_h):
            for q in range(k_w):
                for c in range(many):
                    grad[o + c, 0, p, q] = total[p, q, c]


def depthwise_forward_numpy(
    x: np.ndarray, weight: np.ndarray, output_size: Pair, stride: Pair, padding: Padding, dilation: Pair
) -> np.ndarray:
    """NumPy twin of :func:`depthwise_forward`: one shifted product per kernel position."""
    multiplier = weight.shape[0] // x.shape[1]
    padded = np.repeat(np.pad(x, ((0, 0), (0, 0), *padding)), multiplier, axis=1)
    out = np.zeros((x.shape[0], weight.shape[0], *output_size), x.dtype)
    for p, q in np.ndindex(*weight.shape[2:]):
        out += weight[:, 0, p, q, None, None] * _shifted(padded, p, q, output_size, stride, dilation)
    return out


def depthwise_input_gradient_numpy(
    weight: np.ndarray, grad_output: np.ndarray, input_shape: Shape, stride: Pair, padding: Padding, dilation: Pair
) -> np.ndarray:
    """NumPy twin of :func:`depthwise_input_gradient`."""
    B, C_in, H, W = input_shape
    (top, bottom), (left, right) = padding
    output_size = (grad_output.shape[2], grad_output.shape[3])
    padded = np.zeros((B, C_in, H + top + bottom, W + left + right), grad_output.dtype)
    for p, q in np.ndindex(*weight.shape[2:]):
        product = weight[:, 0, p, q, None, None] * grad_output  # (B, C_out, H_out, W_out)
        window = _shifted(padded, p, q, output_size, stride, dilation)
        window += product.reshape(B, C_in, -1, *output_size).sum(axis=2)
    return np.ascontiguousarray(padded[:, :, top : top + H, left : left + W])


def depthwise_weight_gradient_numpy(
    x: np.ndarray, grad_output: np.ndarray, weight_shape: Shape, stride: Pair, padding: Padding, dilation: Pair
) -> np.ndarray:
    """NumPy twin of :func:`depthwise_weight_gradient`."""
    multiplier = weight_shape[0] // x.shape[1]
    padded = np.repeat(np.pad(x, ((0, 0), (0, 0), *padding)), multiplier, axis=1)
    output_size = (grad_output.shape[2], grad_output.shape[3])
    grad = np.empty(weight_shape, grad_output.dtype)
    for p, q in np.ndindex(*weight_shape[2:]):
        shifted = _shifted(padded, p, q, output_size, stride, dilation)
        grad[:, 0, p, q] = np.einsum("bohw,bohw->o", grad_output, shifted)
    return grad


def _shifted(padded: np.ndarray, p: int, q: int, output_size: Pair, stride: Pair, dilation: Pair) -> np.ndarray:
    """What kernel position (p, q) sees: a strided view of the padded planes, (B, C, H_out, W_out)."""
    (H_out, W_out), (s_h, s_w), (d_h, d_w) = output_size, stride, dilation
    return padded[:, :, p * d_h :, q * d_w :][:, :, : (H_out - 1) * s_h + 1 : s_h, : (W_out - 1) * s_w + 1 : s_w]
