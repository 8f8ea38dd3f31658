"""Files from their published addresses: downloaded once, checked against a pinned checksum, kept in a cache.

A download goes to a temporary name (:mod:`lance_ref.io.whole_file`) and gets its own name only after its checksum
fits, so a broken one leaves nothing behind and harms no earlier file.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

from lance_ref.io.whole_file import whole_file

CACHE_VARIABLE = "LANCE_REF_CACHE"
OFFLINE_VARIABLE = "LANCE_REF_OFFLINE"

MAX_DOWNLOAD_BYTES = 1024**3
"""A download that claims or sends more than this is broken off."""

CHUNK_BYTES = 64 * 1024
TIMEOUT_SECONDS = (10, 60)
"""For the connection, and between two pieces of an answer."""

HEADERS = {"Accept-Encoding": "identity"}  # the checksum is of the bytes as they are stored


def cache_dir() -> Path:
    """Where downloads are kept: ``LANCE_REF_CACHE``, else the user's cache folder for ``lance-ref``."""
    folder = os.environ.get(CACHE_VARIABLE)
    if folder:
        return Path(folder)
    import pooch  # type: ignore[import-untyped]

    return Path(pooch.os_cache("lance-ref"))


def offline() -> bool:
    """Whether ``LANCE_REF_OFFLINE`` forbids downloads; any value but "" and "0" does."""
    return os.environ.get(OFFLINE_VARIABLE, "") not in ("", "0")


def matches(path: Path, checksum: str) -> bool:
    """Whether a file has the checksum ``"<algorithm>:<hexadecimal digits>"``, e.g. ``"md5:d41d8cd9…"``."""
    algorithm, _, digits = checksum.partition(":")
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest() == digits


def download(url: str, path: Path, checksum: str) -> None:
    """Put the file at ``url`` to ``path``, if its checksum fits; otherwise leave everything as it was.

    Parameters
    ----------
    url : str
        An http or https address.
    path : Path
        Its folder is made if it is missing; a file already there is replaced by one that fits.
    checksum : str
        ``"<algorithm>:<hexadecimal digits>"``.

    Raises
    ------
    OSError
        In one line without the address: cannot connect, an HTTP error, broken off, too large, a checksum that
        does not fit, nowhere to write.
    """
    import requests

    algorithm, _, digits = checksum.partition(":")
    found = hashlib.new(algorithm)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            whole_file(path) as file,
            requests.get(url, stream=True, timeout=TIMEOUT_SECONDS, headers=HEADERS) as response,
            _Meter(path.name) as meter,
        ):
            response.raise_for_status()
            meter.expect(int(response.headers.get("content-length", 0)))
            for piece in response.iter_content(CHUNK_BYTES):
                meter.count(len(piece))
                found.update(piece)
                file.write(piece)
            if found.hexdigest() != digits:
                raise OSError(f"what came does not have the checksum {checksum}")
    except requests.exceptions.HTTPError as error:
        status = getattr(error.response, "status_code", "unknown")
        raise OSError(f"the server answered with HTTP status {status}") from None
    except requests.exceptions.Timeout:
        raise OSError("the server did not answer in time") from None
    except requests.exceptions.ChunkedEncodingError:
        raise OSError("the connection broke off before the end") from None
    except requests.exceptions.ConnectionError:
        raise OSError("cannot connect") from None
    except _TooLargeError as error:
        raise OSError(str(error)) from None
    except (ValueError, OSError) as error:
        raise OSError(_one_line(error)) from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _TooLargeError(Exception):
    """A download passed :data:`MAX_DOWNLOAD_BYTES`."""


class _Meter:
    """Counts the bytes of a download, stops one that is too large, and shows a bar if stderr is a terminal."""

    def __init__(self, name: str) -> None:
        self.name, self.done = name, 0
        self._bar: Any = None

    def __enter__(self) -> _Meter:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._bar.add_task(self.name, total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def expect(self, total: int) -> None:
        """So many bytes are announced; 0 if none are."""
        _check_bytes(total, "announced")
        if self._bar is not None and total:
            self._bar.update(self._bar.task_ids[0], total=total)

    def count(self, more: int) -> None:
        """So many more bytes came."""
        self.done += more
        _check_bytes(self.done, "came")
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done)


def _check_bytes(count: int, verb: str) -> None:
    if count > MAX_DOWNLOAD_BYTES:
        raise _TooLargeError(f"{count} bytes {verb}, at most {MAX_DOWNLOAD_BYTES} are taken")
