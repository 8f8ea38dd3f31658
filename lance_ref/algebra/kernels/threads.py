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
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

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
    """How many threads share out the loops: ``LANCE_REF_THREADS``, by default the processors of this process."""
    setting = os.environ.get("LANCE_REF_THREADS", "")
    if setting and (not setting.isdigit() or int(setting) < 1):
        raise ValueError(f"LANCE_REF_THREADS is {setting!r}, expected a positive integer")
    return int(setting) if setting else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def thread_count() -> int:
    """How many threads share out the loops."""
    return _threads()


def share_out(works: Sequence[Callable[[], None]]) -> None:
    """Run all of these at the same time, the first in the calling thread; raises what the first one to fail raised.

    There are at most :func:`thread_count` of them, and none of them shares out work of its own.
    """
    futures = [_pool().submit(work) for work in works[1:]]
    try:
        works[0]()
    finally:
        for future in futures:
            future.exception()  # all are through, whatever came of them
    for future in futures:
        future.result()


@cache
def _pool() -> Any:
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(_threads(), thread_name_prefix="lance_ref")


if hasattr(os, "register_at_fork"):  # a forked child has none of its parent's threads, and would wait for them for ever
    os.register_at_fork(after_in_child=_pool.cache_clear)


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
        """Run over all planes in the calling thread, which is one of several that have shared out the work already."""
        if self.compiled is None:
            self.compiled = self.compile()
        self.call(0, planes, *arguments)

    def run(self, planes: int, work: int, *arguments: Any) -> None:
        """Run over ``planes`` independent planes; ``work`` (elements touched) decides about threads."""
        if self.compiled is None:
            self.compiled = self.compile()
        parts = min(_threads(), planes) if work > SERIAL_ELEMENTS else 1
        if parts == 1:
            self.call(0, planes, *arguments)
            return
        bounds = [planes * i // parts for i in range(parts + 1)]
        futures = [_pool().submit(self.call, bounds[i], bounds[i + 1], *arguments) for i in range(1, parts)]
        self.call(bounds[0], bounds[1], *arguments)
        for future in futures:
            future.result()


# ---- the projected output gradient -----------------------------------------------------


def offsets_first(Z: np.ndarray) -> np.ndarray:
    """The projected output gradient with the offsets of the kernel before what is summed over.

    A copy of ``Z.transpose(1, 2, 4, 0, 3, 5)``, which NumPy makes in inner loops of a few numbers; here output channels
    are shared out, whose part of Z stays in the cache. With nothing to sum over but the first mode it is a view.

    Parameters
    ----------
    Z : (r1, o, k_h, r3, k_w, r4)

    Returns
    -------
    (o, k_h, k_w, r1, r3, r4)
    """
    r1, o, k_h, r3, k_w, r4 = Z.shape
    if r3 * r4 == 1 or not numba_enabled():
        return offsets_first_numpy(Z)
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
    return Z.transpose(1, 2, 4, 0, 3, 5)
