"""Threads that share out work: how many there are, one pool for all, and a BLAS that starts none of its own meanwhile.

OpenBLAS has threads of its own, and a thread of it that has nothing to do spins for some hundredths of a second on the
processor that the next loop wants. Where the number of its threads can be set, large products are therefore cut up
here, and each part is a product in one thread (:func:`product_threads`, :func:`blas_alone`).
"""

from __future__ import annotations

import contextvars
import ctypes
import importlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple, TypeVar

Item = TypeVar("Item")

PREFIXES, SUFFIXES = ("scipy_openblas", "openblas"), ("64_", "")
"""What the functions of an OpenBLAS may be called: ``scipy_openblas_set_num_threads64_`` and the like."""


@cache
def threads() -> int:
    """How many threads share out work: ``LANCE_REF_THREADS``, by default the processors of this process."""
    setting = os.environ.get("LANCE_REF_THREADS", "")
    if setting and (not setting.isdigit() or int(setting) < 1):
        raise ValueError(f"LANCE_REF_THREADS is {setting!r}, expected a positive integer")
    return int(setting) if setting else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


@cache
def pool() -> Any:
    """The pool of all that is shared out; its threads are started when they are first needed."""
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(threads(), thread_name_prefix="lance_ref")


if hasattr(os, "register_at_fork"):  # a forked child has none of its parent's threads, and would wait for them for ever
    os.register_at_fork(after_in_child=pool.cache_clear)


class _Mine(threading.local):
    shares: bool = False  # whether this thread runs a part of something already


_mine = _Mine()


def share_out(parts: int, count: int, work: Callable[[int, int], None]) -> None:
    """Run ``work(start, stop)`` over ``count`` things, cut into so many parts that run at the same time.

    Parameters
    ----------
    parts : int
        At most; never more than there are things. What a part shares out itself runs in one part.
    count : int
    work : callable
        Independent of the order of the parts. What it raises is raised here, when all parts are through.
    """
    parts = min(parts, count)
    if parts <= 1 or _mine.shares:
        work(0, count)
        return
    bounds = [count * i // parts for i in range(parts + 1)]
    here = contextvars.copy_context  # np.errstate is in it, and holds in the other threads too
    futures = [pool().submit(here().run, _part, [work], bounds[i], bounds[i + 1]) for i in range(1, parts)]
    try:
        _part([work], bounds[0], bounds[1])
    finally:
        for future in futures:
            future.exception()  # waits
    for future in futures:
        future.result()


def taken_from(left: deque[Item]) -> Iterator[Item]:
    """What is left, one by one: several threads may take from one deque, and one that begins late takes less."""
    while True:
        try:
            yield left.popleft()
        except IndexError:
            return


def _part(taken: list[Callable[[int, int], None]], start: int, stop: int) -> None:
    """Run one part, and let go of the work, with the arrays that it knows, before the part counts as done.

    A thread of the pool keeps its arguments until the system runs it again after that. Arrays among them would be alive
    for longer than they are needed, and would look as if somebody else used them.
    """
    _mine.shares = True
    try:
        taken.pop()(start, stop)
    finally:
        _mine.shares = False


# ---- the threads of BLAS -------------------------------------------------------------------


class _Blas(NamedTuple):
    """Functions that read and set the number of its threads."""

    read: Callable[[], int]
    write: Callable[[int], None]


@cache
def linked_blas() -> ctypes.CDLL | None:
    """The symbols of the BLAS that NumPy is linked to; None where there are none to look at, as in the browser."""
    if sys.platform == "emscripten":
        return None
    try:
        products = importlib.import_module("numpy._core._multiarray_umath")
        return ctypes.CDLL(products.__file__)  # its symbols, and those of what it is linked to
    except (ImportError, OSError):
        return None


@cache
def _blas() -> _Blas | None:
    """Those of OpenBLAS; None where there is another BLAS."""
    linked = linked_blas()
    for prefix in PREFIXES:
        for suffix in SUFFIXES:
            read = getattr(linked, f"{prefix}_get_num_threads{suffix}", None)
            write = getattr(linked, f"{prefix}_set_num_threads{suffix}", None)
            if read is not None and write is not None:
                return _Blas(read, write)
    return None


def controllable() -> bool:
    """Whether the number of BLAS's threads can be set here."""
    return _blas() is not None


def product_threads() -> int:
    """How many threads share out a product: :func:`threads`, but no more than BLAS itself would take.

    1 where the number of BLAS's threads cannot be set: then a product is left to BLAS as a whole.
    """
    return 1 if _mine.shares else min(threads(), blas_alone.threads())


class _BlasAlone:
    """See :data:`blas_alone`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = 1

    def __enter__(self) -> None:
        blas = _blas()
        with self._lock:  # of several threads that are inside, the first sets and the last sets back
            self._inside += 1
            if self._inside == 1 and blas is not None:
                self._before = blas.read()
                blas.write(1)

    def __exit__(self, *exception: object) -> None:
        blas = _blas()
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and blas is not None:
                blas.write(self._before)

    def threads(self) -> int:
        """How many threads BLAS takes outside of every ``with`` block; 1 if that cannot be set."""
        blas = _blas()
        with self._lock:
            return 1 if blas is None else self._before if self._inside else blas.read()

    def reset(self) -> None:
        """In a forked child, in which no other thread is left that would set the number back."""
        inside, before = self._inside, self._before
        self.__init__()  # type: ignore[misc]
        blas = _blas() if inside else None
        if blas is not None:
            blas.write(before)


blas_alone = _BlasAlone()
"""Inside ``with blas_alone:`` every product runs in the thread that asks for it; afterwards as before."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=blas_alone.reset)
