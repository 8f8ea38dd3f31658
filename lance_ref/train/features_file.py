"""The file of the outputs of a network's frozen part: a ``.npy`` array, and beside it what it was made of."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np

Rows = Generator[np.ndarray, None, None]
"""Some rows of an array at a time."""

STALE_SECONDS = 3600  # an unfinished file that nobody wrote to for so long belongs to a dead process


def stored(path: Path, fingerprint: str, sample: np.ndarray, count: int, rows: Callable[[], Rows]) -> np.ndarray:
    """The memory-mapped array of a file, which is written first unless it is there and fits.

    Parameters
    ----------
    path : Path
        Of the array; ``.json`` is added for what it was made of.
    fingerprint : str
        Of all that determines the array.
    sample : numpy.ndarray
        Its first rows, up to the last bits.
    count : int
        How many rows it has.
    rows : callable
        Computes them.

    Raises
    ------
    OSError
        If a file cannot be written; nothing is left of it then.
    """
    about = path.with_name(f"{path.name}.json")
    arrays = _reusable(path, about, fingerprint, sample, count)
    if arrays is None:
        about.unlink(missing_ok=True)  # first: it must never describe another file than the one beside it
        _replace(path, lambda file: _write_npy(file, rows(), count))
        text = json.dumps({"fingerprint": fingerprint, **_identity(path)})
        _replace(about, lambda file: file.write(text.encode()))
        arrays = np.load(path, mmap_mode="r", allow_pickle=False)
    return arrays


def _reusable(path: Path, about: Path, fingerprint: str, sample: np.ndarray, count: int) -> np.ndarray | None:
    """The array of an earlier call, or None unless it is all that this one would write."""
    try:
        if json.loads(about.read_bytes()) != {"fingerprint": fingerprint, **_identity(path)}:
            return None
        arrays = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # a text that is no JSON is a ValueError
        return None
    if not isinstance(arrays, np.memmap) or arrays.shape != (count, *sample.shape[1:]) or arrays.dtype != sample.dtype:
        return None
    near = 1e-3 * (1 + np.abs(sample).max(initial=0))  # a batch of another size may differ in the last bits
    return arrays if np.allclose(arrays[: len(sample)], sample, rtol=1e-3, atol=near) else None


def _identity(path: Path) -> dict[str, int]:
    """What changes when a file is written anew."""
    status = path.stat()
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def _write_npy(file: Any, rows: Rows, count: int) -> None:
    """An array in NumPy's format, chunk by chunk. (Written through a memory map a full disk would kill the process.)"""
    with closing(rows):
        first = next(rows)
        header = {"descr": first.dtype.str, "fortran_order": False, "shape": (count, *first.shape[1:])}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(first.tobytes())
        for chunk in rows:
            file.write(chunk.tobytes())


def _replace(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file under a temporary name and move it into place; nothing is left of it on an error."""
    for leftover in path.parent.glob(f".{escape(path.name)}.*.features.tmp"):
        with suppress(FileNotFoundError):  # another process may finish it just now
            if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
                leftover.unlink()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.features.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
