"""How many threads NumPy's products of matrices take: one, while several threads each make products of their own."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np


@cache
def _controls() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """What reads and sets the number in the OpenBLAS that NumPy's wheels bring along; None for any other BLAS."""
    package = Path(np.__file__).parent
    folders = (package.parent / "numpy.libs", package / ".dylibs")
    for path in (path for folder in folders for path in sorted(folder.glob("*openblas*"))):
        try:
            library = ctypes.CDLL(str(path))  # the one that NumPy has loaded
        except OSError:
            continue
        for prefix, suffix in (("scipy_", "64_"), ("scipy_", ""), ("", "64_"), ("", "")):
            read = getattr(library, f"{prefix}openblas_get_num_threads{suffix}", None)
            write = getattr(library, f"{prefix}openblas_set_num_threads{suffix}", None)
            if read is not None and write is not None:
                return read, write
    return None


def controllable() -> bool:
    """Whether the number can be set here; not in the browser, which has one thread."""
    return sys.platform != "emscripten" and _controls() is not None


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside the ``with`` block every product runs in the thread that asks for it; afterwards as before."""
    controls = _controls()
    before = 1 if controls is None else controls[0]()
    if controls is None or before == 1:
        yield
        return
    controls[1](1)
    try:
        yield
    finally:
        controls[1](before)
