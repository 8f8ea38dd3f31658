"""Where the files of a data set are: in the folder of data, in the cache, or at the published address.

Downloads are pooch's: a file gets its name only after its pinned checksum fits, so that a broken download leaves
nothing behind and harms no earlier file.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lance_ref.datasets.published import Published
from lance_ref.io.opening import one_line
from lance_ref.io.progress import progress_bar

MAX_DOWNLOAD_BYTES = 1024**3
"""A download that claims or sends more than this is broken off."""

CHUNK_BYTES = 64 * 1024
TIMEOUT_SECONDS = (10, 60)
"""Longest wait for the connection, and between two pieces of an answer."""

HEADERS = {"Accept-Encoding": "identity"}  # the checksum is of the bytes as they are stored


def cache_dir() -> Path:
    """Where downloads are kept: ``LANCE_REF_CACHE``, else the user's cache folder for ``lance-ref``."""
    import pooch  # type: ignore[import-untyped]

    return Path(os.environ.get("LANCE_REF_CACHE") or pooch.os_cache("lance-ref"))


def data_file(relative: str, what: str, data_dir: str | Path | None = None) -> Path:
    """Path of a file in the folder of data, which is ``data_dir`` or else that of ``LANCE_REF_DATA``.

    Raises
    ------
    FileNotFoundError
        In one line: what is missing (``what`` needs it) and where to put it.
    """
    folder, named = (data_dir, "data_dir") if data_dir is not None else (_data_folder(), "LANCE_REF_DATA")
    if not folder:
        raise FileNotFoundError(
            f"{what} needs the file {relative}: put it into a folder and set the environment variable "
            "LANCE_REF_DATA to that folder"
        )
    path = Path(folder) / relative
    if not path.is_file():
        raise FileNotFoundError(f"{what} needs the file {relative}: put it at {path} (folder from {named})")
    return path


def find_files(
    file: str | None, published: Published | None, what: str, data_dir: str | Path | None = None
) -> tuple[dict[str, Path], Published | None]:
    """The files of a data set by name, downloaded if need be.

    They are looked for in ``data_dir``, if it is given, and then nowhere else. Otherwise in this order: in the folder
    that ``LANCE_REF_DATA`` names; in the cache (``LANCE_REF_CACHE``, else the user's own); at the published address,
    from which they come to the cache. ``LANCE_REF_OFFLINE=1`` forbids the last. The one ``file`` stands directly in
    the folder of data, the published ones in their subfolder ``published.folder``. ``published`` is given back if
    these are the files that were found, each with its checksum compared, and None for ``file``.

    Raises
    ------
    FileNotFoundError
        In one line: what is missing (``what`` needs it), where to put it, and why it was not downloaded.
    ValueError
        If a published file that was put into the folder has another checksum.
    """
    folder = data_dir if data_dir is not None else _data_folder()
    if published is None or (folder and file is not None and (Path(folder) / file).is_file()):
        return {str(file): data_file(str(file), what, data_dir)}, None
    if folder:
        own = {name: Path(folder) / published.folder / name for name in published.checksums}
        if all(path.is_file() for path in own.values()):
            for name, path in own.items():
                if not matches(path, checksum := published.checksums[name]):
                    raise ValueError(f"{path}: its checksum is not {checksum}: not the published file, or damaged")
            return own, published
    if data_dir is None:
        return _in_cache(published, f"{what} needs {_or_file(file, folder)}"), published
    if file is not None:
        return {file: data_file(file, what, data_dir)}, None  # raises: it is not there
    names, at = ", ".join(published.checksums), Path(data_dir) / published.folder
    raise FileNotFoundError(f"{what} needs {names} of {published.url}: put it into {at} (folder from data_dir)")


def matches(path: Path, checksum: str | None) -> bool:
    """Whether a file has the checksum ``"<algorithm>:<hexadecimal digits>"``; without one any file will do."""
    from pooch.hashes import hash_matches  # type: ignore[import-untyped]

    return bool(hash_matches(path, checksum))


def _data_folder() -> str | None:
    return os.environ.get("LANCE_REF_DATA")


def _or_file(file: str | None, folder: str | Path | None) -> str:
    """What an error says of the file of the folder of data, before it names the published one."""
    if file is None:
        return ""
    where = f"at {Path(folder) / file} (folder from LANCE_REF_DATA)" if folder else ""
    where = where or "into a folder and set the environment variable LANCE_REF_DATA to it"
    return f"the file {file}: put it {where}, or it needs "


def _in_cache(published: Published, need: str) -> dict[str, Path]:
    """The published files in the cache; those that are missing or damaged there are downloaded."""
    found = {name: cache_dir() / published.folder / name for name in published.checksums}
    for name, path in found.items():
        checksum, url = published.checksums[name], published.url + name
        if path.is_file() and matches(path, checksum):
            continue
        try:
            if os.environ.get("LANCE_REF_OFFLINE", "") not in ("", "0"):
                raise OSError("LANCE_REF_OFFLINE is set")
            if checksum is None:
                raise OSError("no checksum is known for it")
            download(url, path, checksum)
        except OSError as error:
            by_hand = f"fetch it by hand and put it at {path} (not downloaded: {error})"
            raise FileNotFoundError(f"{need}{url}: {by_hand}") from None
    return found


def download(url: str, path: Path, checksum: str) -> None:
    """Put the file at ``url`` to ``path``, if its checksum fits; otherwise leave everything as it was.

    Raises
    ------
    OSError
        In one line without the address: cannot connect, an HTTP error, broken off, too large, a checksum that
        does not fit, nowhere to write.
    """
    import pooch
    import requests

    pooch.get_logger().setLevel("WARNING")  # it tells of every download on standard error
    try:
        with _Meter(path.name) as meter:
            hooks = {"response": meter.close_at_end}
            get = pooch.HTTPDownloader(meter, CHUNK_BYTES, timeout=TIMEOUT_SECONDS, headers=HEADERS, hooks=hooks)
            pooch.retrieve(url, checksum, path.name, path.parent, downloader=get)
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
    except ValueError as error:
        wrong = "known hash" in str(error)
        raise OSError(f"what came does not have the checksum {checksum}" if wrong else one_line(error)) from None
    except OSError as error:
        raise OSError(one_line(error)) from None


class _TooLargeError(Exception):
    """A download passed :data:`MAX_DOWNLOAD_BYTES`."""


class _Meter(ExitStack):
    """What pooch tells of a download: stops one that is too large, and shows a bar if standard error is a terminal."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.done = name, 0

    def close_at_end(self, response: Any, *_: object, **__: object) -> None:
        """A connection that is broken off is closed at once, not when its memory is given back."""
        self.callback(response.close)

    def expect(self, total: int) -> None:
        """So many bytes are announced; 0 if none are."""
        _check_bytes(total, "announced")
        self.advance = self.enter_context(progress_bar(self.name, total, None))

    total = property(fset=expect, doc="What pooch assigns before the first piece.")

    def update(self, more: int) -> None:
        """So many more bytes came."""
        self.done += more
        _check_bytes(self.done, "came")
        self.advance(more, "")

    def reset(self) -> None:
        """pooch counts whole chunks, and says the true number at the end."""
        self.done = 0


def _check_bytes(count: int, verb: str) -> None:
    if count > MAX_DOWNLOAD_BYTES:
        raise _TooLargeError(f"{count} bytes {verb}, at most {MAX_DOWNLOAD_BYTES} are taken")
