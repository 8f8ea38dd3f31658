"""Reading and writing ``.npz`` files that may come from anywhere: no pickle, no surprises in size.

``numpy.load`` allocates what a member's header asks for before it knows whether the file holds
that much. Here every size is compared with what is there, and with a bound, before anything is allocated.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from lance_ref.io.whole_file import whole_file

MAX_BYTES = 2**32
"""Default bound on the bytes of all arrays of a file together."""

MAX_MEMBERS = 50_000
DIRECTORY_ENTRY = 512  # bytes of the directory for one member, names of a few hundred letters included
SMALLEST_DIRECTORY, LARGEST_END = 22, 22 + 65535  # bytes of the record at the end of an archive, comment included
HEADER_BYTES = 2**14  # a header of NumPy's own is below 200 bytes
CHUNK_BYTES = 2**20
DEFLATE_RATIO = 1032  # deflate cannot expand its input further than this
KINDS = "biufcSU"  # bool, integers, floats, complex, bytes, text


def load_npz(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> dict[str, np.ndarray]:
    """Read all arrays of an ``.npz`` file, whoever wrote it.

    Parameters
    ----------
    path : path
    max_bytes : int
        The file is refused if its arrays take more bytes than this together.

    Returns
    -------
    dict
        Arrays by name, without the ``.npy`` of the member's name.

    Raises
    ------
    ValueError
        One line that names the file: not a zip archive, truncated, corrupt, too large, a member that
        is no ``.npy`` file or occurs twice, a header that asks for another size than the member has,
        an object array (which would be a pickle), a dtype other than numbers and text.
    OSError
        If the file cannot be opened.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is no ordinary file")
    size = path.stat().st_size
    if size >= SMALLEST_DIRECTORY:
        _check_count(path, size)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_directory(members, size, max_bytes)
            arrays = {}
            for info in members:
                try:
                    with archive.open(info) as file:
                        arrays[info.filename[: -len(".npy")]] = _read_member(file, info.file_size)
                except _BROKEN as error:
                    raise ValueError(f"{info.filename}: {error}") from None
            return arrays
    except _BROKEN as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


_BROKEN = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, RuntimeError, MemoryError)


def _check_count(path: Path, size: int) -> None:
    """Refuse an archive of too many members on what its end says, before a list of them is made."""
    with open(path, "rb") as file:
        file.seek(max(0, size - LARGEST_END))
        end = file.read()
    at = end.rfind(b"PK\x05\x06")
    if at < 0 or len(end) - at < SMALLEST_DIRECTORY:
        return  # zipfile says what is wrong with it
    count, directory_bytes = (
        struct.unpack("<H", end[at + 10 : at + 12])[0],
        struct.unpack("<I", end[at + 12 : at + 16])[0],
    )
    if count > MAX_MEMBERS or directory_bytes > MAX_MEMBERS * DIRECTORY_ENTRY:
        raise ValueError(f"{path}: has more than {MAX_MEMBERS} members, or names that are too long")


def _check_directory(members: list[zipfile.ZipInfo], size: int, max_bytes: int) -> None:
    """Refuse an archive on what its directory says, before any member is opened."""
    seen = set()
    for info in members:
        name = info.filename
        if name in seen:
            raise ValueError(f"contains {name!r} twice")
        seen.add(name)
        if not name.endswith(".npy"):
            raise ValueError(f"contains {name!r}, expected only .npy members")
        if info.flag_bits & 1:
            raise ValueError(f"{name} is encrypted")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is compressed by method {info.compress_type}, expected stored or deflated")
        most = info.compress_size * (1 if info.compress_type == zipfile.ZIP_STORED else DEFLATE_RATIO)
        if info.compress_size > size or info.file_size > most:
            raise ValueError(f"{name} claims {info.file_size} bytes, more than the file of {size} bytes can hold")
    total = sum(info.file_size for info in members)
    if total > max_bytes:
        raise ValueError(f"holds {total} bytes, expected at most {max_bytes}")


def _read_member(file: IO[bytes], member_bytes: int) -> np.ndarray:
    """One array, from a member whose directory entry says ``member_bytes``."""
    head = file.read(min(member_bytes, HEADER_BYTES))
    header = io.BytesIO(head)
    version = np.lib.format.read_magic(header)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(header)
    elif version == (2, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(header)
    else:
        raise ValueError(f"npy format {version}, expected (1, 0) or (2, 0)")
    if dtype.hasobject:
        raise ValueError("is an object array, which would have to be unpickled")
    if dtype.kind not in KINDS or not dtype.itemsize:
        raise ValueError(f"has dtype {dtype}, expected numbers or text")
    if any(n < 0 for n in shape):
        raise ValueError(f"has shape {shape}")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != member_bytes - header.tell():
        raise ValueError(
            f"its header says shape {shape} {dtype}, {nbytes} bytes, but it holds {member_bytes - header.tell()}"
        )
    buffer = np.empty(nbytes, np.uint8)
    first = head[header.tell() :]
    buffer[: len(first)] = np.frombuffer(first, np.uint8)
    filled = len(first)
    while filled < nbytes:  # the last read of a member compares its checksum
        chunk = file.read(min(CHUNK_BYTES, nbytes - filled))
        if not chunk:
            raise ValueError(f"is truncated: {filled} of {nbytes} bytes")
        buffer[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
        filled += len(chunk)
    return buffer.view(dtype).reshape(shape, order="F" if fortran_order else "C")


def save_npz(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as an uncompressed ``.npz`` file, all or nothing, the same bytes every time.

    See :func:`~lance_ref.io.whole_file.whole_file`. ``path`` is taken as it is; no suffix is added.

    Parameters
    ----------
    path : path
    arrays : mapping of str to array
        Numbers or text; kept in this order.

    Raises
    ------
    TypeError
        If an array has another dtype (objects would have to be pickled).
    OSError
        If the file cannot be written.
    """
    plain = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in plain.items():
        if array.dtype.hasobject or array.dtype.kind not in KINDS or not array.dtype.itemsize:
            raise TypeError(f"array {name!r} has dtype {array.dtype}, expected numbers or text")
    with whole_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in plain.items():
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)
