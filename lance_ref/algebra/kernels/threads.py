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
import pickle
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from lance_ref.engine.workers import pool as _pool  # noqa: F401  (by this name it is known to what pins threads)
from lance_ref.engine.workers import share_out
from lance_ref.engine.workers import threads as _threads

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
def _compiler() -> Any:
    """``numba.njit``; from here on a fork waits until no thread compiles, for its child could not get Numba's lock."""
    import numba
    from numba.core.compiler_lock import global_compiler_lock as lock

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return numba.njit


@cache
def _tell_uncached() -> None:
    """One line a process."""
    if sys.stderr is not None:
        print(
            "lance_ref: Numba cannot keep compiled loops in its cache, so this process compiles them anew; "
            "set NUMBA_CACHE_DIR to a folder that can be written",
            file=sys.stderr,
            flush=True,
        )


class Loops:
    """Plain Python loops ``f(start, stop, ...)``, compiled by Numba when first called."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self.compiled: Callable[..., None] | None = None

    def compile(self, cached: bool = True) -> Callable[..., None]:
        """The compiled loops; without Numba's cache on the disk if that has no place, or if ``cached`` is False."""
        # sums may be reordered (SIMD), but NaN and infinity keep their meaning
        options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}}
        if cached:
            try:
                return _compiler()(cache=True, **options)(self.function)
            except RuntimeError as error:  # neither beside the source nor in the home can it write
                if "no locator available" not in str(error):
                    raise
        _tell_uncached()
        return _compiler()(**options)(self.function)

    def call(self, *arguments: Any) -> None:
        """Run ``compiled``, which for new types of arguments first reads or writes Numba's cache.

        Where that fails (a full disk, a file that was cut off) nothing has run yet: the loops are compiled without.
        """
        assert self.compiled is not None
        try:
            self.compiled(*arguments)
        except (OSError, EOFError, pickle.UnpicklingError):
            self.compiled = self.compile(cached=False)
            self.compiled(*arguments)

    def alone(self, planes: int, *arguments: Any) -> None:
        """Run over all planes in the calling thread, one of several that share out something larger."""
        if self.compiled is None:
            self.compiled = self.compile()
        self.call(0, planes, *arguments)

    def run(self, planes: int, work: int, *arguments: Any) -> None:
        """Run over ``planes`` independent planes; ``work`` (elements touched) decides about threads."""
        if self.compiled is None:
            self.compiled = self.compile()
        if work <= SERIAL_ELEMENTS:
            self.call(0, planes, *arguments)
            return
        share_out(_threads(), planes, lambda start, stop: self.call(start, stop, *arguments))


# ---- the projected output gradient -----------------------------------------------------


def offsets_first(Z: np.ndarray) -> np.ndarray:
    """The projected output gradient with the offsets of the kernel before what is summed over.

    A copy of ``Z.transpose(1, 2, 4, 0, 3, 5)``, which NumPy makes in inner loops of a few numbers; here output channels
    are shared out, whose part of Z stays in the cache. With nothing to sum over but the first mode it is a view, and
    for volumes as well.

    Parameters
    ----------
    Z : (r1, o, k_h, r3, k_w, r4), or (r1, o, k_d, r3, k_h, r4, k_w, r5)

    Returns
    -------
    (o, k_h, k_w, r1, r3, r4), or (o, k_d, k_h, k_w, r1, r3, r4, r5)
    """
    if Z.ndim != 6 or Z.shape[3] * Z.shape[5] == 1 or not numba_enabled():
        return offsets_first_numpy(Z)
    r1, o, k_h, r3, k_w, r4 = Z.shape
    out = np.empty((o, k_h, k_w, r1, r3, r4), Z.dtype)
    _offsets_first.run(o, Z.size, np.ascontiguousarray(Z), out)
    return out


@Loops
def _offsets_first(start, stop, Z, out):  # type: ignore[no-untyped-def]
    r1, _, k_h, r3, k_w, r4 = Z.shape
    for o in range(start, stop):
        for p in range(k_h):
            for q in range(k_w):
                target = out[o, p, q]
                for a in range(r1):
                    for i in range(r3):
                        for j in range(r4):
                            target[a, i, j] = Z[a, o, p, i, q, j]


def offsets_first_numpy(Z: np.ndarray) -> np.ndarray:
    """NumPy twin of :func:`offsets_first`: a view, copied when it is reshaped."""
    return Z.transpose(1, *range(2, Z.ndim, 2), 0, *range(3, Z.ndim, 2))
