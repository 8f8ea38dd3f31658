"""The file of the outputs of a network's frozen part: a ``.npy`` array, and beside it what it was made of."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import IO

import numpy as np

from lance_ref.io.whole_file import read_json, whole_file, write_json

Rows = Generator[np.ndarray, None, None]
"""Some rows of an array at a time."""

BLOCK_BYTES = 4 * 2**20
"""How much of the array is read at a time, when its checksum is compared before it is used."""

MOST_ABOUT = 2**16
"""Bytes of the largest description that is read."""


def stored(path: Path, fingerprint: str, sample: np.ndarray, count: int, rows: Callable[[], Rows]) -> np.ndarray:
    """The memory-mapped array of a file, which is written first unless it is there and fits.

    ``path`` is that of the array; ``.json`` is added for what it was made of. ``fingerprint`` is of all that
    determines the array, ``sample`` are its first rows up to the last bits, ``count`` is how many rows it has, and
    ``rows`` computes them.
    """
    about = path.with_name(f"{path.name}.json")
    arrays = _reusable(path, about, fingerprint, sample, count)
    if arrays is None:
        about.unlink(missing_ok=True)  # first: it must never describe another file than the one beside it
        with whole_file(path) as file:
            checksum = _write_npy(file, rows(), count)
            arrays = _mapped(Path(file.name))  # what this call wrote, whatever another process puts in its place
        write_json(about, {"fingerprint": fingerprint, "checksum": checksum})
    return arrays


def _reusable(path: Path, about: Path, fingerprint: str, sample: np.ndarray, count: int) -> np.ndarray | None:
    """The array of an earlier call, or None unless it is all that this one would write."""
    try:
        known = read_json(about, MOST_ABOUT)
        if known.get("fingerprint") != fingerprint:
            return None
        arrays = _mapped(path)
    except (OSError, ValueError, EOFError):
        return None
    if not isinstance(arrays, np.memmap) or arrays.shape != (count, *sample.shape[1:]) or arrays.dtype != sample.dtype:
        return None
    near = 1e-3 * (1 + np.abs(sample).max(initial=0))  # a batch of another size may differ in the last bits
    if not np.allclose(arrays[: len(sample)], sample, rtol=1e-3, atol=near):
        return None
    values = arrays.reshape(-1).view(np.uint8)
    checksum = 0
    for start in range(0, len(values), BLOCK_BYTES):
        checksum = zlib.crc32(values[start : start + BLOCK_BYTES].tobytes(), checksum)
    return arrays if known.get("checksum") == checksum else None


def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _write_npy(file: IO[bytes], rows: Rows, count: int) -> int:
    """An array in NumPy's format, chunk by chunk; gives the checksum of its values.

    (Written through a memory map a full disk would kill the process.)
    """
    checksum = 0
    with closing(rows):
        first = next(rows)
        header = {"descr": first.dtype.str, "fortran_order": False, "shape": (count, *first.shape[1:])}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in itertools.chain([first], rows):
            values = chunk.tobytes()
            file.write(values)
            checksum = zlib.crc32(values, checksum)
    file.flush()
    return checksum
