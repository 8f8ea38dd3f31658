"""Opening files that may come from anywhere: kind, size and number of entries are looked at before anything is read."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

DIRECTORY_BYTES = 2**22
"""Default bound on the table of contents of a zip archive; 4 MiB are some 40,000 entries."""


def open_regular(path: str | os.PathLike[str], most_bytes: int | None = None) -> IO[bytes]:
    """Open a file for reading, unless it is a folder, a device, a pipe, or too large.

    Parameters
    ----------
    path : path
    most_bytes : int, optional
        Most bytes that the file may have.

    Raises
    ------
    ValueError
        If the file is no ordinary file (nothing says how much a device or a pipe would give), or is too large.
    OSError
        If it cannot be opened.
    """
    no_wait = getattr(os, "O_NONBLOCK", 0)  # a pipe that nobody writes to would make us wait for ever
    if os.path.isdir(path):  # some systems open no folder at all
        raise ValueError(f"{os.fsdecode(path)}: is no ordinary file but a folder")
    descriptor = os.open(path, os.O_RDONLY | no_wait | getattr(os, "O_BINARY", 0))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{os.fsdecode(path)}: is no ordinary file but a device or a pipe")
        if most_bytes is not None and status.st_size > most_bytes:
            raise ValueError(f"{os.fsdecode(path)}: {status.st_size} bytes, expected at most {most_bytes}")
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


@contextmanager
def open_zip(path: str | os.PathLike[str], directory_bytes: int = DIRECTORY_BYTES) -> Iterator[zipfile.ZipFile]:
    """A zip archive whose table of contents has been found small enough before it is read.

    Raises
    ------
    ValueError
        As :func:`open_regular`, or if the table of contents is too large or the comment at the end is cut off.
    zipfile.BadZipFile
        If the file is no zip archive.
    OSError
        If it cannot be opened.
    """
    with open_regular(path) as file:
        _check_end(file, directory_bytes)
        try:
            archive = zipfile.ZipFile(file)
        except OSError as error:  # a place before the file's beginning
            raise zipfile.BadZipFile(f"its table of contents cannot be read: {error}") from None
        with archive:
            yield archive


def _check_end(file: IO[bytes], most: int) -> None:
    """Look at the record at the archive's end before ``zipfile`` makes an object of a kilobyte of every entry."""
    private: Any = zipfile  # what zipfile itself goes by: an own reading of the record might find another one
    try:
        end = private._EndRecData(file)
    except OSError as error:
        raise zipfile.BadZipFile(f"its end cannot be read: {error}") from None
    file.seek(0)
    if end and len(end[private._ECD_COMMENT]) != end[private._ECD_COMMENT_SIZE]:
        raise ValueError("it is truncated: its comment is shorter than it says")
    if end and end[private._ECD_SIZE] > most:
        raise ValueError(f"its table of contents has {end[private._ECD_SIZE]} bytes, expected at most {most}")


def one_line(error: BaseException) -> str:
    """What an error says, on one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
