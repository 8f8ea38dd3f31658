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
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from lance_ref import counting

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
