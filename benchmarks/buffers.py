"""Counting the buffers that NumPy allocates, and the copies among them.

NumPy asks a memory handler for the data of every array (NEP 49). :func:`count_buffers` puts one in its place that
counts, and passes on what the former one gives. It is reached through the table of NumPy's C functions, as by every
extension.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import FrameType
from typing import Any, NamedTuple

import numpy as np

SMALLEST_BYTES = 1024
"""Smaller buffers do not count: numbers and shapes, of which NumPy makes more or fewer from version to version."""
COPYING = frozenset(
    {"array", "asarray", "ascontiguousarray", "asfortranarray", "astype", "copy", "flatten", "ravel", "reshape"}
)
"""NumPy's functions and methods that give the values of their argument again, in a new buffer or in the same."""


@dataclass
class Buffers:
    """What was allocated.

    Attributes
    ----------
    count, nbytes : int
        Buffers of at least :data:`SMALLEST_BYTES`.
    copies, copied_bytes : int
        Those of them that were allocated inside of a function of :data:`COPYING`.
    """

    count: int = 0
    nbytes: int = 0
    copies: int = 0
    copied_bytes: int = 0
    _copying: int = 0  # calls of COPYING that are under way

    def add(self, nbytes: int) -> None:
        if nbytes >= SMALLEST_BYTES:
            self.count += 1
            self.nbytes += nbytes
            if self._copying:
                self.copies += 1
                self.copied_bytes += nbytes

    def note_call(self, frame: FrameType, event: str, function: Any) -> None:
        """For :func:`sys.setprofile`: is a copying function under way?"""
        if event.startswith("c_") and function.__name__ in COPYING and _is_numpys(function):
            self._copying += 1 if event == "c_call" else -1


@contextmanager
def count_buffers() -> Iterator[Buffers]:
    """Count the buffers that the arrays of this thread get inside the ``with`` block.

    The results of compiled loops are among them, as NumPy allocates these. What a library allocates by itself, as BLAS
    does, is not, nor is an array that grows in place.

    Examples
    --------
    >>> with count_buffers() as buffers:
    ...     matrix = np.ones((16, 32))
    ...     copy = np.ascontiguousarray(matrix.T)
    ...     same = np.ascontiguousarray(matrix)
    >>> buffers.count, buffers.nbytes, buffers.copies, buffers.copied_bytes
    (2, 8192, 1, 4096)
    """
    global _counted
    if _counted is not None:
        raise RuntimeError("count_buffers is in use already")
    numpy, profile = _numpy(), sys.getprofile()
    former = numpy.set_handler(numpy.counting)
    _counted = Buffers()
    sys.setprofile(_counted.note_call)
    try:
        yield _counted
    finally:
        sys.setprofile(profile)
        numpy.set_handler(former)
        _counted = None


_counted: Buffers | None = None


def _is_numpys(function: Any) -> bool:
    return isinstance(function.__self__, np.ndarray) or (function.__module__ or "").startswith("numpy")


# ---- the memory handler ------------------------------------------------------------------

CAPSULE = b"mem_handler"
SET_HANDLER, GET_HANDLER = 304, 305
"""Where ``PyDataMem_SetHandler`` and ``PyDataMem_GetHandler`` stand in the table of functions, since NumPy 1.22."""

# PYFUNCTYPE: with the interpreter's lock, on which NumPy's own handler relies
_Malloc = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_Calloc = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)


class _Allocator(ctypes.Structure):
    """``PyDataMemAllocator``"""

    _fields_ = (
        ("ctx", ctypes.c_void_p),
        ("malloc", _Malloc),
        ("calloc", _Calloc),
        ("realloc", ctypes.c_void_p),
        ("free", ctypes.c_void_p),
    )


class _Handler(ctypes.Structure):
    """``PyDataMem_Handler``, version 1."""

    _fields_ = (("name", ctypes.c_char * 127), ("version", ctypes.c_uint8), ("allocator", _Allocator))


class _Numpy(NamedTuple):
    """NumPy's function to set a handler, and the one that counts.

    Every array frees its buffer with the handler it came from: ``kept`` must live as long as the process.
    """

    set_handler: Any
    counting: Any
    kept: tuple[Any, ...]


@cache
def _numpy() -> _Numpy:
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    api = importlib.import_module("numpy._core._multiarray_umath")._ARRAY_API
    table = (ctypes.c_size_t * (GET_HANDLER + 1)).from_address(pointer_of(api, None))
    set_handler = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(table[SET_HANDLER])
    own_capsule = ctypes.PYFUNCTYPE(ctypes.py_object)(table[GET_HANDLER])()
    own = _Handler.from_address(pointer_of(own_capsule, CAPSULE)).allocator

    def malloc(ctx: int | None, nbytes: int) -> int | None:
        if _counted is not None:
            _counted.add(nbytes)
        address: int | None = own.malloc(ctx, nbytes)
        return address

    def calloc(ctx: int | None, count: int, nbytes: int) -> int | None:
        if _counted is not None:
            _counted.add(count * nbytes)
        address: int | None = own.calloc(ctx, count, nbytes)
        return address

    allocator = _Allocator(own.ctx, _Malloc(malloc), _Calloc(calloc), own.realloc, own.free)
    handler = _Handler(b"counting", 1, allocator)
    counting = new_capsule(ctypes.addressof(handler), CAPSULE, None)
    return _Numpy(set_handler, counting, (handler, own_capsule))
