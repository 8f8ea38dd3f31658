"""Reading and writing ``.npz`` files that may come from anywhere: no pickle, no surprises in size.

``numpy.load`` allocates what a member's header asks for before it knows whether the file holds
that much. Here every size is compared with what is there, and with a bound, before anything is allocated.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from lance_ref.io.opening import open_zip
from lance_ref.io.whole_file import whole_file

MAX_BYTES = 2**32
"""Default bound on the bytes of all arrays of a file together."""

HEADER_BYTES = 2**14  # a header of NumPy's own is below 200 bytes
CHUNK_BYTES = 2**20
DEFLATE_RATIO = 1032  # deflate cannot expand its input further than this
KINDS = "biufcSU"  # bool, integers, floats, complex, bytes, text
CHECKSUM = b"lance_ref sha256:"
"""The archive's comment begins so; the digest of names, dtypes, shapes and values follows."""

REMEDY = "if it was sound before, it is damaged or of an earlier version: delete it, and write or fetch it again"
"""The end of an error on a file that may have decayed."""


def load_npz(
    path: str | os.PathLike[str], max_bytes: int = MAX_BYTES, needs_checksum: bool = False
) -> dict[str, np.ndarray]:
    """Read all arrays of an ``.npz`` file, whoever wrote it.

    Parameters
    ----------
    path : path
    max_bytes : int
        The file is refused if its arrays take more bytes than this together.
    needs_checksum : bool
        Whether a file without the checksum that :func:`save_npz` writes is refused. Where there is one, it is
        always compared.

    Returns
    -------
    dict
        Arrays by name, without the ``.npy`` of the member's name.

    Raises
    ------
    ValueError
        One line that names the file: not a zip archive, truncated, corrupt, too large, too many members, a member
        that is no ``.npy`` file or occurs twice, a header that asks for another size than the member has, an object
        array (which would be a pickle), a dtype other than numbers and text, a checksum that does not fit.
    OSError
        If the file cannot be opened.
    """
    path = Path(path)
    size = path.stat().st_size
    try:
        with open_zip(path) as archive:
            members = archive.infolist()
            _check_directory(members, size, max_bytes)
            arrays = {}
            for info in members:
                try:
                    with archive.open(info) as file:
                        arrays[info.filename[: -len(".npy")]] = _read_member(file, info.file_size)
                except (*_BROKEN, OSError) as error:  # a place before the file's beginning is an OSError
                    raise ValueError(f"{info.filename}: {error}") from None
            _check_seal(archive.comment, arrays, needs_checksum)
            return arrays
    except _BROKEN as error:
        reason = " ".join(str(error).split()).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: {reason}; {REMEDY}") from None


_BROKEN = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, RuntimeError, MemoryError)


def _check_seal(comment: bytes, arrays: Mapping[str, np.ndarray], needed: bool) -> None:
    """Compare what the archive's comment says of its content with the content."""
    if comment.startswith(CHECKSUM):
        if comment != CHECKSUM + digest(arrays).encode():
            raise ValueError("its checksum is not that of its contents")
    elif needed:
        raise ValueError("it has no checksum, so that this version of lance_ref did not write it")


def has_checksum(path: str | os.PathLike[str]) -> bool:
    """Whether :func:`save_npz` of this version wrote the file; :func:`load_npz` compares the checksum."""
    with open_zip(path) as archive:
        return archive.comment.startswith(CHECKSUM)


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, dtypes, shapes and values, in this order, in hexadecimal digits.

    >>> x = np.array([[1.0, 2.0]])
    >>> digest({"x": x}) == digest({"x": x.copy()}), digest({"x": x}) == digest({"x": x.T})
    (True, False)
    """
    result = hashlib.sha256()
    for name, array in arrays.items():
        result.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        result.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return result.hexdigest()


def arrays_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """:func:`digest` of the arrays in the order of their names: the same for every file that holds the same."""
    return digest({name: arrays[name] for name in sorted(arrays)})


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


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order in memory (whether Fortran's) and dtype of a .npy file; whatever is wrong is a ValueError."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy format {version}, expected (1, 0) or (2, 0)")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran_order, dtype = read(file)
    except Exception as error:  # the parser raises whatever a damaged text leads it to, tokenize.TokenError for one
        raise ValueError(f"its header cannot be read: {error}") from None
    return shape, fortran_order, dtype


def _read_member(file: IO[bytes], member_bytes: int) -> np.ndarray:
    """One array, from a member whose directory entry says ``member_bytes``."""
    head = file.read(min(member_bytes, HEADER_BYTES))
    header = io.BytesIO(head)
    shape, fortran_order, dtype = read_header(header)
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
    """Write arrays as an uncompressed ``.npz`` file with a checksum, all or nothing, the same bytes every time.

    See :func:`~lance_ref.io.whole_file.whole_file`. ``path`` is taken as it is; no suffix is added. The checksum is
    in the archive's comment, so that any program reads the file as any other ``.npz``.

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
        archive.comment = CHECKSUM + digest(plain).encode()
