"""Batch norm by the statistics of the batch: compiled loops beside their NumPy twins.

A channel's numbers are read from memory once a pass: the loops go over one channel after the other, and what they read
for its mean is still in the cache when its variance and its results are computed. See
:mod:`lance_ref.algebra.kernels.threads` for the rules of the house.
"""

from __future__ import annotations

import math

import numpy as np

from lance_ref.algebra.kernels.elementwise import SHORT_PLANE
from lance_ref.algebra.kernels.threads import Loops, numba_enabled
from lance_ref.engine.arguments import unbroadcast_product
from lance_ref.engine.blocks import pieces


def normalise(
    x: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x̂·weight + bias, and the batch's statistics.

    Parameters
    ----------
    x : (B, C, ...)
    weight, bias : (C,) or None
        Of the dtype of ``x``; 1 and 0 where they are None.
    eps : float
        Added to the variance.

    Returns
    -------
    out : like x
    mean, var, inv_std : (C,)
        The variance is the biased one; inv_std = 1/√(var + eps).
    """
    if not in_loops(x):
        return normalise_numpy(x, weight, bias, eps)
    B, C = x.shape[:2]
    out, statistics = np.empty(x.shape, x.dtype), [np.empty(C, x.dtype) for _ in range(3)]
    weight = np.ones(C, x.dtype) if weight is None else np.ascontiguousarray(weight)
    bias = np.zeros(C, x.dtype) if bias is None else np.ascontiguousarray(bias)
    planes = x.reshape(B, C, -1), out.reshape(B, C, -1)
    _normalise.run(C, 3 * x.size, *planes, weight, bias, x.dtype.type(eps), *statistics)
    mean, var, inv_std = statistics
    return out, mean, var, inv_std


def normalise_numpy(
    x: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """NumPy twin of :func:`normalise`."""
    axes = (0, *range(2, x.ndim))
    mean = x.mean(axis=axes)  # (C,)
    out = x - _channels(mean, x)
    var = np.empty_like(mean)
    for part in pieces(x.shape, axes):
        np.square(out[part]).mean(axis=axes, out=var[part[1:]])
    inv_std = 1 / np.sqrt(var + x.dtype.type(eps))
    out *= _channels(inv_std if weight is None else weight * inv_std, x)
    if bias is not None:
        out += _channels(bias, x)
    return out, mean, var, inv_std


@Loops
def _normalise(start, stop, x, out, weight, bias, eps, means, variances, inv_stds):  # type: ignore[no-untyped-def]
    B, _, L = x.shape
    zero, one = x.dtype.type(0), x.dtype.type(1)
    for c in range(start, stop):
        total = 0.0  # of the planes' sums, in double precision
        for b in range(B):
            of_plane = zero
            for i in range(L):
                of_plane += x[b, c, i]
            total += of_plane
        mean = zero + x.dtype.type(total / (B * L))
        total = 0.0
        for b in range(B):
            of_plane = zero
            for i in range(L):
                of_plane += (x[b, c, i] - mean) * (x[b, c, i] - mean)
            total += of_plane
        var = zero + x.dtype.type(total / (B * L))
        inv_std = one / np.sqrt(var + eps)
        factor, summand = weight[c] * inv_std, bias[c]
        for b in range(B):
            for i in range(L):
                out[b, c, i] = (x[b, c, i] - mean) * factor + summand
        means[c], variances[c], inv_stds[c] = mean, var, inv_std


def normalise_backward(
    grad_output: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    inv_std: np.ndarray,
    weight: np.ndarray | None,
    needs_x: bool,
    over: np.ndarray | None = None,
) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """dx = weight·inv_std·(g − Σg/n − x̂·Σ(g·x̂)/n), Σ(g·x̂) and Σg, the sums over the n numbers of a channel.

    Parameters
    ----------
    grad_output, x : (B, C, ...)
    mean, inv_std : (C,)
        The batch's own.
    weight : (C,) or None
        1 where it is None.
    needs_x : bool
        Whether dx is made; None otherwise.
    over : array, optional
        ``grad_output``, if it may be written over, as the compiled loops do.

    Returns
    -------
    grad_x : like x, or None
    grad_weight, grad_bias : (C,)
    """
    if not (in_loops(x) and grad_output.flags.c_contiguous):
        return normalise_backward_numpy(grad_output, x, mean, inv_std, weight, needs_x)
    B, C = x.shape[:2]
    grad_weight, grad_bias = np.empty(C, x.dtype), np.empty(C, x.dtype)
    scale = inv_std if weight is None else weight * inv_std
    g = grad_output.copy() if needs_x and over is None else grad_output  # dx takes its place
    planes = g.reshape(B, C, -1), x.reshape(B, C, -1)
    _normalise_backward.run(C, 4 * x.size, *planes, mean, inv_std, scale, grad_weight, grad_bias, needs_x)
    return g if needs_x else None, grad_weight, grad_bias


def normalise_backward_numpy(
    grad_output: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    inv_std: np.ndarray,
    weight: np.ndarray | None,
    needs_x: bool,
) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """NumPy twin of :func:`normalise_backward`."""
    g, n = grad_output, grad_output.size // grad_output.shape[1]
    sum_g = g.sum(axis=(0, *range(2, g.ndim)))  # (C,)
    x_hat = x - _channels(mean, g)
    x_hat *= _channels(inv_std, g)
    grad_weight = unbroadcast_product(g, x_hat, (g.shape[1], *[1] * (g.ndim - 2))).reshape(-1)  # (C,)
    if not needs_x:
        return None, grad_weight, sum_g
    x_hat *= _channels(-grad_weight / n, g)
    x_hat += g
    x_hat -= _channels(sum_g / n, g)
    x_hat *= _channels(inv_std if weight is None else weight * inv_std, g)
    return x_hat, grad_weight, sum_g


@Loops
def _normalise_backward(start, stop, g, x, mean, inv_std, scale, grad_weight, grad_bias, needs_x):  # type: ignore[no-untyped-def]
    B, _, L = x.shape
    n, zero = B * L, x.dtype.type(0)
    for c in range(start, stop):
        centre = mean[c]
        total, product = 0.0, 0.0  # of the planes' sums, in double precision
        for b in range(B):
            of_plane, with_x = zero, zero
            for i in range(L):
                of_plane += g[b, c, i]
                with_x += g[b, c, i] * (x[b, c, i] - centre)
            total += of_plane
            product += with_x
        product *= inv_std[c]  # Σ(g·x̂)
        grad_weight[c], grad_bias[c] = product, total
        if not needs_x:
            continue
        factor = scale[c]
        of_x = x.dtype.type(-factor * inv_std[c] * product / n)
        summand = x.dtype.type(-factor * total / n)
        for b in range(B):
            for i in range(L):
                g[b, c, i] = g[b, c, i] * factor + (x[b, c, i] - centre) * of_x + summand


def in_loops(x: np.ndarray) -> bool:
    """Whether the compiled loops take it: packed, of planes that are long enough."""
    return numba_enabled() and x.size > 0 and x.flags.c_contiguous and math.prod(x.shape[2:]) >= SHORT_PLANE


def _channels(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """(C,) as (C, 1, ...), so that it broadcasts against (B, C, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 2))
