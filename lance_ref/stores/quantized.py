"""Activations as 8-bit or 4-bit codes: affine quantisation, channel by channel."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lance_ref.algebra.frame import feature_mode
from lance_ref.algebra.geometry import WORKSPACE_BYTES, Geometry
from lance_ref.algebra.magnitude import NotFiniteError
from lance_ref.engine.tensor import Shape
from lance_ref.stores.base import ActivationStore

BITS = (8, 4)


class Quantized(ActivationStore):
    """Keep the activation as unsigned codes of 8 or 4 bits, with one range for each channel.

    Forward keeps codes q = round((A − lo) / (hi − lo) · (2ᵇ − 1)), rounded to the nearest, and the least and the
    greatest value of each channel (feature of a linear layer), lo and hi; a float scale and minimum are the same two
    numbers, but their product may overflow. Backward takes the exact weight gradient of

        Â = (1 − t)·lo + t·hi,   t = q / (2ᵇ − 1),

    a few images at a time, within :data:`~lance_ref.algebra.geometry.WORKSPACE_BYTES` (two images at the least).
    The error ``|Â − A|`` is at most half a step, (hi − lo) / (2ᵇ − 1) / 2, up to rounding; lo, hi and constant channels
    come back as they were.

    Parameters
    ----------
    bits : {8, 4}
        4 bits: two codes a byte.

    Raises
    ------
    ValueError
        When an activation contains NaN or infinity.
    """

    name = "quantized"

    def __init__(self, bits: int = 8) -> None:
        self.bits = checked_bits("bits", bits)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "bits": self.bits}

    def check(self, input_shape: Shape) -> None:
        if len(input_shape) < 2:
            raise ValueError(f"activation has shape {input_shape}, expected a batch (B, I), (B, L, I) or (B, C, H, W)")

    def save(self, activation: np.ndarray) -> dict[str, np.ndarray]:
        self.check(activation.shape)
        return quantise(activation, feature_mode(activation.shape), self.bits)

    def weight_gradient(
        self, saved: Mapping[str, np.ndarray], grad_output: np.ndarray, geometry: Geometry
    ) -> np.ndarray:
        shape = geometry.input_shape
        mode = feature_mode(shape)
        grad = np.zeros(geometry.weight_shape, grad_output.dtype)
        for rows in row_blocks(shape, grad_output.itemsize, self.bits):
            images = dequantise(saved, shape, mode, self.bits, rows)
            block = dataclasses.replace(geometry, input_shape=images.shape)
            grad += block.weight_gradient(images, grad_output[rows])
        return grad


def quantise(array: np.ndarray, mode: int | None, bits: int) -> dict[str, np.ndarray]:
    """Codes of an array, and the ranges that they divide.

    Parameters
    ----------
    array : float32 or float64 array
        Finite, of at least two dimensions.
    mode : int or None
        One range for each index of this mode, not 0; None: one range for all.
    bits : {8, 4}

    Returns
    -------
    dict
        ``codes``, uint8 of the array's shape, or for 4 bits (⌈size/2⌉,) in C order, the first of two in the low
        half; ``minimum`` and ``maximum``, (n,) or (1,), in the array's dtype.

    Raises
    ------
    ValueError
        If the array contains NaN or infinity; names the first index of the mode where it does.
    """
    low, high = _ranges(array, mode)
    # hi − lo may overflow where hi/2 − lo/2 does not
    half, levels = array.dtype.type(0.5), 2**bits - 1
    half_low = half * low
    half_span = half * high - half_low
    half_span[half_span == 0] = 1
    codes = np.empty(array.shape if bits == 8 else -(-array.size // 2), np.uint8)
    for rows in row_blocks(array.shape, array.itemsize, bits):
        position = half * array[rows]
        position -= half_low
        position /= half_span
        position *= levels
        np.rint(position, out=position)
        if bits == 8:
            codes[rows] = position
        else:
            codes[_packed(rows, array.shape)] = _pack(position.astype(np.uint8))
    return {"codes": codes, "minimum": low.reshape(-1).copy(), "maximum": high.reshape(-1).copy()}


def dequantise(
    saved: Mapping[str, np.ndarray], shape: Shape, mode: int | None, bits: int, rows: slice | None = None
) -> np.ndarray:
    """The array that :func:`quantise` made codes of, or some of its rows: (1 − t)·lo + t·hi.

    Parameters
    ----------
    saved : mapping
        What :func:`quantise` returned.
    shape : tuple of int
        Of the whole array.
    mode, bits
        As they were then.
    rows : slice, optional
        Indices of mode 0: one of :func:`row_blocks`.
    """
    rows = slice(0, shape[0]) if rows is None else rows
    wanted = (rows.stop - rows.start, *shape[1:])
    codes = saved["codes"]
    codes = codes[rows] if bits == 8 else _unpack(codes[_packed(rows, shape)], math.prod(wanted)).reshape(wanted)
    along = [1 if axis != mode else -1 for axis in range(len(shape))]
    low, high = saved["minimum"].reshape(along), saved["maximum"].reshape(along)
    t = codes.astype(low.dtype)
    t /= 2**bits - 1
    result = t * high
    np.subtract(1, t, out=t)
    t *= low
    result += t
    return result


def row_blocks(shape: Shape, itemsize: int, bits: int = 8) -> Iterator[slice]:
    """Slices of mode 0 whose floats fit the workspace; of 4-bit codes each begins with a whole byte."""
    whole = 8 // bits
    rows = WORKSPACE_BYTES // (math.prod(shape[1:]) * itemsize) // whole * whole
    step = max(rows, whole)
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def checked_bits(name: str, bits: int) -> int:
    """``bits`` as an int, else a ValueError."""
    if isinstance(bits, bool) or bits not in BITS:
        raise ValueError(f"{name} is {bits!r}, expected one of {BITS}")
    return int(bits)


def _ranges(array: np.ndarray, mode: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest value for each index of ``mode``, with axes of length 1 for the other modes."""
    others = tuple(axis for axis in range(array.ndim) if axis != mode)
    low, high = array.min(axis=others, keepdims=True), array.max(axis=others, keepdims=True)
    finite = (np.isfinite(low) & np.isfinite(high)).reshape(-1)
    if not finite.all():
        where = "" if mode is None else f" at index {int(np.argmin(finite))} of mode {mode}"
        raise NotFiniteError(
            f"activation of shape {array.shape} contains NaN or infinity{where}, expected finite numbers to quantise"
        )
    return low, high


def _packed(rows: slice, shape: Shape) -> slice:
    """The bytes of the 4-bit codes of these rows; ``rows`` starts at an even number of elements."""
    row = math.prod(shape[1:])
    return slice(rows.start * row // 2, -(-rows.stop * row // 2))


def _pack(codes: np.ndarray) -> np.ndarray:
    """Two 4-bit codes a byte, (⌈size/2⌉,).

    >>> _pack(np.array([1, 2, 3], np.uint8))
    array([33,  3], dtype=uint8)
    """
    codes = codes.reshape(-1)
    packed: np.ndarray = codes[0::2].copy()
    packed[: codes.size // 2] |= codes[1::2] << 4
    return packed


def _unpack(packed: np.ndarray, size: int) -> np.ndarray:
    """The opposite of :func:`_pack`, (size,)."""
    codes = np.empty((packed.size, 2), np.uint8)
    codes[:, 0], codes[:, 1] = packed & 15, packed >> 4
    return codes.reshape(-1)[:size]
