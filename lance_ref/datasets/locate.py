"""Where a data set's files are: in the folder of data, in the cache, or at the published address."""

from __future__ import annotations

import os
from pathlib import Path

from lance_ref.datasets.fetch import cache_dir, download, matches, offline
from lance_ref.datasets.published import Published


def data_file(relative: str, what: str, data_dir: str | Path | None = None) -> Path:
    """Path of a file in the folder of data.

    Parameters
    ----------
    relative : str
        The file, relative to the folder.
    what : str
        What the file is for, for the error message.
    data_dir : str or Path, optional
        The folder; the environment variable ``LANCE_REF_DATA`` otherwise.

    Raises
    ------
    FileNotFoundError
        In one line: what is missing and where to put it.
    """
    folder = data_dir if data_dir is not None else os.environ.get("LANCE_REF_DATA")
    if not folder:
        raise FileNotFoundError(
            f"{what} needs the file {relative}: put it into a folder and set the environment variable "
            "LANCE_REF_DATA to that folder"
        )
    path = Path(folder) / relative
    if not path.is_file():
        raise FileNotFoundError(
            f"{what} needs the file {relative}: put it at {path} (folder from "
            f"{'data_dir' if data_dir is not None else 'LANCE_REF_DATA'})"
        )
    return path


def find_files(
    file: str | None, published: Published | None, what: str, data_dir: str | Path | None = None
) -> tuple[dict[str, Path], Published | None]:
    """The files of a data set, downloaded if need be.

    Looked for in ``data_dir``, if it is given, and then nowhere else. Otherwise in this order: in the folder
    that ``LANCE_REF_DATA`` names; in the cache (``LANCE_REF_CACHE``, else the user's own); at the published
    address, from which they come to the cache. ``LANCE_REF_OFFLINE=1`` forbids the last.

    Parameters
    ----------
    file : str or None
        The one file that stands directly in the folder of data.
    published : Published or None
        The published files; in the folder and in the cache they are in the subfolder ``published.folder``.
    what : str
        What the files are for, for the error message.
    data_dir : str or Path, optional

    Returns
    -------
    files : dict
        Paths by file name.
    published : Published or None
        Given back if these are the published files, each with its checksum compared; None for ``file``.

    Raises
    ------
    FileNotFoundError
        In one line: what is missing, where to put it, and why it was not downloaded.
    ValueError
        If a published file that was put into the folder has another checksum.
    """
    folder = data_dir if data_dir is not None else os.environ.get("LANCE_REF_DATA")
    if folder and file is not None and (Path(folder) / file).is_file():
        return {file: Path(folder) / file}, None
    if published is not None and folder:
        found = _in_folder(published, Path(folder) / published.folder)
        if found is not None:
            return found, published
    if published is not None and data_dir is None:
        return _in_cache(published, f"{what} needs {_or_file(file, folder)}"), published
    if file is None and published is not None:
        names = ", ".join(published.checksums)
        at = Path(str(data_dir)) / published.folder
        raise FileNotFoundError(f"{what} needs {names} of {published.url}: put it into {at} (folder from data_dir)")
    return {str(file): data_file(str(file), what, data_dir)}, None  # raises: it is not there


def _in_folder(published: Published, folder: Path) -> dict[str, Path] | None:
    """The published files in a folder of the user's, with their checksums compared; None if one is missing."""
    found = {name: folder / name for name in published.checksums}
    if not all(path.is_file() for path in found.values()):
        return None
    for name, path in found.items():
        checksum = published.checksums[name]
        if checksum is not None and not matches(path, checksum):
            raise ValueError(f"{path}: its checksum is not {checksum}: not the published file, or damaged")
    return found


def _in_cache(published: Published, need: str) -> dict[str, Path]:
    """The published files in the cache; those that are missing or damaged there are downloaded."""
    folder = cache_dir() / published.folder
    found = {name: folder / name for name in published.checksums}
    for name, path in found.items():
        checksum = published.checksums[name]
        if path.is_file() and (checksum is None or matches(path, checksum)):
            continue
        url = published.url + name
        try:
            if offline():
                raise OSError("LANCE_REF_OFFLINE is set")
            if checksum is None:
                raise OSError("no checksum is known for it")
            download(url, path, checksum)
        except OSError as error:
            raise FileNotFoundError(
                f"{need}{url}: fetch it by hand and put it at {path} (not downloaded: {error})"
            ) from None
    return found


def _or_file(file: str | None, folder: str | Path | None) -> str:
    """What an error says of the file of the folder of data, before it names the published one."""
    if file is None:
        return ""
    if folder:
        return f"the file {file}: put it at {Path(folder) / file} (folder from LANCE_REF_DATA), or it needs "
    return f"the file {file}: put it into a folder and set the environment variable LANCE_REF_DATA to it, or it needs "
