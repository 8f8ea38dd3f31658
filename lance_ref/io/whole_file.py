"""Files that are there whole or not at all, and that say when a bit of them has changed.

Every file of this project is written here: under a temporary name of its own in the same folder, brought to the disk,
and moved into place. A reader never sees a part of a file, an error leaves the old one as it was, and two processes
that write the same file do not meet.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from lance_ref.io.opening import open_regular

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

STALE_SECONDS = 3600
"""An unfinished file that nobody wrote to for so long was left by a process that is gone, if nobody has its lock."""

MEND = "delete it, and run again what wrote it"
"""What can be done about a damaged file, if nothing better is known."""

SEAL = "sha256"
"""The entry of a JSON object that holds the checksum of the others."""


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file to write to inside the ``with`` block, which becomes ``path`` at the end of it.

    Unfinished files of the same name that killed processes left are removed. A device or a pipe is written to as it is.

    Raises
    ------
    IsADirectoryError
        If ``path`` is a folder.
    FileNotFoundError
        If its folder does not exist.
    OSError
        If the file cannot be written; an earlier one is intact then, and no part of a new one is left.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, expected the name of a file", os.fspath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "its folder does not exist", os.fspath(path))
    if target.exists() and not target.is_file():
        with open(target, "wb") as stream:
            yield stream
        return
    remove_leftovers(target)
    temporary, file = _begin(target)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows moves no open file
            os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _begin(target: Path) -> tuple[Path, IO[bytes]]:
    """A new unfinished file, locked until it is closed; another one if somebody has just taken it for a leftover."""
    while True:
        temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.unfinished")
        file = open(temporary, "xb")  # noqa: SIM115  (whoever asked for it closes it)
        with suppress(BlockingIOError):
            _lock(file)
            if os.fstat(file.fileno()).st_nlink:
                return temporary, file
        file.close()


def remove_leftovers(path: str | os.PathLike[str], older_than: float = STALE_SECONDS) -> None:
    """Remove unfinished files of this name that no process writes any more.

    Parameters
    ----------
    path : path
        Of the finished file.
    older_than : float
        Seconds since something was written to them. Default: an hour, for file systems without locks.
    """
    target = Path(os.path.realpath(path))
    ours = re.compile(re.escape(f".{target.name[:100]}.") + r"\w+\.unfinished")
    with suppress(OSError), os.scandir(target.parent) as entries:  # a folder that cannot be listed has none
        for entry in entries:
            with suppress(OSError):  # another process finishes or removes it just now
                if ours.fullmatch(entry.name) and time.time() - entry.stat().st_mtime >= older_than:
                    with open(entry.path, "rb") as file:
                        _lock(file)
                        os.unlink(entry.path)


def _lock(file: IO[bytes]) -> None:
    """Lock an open file until it is closed; BlockingIOError if another process has it, nothing without locks."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass  # a file system without locks


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The same JSON object with a checksum of its entries.

    >>> unsealed(sealed({"a": 1}), "x.json")
    {'a': 1}
    """
    plain = {name: value for name, value in document.items() if name != SEAL}
    return {**plain, SEAL: _digest(plain)}


def unsealed(document: Any, where: str, mend: str = MEND) -> dict[str, Any]:
    """A JSON object without its checksum, which is compared.

    Parameters
    ----------
    document : object
        What was read.
    where : str
        The file's name, for the error.
    mend : str
        What the reader can do about a damaged file.

    Raises
    ------
    ValueError
        If there is no checksum, or another one.
    """
    if not isinstance(document, dict):
        raise ValueError(f"{where}: expected a JSON object; {mend}")
    if SEAL not in document:
        raise ValueError(f"{where}: has no checksum ({SEAL!r}): it is damaged or of an earlier version; {mend}")
    plain = {name: value for name, value in document.items() if name != SEAL}
    if document[SEAL] != _digest(plain):
        raise ValueError(f"{where}: its checksum is not that of its contents: the file is damaged; {mend}")
    return plain


def _digest(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: str | os.PathLike[str], document: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum, whole or not at all."""
    write_text(path, json.dumps(sealed(document), indent=1) + "\n")


def read_json(path: str | os.PathLike[str], most_bytes: int) -> dict[str, Any]:
    """Read what :func:`write_json` wrote.

    Parameters
    ----------
    path : path
    most_bytes : int
        The largest file that is read.

    Raises
    ------
    ValueError
        One line that names the file: no ordinary file, too large, no JSON object, or damaged.
    OSError
        If it cannot be read.
    """
    content = read_bytes(path, most_bytes)
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}: is no JSON: {error}; {MEND}") from None
    return unsealed(document, os.fspath(path))


def read_bytes(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """The contents of an ordinary file of at most that many bytes; sizes are compared before anything is read.

    Raises
    ------
    ValueError
        For a device, a pipe or a folder, and for a file that is larger.
    OSError
        If it cannot be read.
    """
    with open_regular(path, most_bytes) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:  # it has grown since it was opened
        raise ValueError(f"{os.fspath(path)}: more than {most_bytes} bytes, expected at most that many")
    return content
