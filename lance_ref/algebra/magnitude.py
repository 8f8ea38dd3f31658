"""Small and large numbers: dividing by a power of two before anything is squared.

Squares leave the range of a dtype long before the numbers themselves do: in float32 from 1e-19 on downwards, where
sums of them lose what decides about ranks and directions. A division by a power of two is exact.
"""

from __future__ import annotations

import math

import numpy as np


class NotFiniteError(ValueError, FloatingPointError):
    """An array holds NaN or infinity: a wrong argument, and in training the sign of a run that has diverged."""


def exponent(array: np.ndarray, subject: str = "an array") -> int:
    """The integer ``e`` with ``2^(e−1) ≤ max |a| < 2^e``, and 0 for zeros and for an empty array. Makes no copy.

    Parameters
    ----------
    array : floating-point array
    subject : str
        What an error calls it.

    Raises
    ------
    NotFiniteError
        If the array contains NaN or infinity.

    Examples
    --------
    >>> exponent(np.array([0.25, -3.0])), exponent(np.array([2.0**-1000]))
    (2, -999)
    """
    largest = max(float(array.max(initial=0)), -float(array.min(initial=0)))  # NaN if there is one
    if not math.isfinite(largest):
        raise NotFiniteError(f"{subject} of shape {array.shape} contains NaN or infinity, expected finite numbers")
    return math.frexp(largest)[1]


def near_one(array: np.ndarray, subject: str = "an array") -> tuple[np.ndarray, int]:
    """An array whose squares, and sums of them, stay in range, and the k with ``array`` = result · 2^k.

    Parameters
    ----------
    array : float32 or float64 array
    subject : str
        What an error calls it.

    Returns
    -------
    array, k
        ``array`` itself and 0 where its largest entry lies within 2^±32 (float32) or 2^±256 (float64), a quarter of
        the exponents that there are; else a copy whose largest entry is in [1/2, 1).

    Raises
    ------
    NotFiniteError
        If the array contains NaN or infinity.
    """
    k = exponent(array, subject)
    if abs(k) <= np.finfo(array.dtype).maxexp // 4:
        return array, 0
    return scaled(array, -k), k


def common_unit(unit: int | None, array: np.ndarray, subject: str = "an array") -> int | None:
    """The power of two that sums of squares over several arrays are kept in units of, with one more array.

    Parameters
    ----------
    unit : int or None
        So far: squares were taken of arrays · 2^−unit; None before the first array that is not zero.
    array : float32 or float64 array
        The next one.
    subject : str
        What an error calls it.

    Returns
    -------
    int or None
        0 as long as the squares are far from the ends of the range of float64, which those of float32 always are.
        Larger than before where ``array`` needs it; what was summed up is then to be divided by 4^(new − old).

    Raises
    ------
    NotFiniteError
        If the array contains NaN or infinity.
    """
    k = exponent(array, subject)
    if not array.any():
        return unit
    reach = np.finfo(np.float64).maxexp // 4
    if unit is None:
        return 0 if abs(k) <= reach else k
    return k if k - unit > reach else unit


def scaled(array: np.ndarray, k: int) -> np.ndarray:
    """``array`` · 2^k in its own dtype, exactly but for what leaves the range; ``array`` itself for k = 0."""
    if not k:
        return array
    with np.errstate(over="ignore", under="ignore"):
        result: np.ndarray = np.ldexp(array, k)
    return result


def norm(array: np.ndarray) -> float:
    """‖A‖_F in float64, also where the squares of the entries are out of range; NaN or infinity if an entry is.

    >>> norm(np.array([3e-200, 4e-200]))
    5e-200
    """
    array = np.asarray(array, np.float64)
    if not np.isfinite(array).all():
        return float(np.linalg.norm(array))
    unit, k = near_one(array)
    return float(np.ldexp(np.linalg.norm(unit), k))
