"""Images in another size: nearest neighbours, and linear interpolation along each axis."""
# mypy: disable-error-code="override"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lance_ref.engine.arguments import Context, Gradients, positive, require_floating
from lance_ref.engine.autograd import Function
from lance_ref.engine.tensor import Shape, Tensor, as_tensor

MODES = {"nearest": (3, 4, 5), "linear": (3,), "bilinear": (4,), "trilinear": (5,)}
"""Each mode and the numbers of dimensions that an input may have."""

Taps = list[tuple[np.ndarray, np.ndarray]]


class Interpolate(Function):
    """Every place of the result is a sum of places of x, with weights along each axis on its own."""

    op = "interpolate"

    @staticmethod
    def output_shape(x: Tensor, size: Shape, mode: str, align_corners: bool, steps: tuple[float, ...]) -> Shape:
        return (*x.shape[:2], *size)

    @staticmethod
    def forward(
        ctx: Context, x: np.ndarray, size: Shape, mode: str, align_corners: bool, steps: tuple[float, ...]
    ) -> np.ndarray:
        ctx.nearest = mode == "nearest"
        ctx.taps = [
            taps(n, m, mode != "nearest", align_corners, step)
            for n, m, step in zip(x.shape[2:], size, steps, strict=True)
        ]
        out = x
        for axis, found in enumerate(ctx.taps, start=2):
            out = _weighted(out, axis, found)
        return np.ascontiguousarray(out)

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        grad = grad_output
        for axis in reversed(range(2, grad.ndim)):
            lines = np.moveaxis(grad, axis, 0)
            back = np.zeros((ctx.input_shapes[0][axis], *lines.shape[1:]), grad.dtype)
            for places, weights in ctx.taps[axis - 2]:
                first = np.flatnonzero(np.diff(places, prepend=-1))  # where a run of results of one place begins
                weighted = lines if ctx.nearest else lines * _along(weights, 0, lines)
                back[places[first]] += np.add.reduceat(weighted, first, axis=0)
                del weighted
            grad = np.moveaxis(back, 0, axis)
        return (np.ascontiguousarray(grad),)


def taps(n: int, m: int, linear: bool, align_corners: bool, step: float) -> Taps:
    """Of an axis of n places that becomes m: for each neighbour, its place and its weight at every result.

    ``step`` is how far apart results lie on the old axis.
    """
    at = np.arange(m)
    if not linear:
        return [(np.minimum(np.floor(at * step).astype(np.intp), n - 1), np.ones(m))]
    corners = (n - 1) / (m - 1) if m > 1 else 0.0
    where = at * corners if align_corners else np.maximum((at + 0.5) * step - 0.5, 0)
    low = np.minimum(np.floor(where).astype(np.intp), n - 1)
    share = np.clip(where - low, 0, 1)
    return [(low, 1 - share), (np.minimum(low + 1, n - 1), share)]


def _along(weights: np.ndarray, axis: int, like: np.ndarray) -> np.ndarray:
    return weights.astype(like.dtype).reshape([-1 if i == axis else 1 for i in range(like.ndim)])


def _weighted(x: np.ndarray, axis: int, found: Taps) -> np.ndarray:
    if len(found) == 1:
        return np.take(x, found[0][0], axis=axis)
    (low, of_low), (high, of_high) = found
    out = np.take(x, low, axis=axis)
    out *= _along(of_low, axis, out)
    upper = np.take(x, high, axis=axis)
    upper *= _along(of_high, axis, out)
    out += upper
    return out


def interpolate(
    x: Any,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool = False,
) -> Tensor:
    """Resize sequences, images or volumes (B, C, ...), with PyTorch's coordinates. Keeps nothing.

    Parameters
    ----------
    size : int or sequence of int, optional
        Of the dimensions behind the channels; this or ``scale_factor``.
    scale_factor : float or sequence of float, optional
        The size is rounded down.
    mode : {"nearest", "linear", "bilinear", "trilinear"}
        Linear interpolation is called by the number of its axes.
    align_corners : bool
        Whether the outermost places keep their values; not for "nearest".

    Raises
    ------
    ValueError, TypeError
        For another mode, sizes that do not fit, or both or neither of size and scale.
    """
    x = as_tensor(x)
    require_floating("interpolate", x=x)
    if mode not in MODES or x.ndim not in MODES[mode]:
        allowed = ", ".join(f"{name} of {' or '.join(map(str, dims))} dimensions" for name, dims in MODES.items())
        raise ValueError(f"interpolate: mode is {mode!r} and x has shape {x.shape}, expected {allowed}")
    if align_corners and mode == "nearest":
        raise ValueError("interpolate: align_corners is True, expected a linear mode for that")
    if (size is None) == (scale_factor is None):
        raise ValueError(f"interpolate: size is {size!r} and scale_factor {scale_factor!r}, expected one of them")
    old = x.shape[2:]
    if size is not None:
        wanted = (size,) * len(old) if isinstance(size, (int, np.integer)) else tuple(size)
        steps = tuple(n / m for n, m in zip(old, wanted, strict=False) if m)
    else:
        several = isinstance(scale_factor, (tuple, list))
        given: tuple[Any, ...] = tuple(scale_factor) if several else (scale_factor,) * len(old)  # type: ignore[arg-type]
        factors = tuple(positive("interpolate", "scale_factor", factor) for factor in given)
        wanted = tuple(math.floor(n * factor) for n, factor in zip(old, factors, strict=False))
        steps = tuple(1 / factor for factor in factors)
    if len(wanted) != len(old) or any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) for n in wanted):
        raise ValueError(f"interpolate: the size is {wanted}, expected {len(old)} integers for x of shape {x.shape}")
    if min(wanted) < 1 or 0 in old:
        raise ValueError(f"interpolate: x has shape {x.shape} and the size is {wanted}, expected sizes of at least 1")
    whole = tuple(int(n) for n in wanted)
    return Interpolate.apply(x, size=whole, mode=mode, align_corners=bool(align_corners), steps=steps)
