"""Loops that NumPy cannot run well, compiled by Numba, each beside the plain NumPy it must equal.

Every public function here is one doorway: it allocates the result, reports the multiply-adds of
the loops, and runs either the compiled loops or their NumPy twin (named ``*_numpy``; the tests
compare the two). ``LANCE_REF_NUMBA=0`` in the environment, or no Numba at all, selects the twins.

The compiled loops take ``start, stop`` over independent planes and run without the interpreter
lock, so that a small thread pool can share them out. They never allocate results themselves:
arrays made inside Numba would be invisible to Python's memory accounting.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from lance_ref import counting
from lance_ref.tensor import Shape

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]

SERIAL_ELEMENTS = 1 << 15
"""Below this much work the loops run in the calling thread."""


@cache
def numba_enabled() -> bool:
    """Whether compiled kernels are used (``LANCE_REF_NUMBA``, default on where Numba is installed)."""
    setting = os.environ.get("LANCE_REF_NUMBA", "1")
    if setting not in ("0", "1"):
        raise ValueError(f"LANCE_REF_NUMBA is {setting!r}, expected 0 or 1")
    return setting == "1" and importlib.util.find_spec("numba") is not None


@cache
def _threads() -> int:
    setting = os.environ.get("LANCE_REF_THREADS", "")
    if setting and (not setting.isdigit() or int(setting) < 1):
        raise ValueError(f"LANCE_REF_THREADS is {setting!r}, expected a positive integer")
    return int(setting) if setting else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


@cache
def _pool() -> Any:
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(_threads(), thread_name_prefix="lance_ref")


class Loops:
    """Plain Python loops ``f(start, stop, ...)``, compiled by Numba when first called."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self.compiled: Callable[..., None] | None = None

    def run(self, planes: int, work: int, *arguments: Any) -> None:
        """Run over ``planes`` independent planes; ``work`` (elements touched) decides about threads."""
        if self.compiled is None:
            import numba

            # sums may be reordered (SIMD), but NaN and infinity keep their meaning
            self.compiled = numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})(self.function)
        compiled = self.compiled
        parts = min(_threads(), planes) if work > SERIAL_ELEMENTS else 1
        if parts == 1:
            compiled(0, planes, *arguments)
            return
        bounds = [planes * i // parts for i in range(parts + 1)]
        futures = [_pool().submit(compiled, bounds[i], bounds[i + 1], *arguments) for i in range(1, parts)]
        compiled(bounds[0], bounds[1], *arguments)
        for future in futures:
            future.result()


# ---- depthwise convolution ---------------------------------------------------------------


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
    _depthwise_forward.run(B * C_out, out.size * k_h * k_w, *arguments, out, *_flat(stride, padding, dilation))
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
    planes = input_shape[0] * input_shape[1]
    _depthwise_input_gradient.run(planes, work, *arguments, grad, *_flat(stride, padding, dilation))
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
    _depthwise_weight_gradient.run(x.shape[1], work, *arguments, grad, *_flat(stride, padding, dilation))
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
        padded[top : top + H, left : left + W] = x[b, o // (C_out // C_in)]
        for h in range(H_out):
            row = out[b, o, h]
            row[:] = 0
            for p in range(k_h):
                source = padded[h * s_h + p * d_h]
                for q in range(k_w):
                    value = weight[o, 0, p, q]
                    if s_w == 1:
                        for w in range(W_out):
                            row[w] += value * source[q * d_w + w]
                    else:
                        for w in range(W_out):
                            row[w] += value * source[q * d_w + w * s_w]


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
                        value = weight[o, 0, p, q]
                        if s_w == 1:
                            for w in range(W_out):
                                row[q * d_w + w] += value * source[w]
                        else:
                            for w in range(W_out):
                                row[q * d_w + w * s_w] += value * source[w]
        grad[b, c] = padded[top : top + H, left : left + W]


@Loops
def _depthwise_weight_gradient(start, stop, x, grad_output, grad, s_h, s_w, top, bottom, left, right, d_h, d_w):  # type: ignore[no-untyped-def]
    B, C_in, H, W = x.shape
    _, C_out, H_out, W_out = grad_output.shape
    k_h, k_w = grad.shape[2], grad.shape[3]
    multiplier = C_out // C_in
    padded = np.zeros((H + top + bottom, W + left + right), x.dtype)
    for c in range(start, stop):
        for b in range(B):
            padded[top : top + H, left : left + W] = x[b, c]
            for o in range(c * multiplier, (c + 1) * multiplier):
                for p in range(k_h):
                    for q in range(k_w):
                        total = grad[o, 0, p, q]
                        for h in range(H_out):
                            source = padded[h * s_h + p * d_h]
                            row = grad_output[b, o, h]
                            if s_w == 1:
                                for w in range(W_out):
                                    total += row[w] * source[q * d_w + w]
                            else:
                                for w in range(W_out):
                                    total += row[w] * source[q * d_w + w * s_w]
                        grad[o, 0, p, q] = total


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


# ---- projection of height and width ----------------------------------------------------


def project_planes(planes: np.ndarray, U_height: np.ndarray, U_width: np.ndarray, width_first: bool) -> np.ndarray:
    """U_heightᵀ · plane · U_width for every plane, the planes being read once.

    Parameters
    ----------
    planes : (N, H, W)
    U_height, U_width : (H, r_h), (W, r_w)
    width_first : bool
        Order of the two products: H·W·r_w + H·r_h·r_w multiply-adds a plane if True,
        H·W·r_h + W·r_h·r_w otherwise.

    Returns
    -------
    (N, r_h, r_w)
    """
    N, H, W = planes.shape
    r_h, r_w = U_height.shape[1], U_width.shape[1]
    counting.add(N * (H * W * r_w + H * r_h * r_w if width_first else H * W * r_h + W * r_h * r_w))
    arguments = (np.ascontiguousarray(planes), np.ascontiguousarray(U_height.T), np.ascontiguousarray(U_width.T))
    if not numba_enabled():
        return project_planes_numpy(planes, U_height, U_width, width_first)
    out = np.empty((N, r_h, r_w), planes.dtype)
    loops = _project_width_first if width_first else _project_height_first
    loops.run(N, planes.size * max(r_h, r_w), *arguments, out)
    return out


@Loops
def _project_width_first(start, stop, planes, height_rows, width_rows, out):  # type: ignore[no-untyped-def]
    _, H, W = planes.shape
    r_h, r_w = height_rows.shape[0], width_rows.shape[0]
    for n in range(start, stop):
        result = out[n]
        result[:] = 0
        for h in range(H):
            row = planes[n, h]
            for j in range(r_w):
                total = width_rows[j, 0] * row[0]
                for w in range(1, W):
                    total += width_rows[j, w] * row[w]
                for i in range(r_h):
                    result[i, j] += height_rows[i, h] * total


@Loops
def _project_height_first(start, stop, planes, height_rows, width_rows, out):  # type: ignore[no-untyped-def]
    _, H, W = planes.shape
    r_h, r_w = height_rows.shape[0], width_rows.shape[0]
    line = np.empty(W, planes.dtype)
    for n in range(start, stop):
        for i in range(r_h):
            line[:] = 0
            for h in range(H):
                value = height_rows[i, h]
                row = planes[n, h]
                for w in range(W):
                    line[w] += value * row[w]
            for j in range(r_w):
                total = width_rows[j, 0] * line[0]
                for w in range(1, W):
                    total += width_rows[j, w] * line[w]
                out[n, i, j] = total


def project_planes_numpy(
    planes: np.ndarray, U_height: np.ndarray, U_width: np.ndarray, width_first: bool
) -> np.ndarray:
    """NumPy twin of :func:`project_planes`."""
    if width_first:
        return U_height.T @ (planes @ U_width)
    return (U_height.T @ planes) @ U_width
