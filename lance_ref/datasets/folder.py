"""The user's own pictures: a folder with one subfolder a class, perhaps under ``train/`` and ``test/``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lance_ref.datasets.dataset import Dataset, size_pair, spread
from lance_ref.datasets.files import EXTENSIONS, MAX_FILE_BYTES, decode_all
from lance_ref.io.whole_file import read_bytes

SPLITS = ("train", "test")
SUFFIXES = ", ".join(EXTENSIONS)

Classes = list[tuple[str, list[Path]]]
"""Pictures by class, in the order of the labels."""


def ImageFolder(  # noqa: N802  (the name that users know)
    path: str | Path,
    image_size: int | tuple[int, int] | None = None,
    split: str | None = None,
    limit: int | None = None,
    channels: int = 3,
) -> Dataset:
    """Pictures in ``<path>/<class>/`` or in ``<path>/train/<class>/`` and ``<path>/test/<class>/``.

    Pictures are files named ``.jpg``, ``.jpeg``, ``.png``, ``.bmp`` or ``.webp``; hidden files and folders are left
    out. Classes are the subfolders' names in sorted order, those of both parts together.

    Parameters
    ----------
    image_size : int or (height, width), optional
        Each picture is cut around its centre to this aspect ratio and resized bilinearly. None takes the
        pictures as they are; they must then have one size.
    split : {"train", "test"}, optional
        Needed if the folder holds ``train/`` and ``test/``, and not allowed otherwise (a part can be set
        aside with :func:`validation_split`); that of the result is then ``"all"``.
    limit : int, optional
        Read that many pictures, spread evenly over the classes.
    channels : {1, 3}
        Grey or RGB; pictures of other kinds are converted (of transparent ones the colours are kept).

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or no such part in it.
    ValueError
        If there are no classes, or only one, or one without pictures; if a picture is damaged or too large
        (naming it), or has another size than the first and ``image_size`` is None.
    """
    folder, size = _check(path, image_size, channels)
    if split not in (None, *SPLITS):
        raise ValueError(f"split is {split!r}, expected 'train', 'test' or None")
    parts = parts_of(folder)
    if split is None and parts:
        raise ValueError(f"{folder}: holds {' and '.join(f'{part}/' for part in parts)}: give split")
    if split is not None and split not in parts:
        raise FileNotFoundError(f"{folder}: no subfolder {split}/ with classes in it, but split is {split!r}")
    by_part = {part: _classes(folder / part) for part in parts} if parts else {"all": _classes(folder)}
    for where, classes in by_part.items():
        empty = [name for name, pictures in classes if not pictures]
        if empty:
            raise ValueError(f"{folder}: class {empty[0]!r} of {where} holds no pictures ({SUFFIXES})")
    names = sorted({name for classes in by_part.values() for name, _ in classes})
    if len(names) < 2:
        raise ValueError(f"{folder}: {len(names)} class(es), expected at least 2 subfolders with pictures in them")
    chosen = split or "all"
    own = dict(by_part[chosen])
    found = [(name, own.get(name, [])) for name in names]
    return _read(folder, chosen, found, size, limit, channels)


def load_folder(
    path: str | Path, image_size: int | tuple[int, int], limit: int | None = None, channels: int = 3
) -> Dataset:
    """A folder of pictures, with labels or without; arguments and pictures are as for :func:`ImageFolder`.

    Subfolders are classes, in sorted order; a folder with pictures and no such subfolders is one
    class, with label 0. That is enough for calibration; :func:`ImageFolder` is stricter. ValueError if there are no
    pictures, or one is damaged or too large (naming it).
    """
    folder, _ = _check(path, image_size, channels)
    size = size_pair(image_size)
    found = _classes(folder)
    if not any(pictures for _, pictures in found):
        found = [(folder.name, _pictures(folder))]
    if not any(pictures for _, pictures in found):
        raise ValueError(f"{folder}: holds no pictures ({SUFFIXES}), neither itself nor in subfolders")
    return _read(folder, "all", found, size, limit, channels)


def _check(
    path: str | Path, image_size: int | tuple[int, int] | None, channels: int
) -> tuple[Path, tuple[int, int] | None]:
    """The folder and the size, if all of them can be used."""
    size = None if image_size is None else size_pair(image_size)
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels!r}, expected 1 or 3")
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{path}: no such folder of pictures")
    return Path(path), size


def parts_of(folder: str | Path) -> list[str]:
    """Those of ``train/`` and ``test/`` that exist; none if a subfolder has another name or holds pictures itself."""
    folder = Path(folder)
    subfolders = _subfolders(folder)
    if any(child.name not in SPLITS or _pictures(child) or not _subfolders(child) for child in subfolders):
        return []
    return [part for part in SPLITS if part in {child.name for child in subfolders}]


def _classes(folder: Path) -> Classes:
    return [(child.name, _pictures(child)) for child in _subfolders(folder)]


def _read(
    folder: Path, split: str, found: Classes, size: tuple[int, int] | None, limit: int | None, channels: int
) -> Dataset:
    """The pictures as arrays; without a ``size`` that of the first one."""
    files = [picture for _, pictures in found for picture in pictures]
    labels = np.repeat(np.arange(len(found), dtype=np.int64), [len(pictures) for _, pictures in found])
    chosen = spread(labels, limit)
    encoded = ((str(files[i]), read_bytes(files[i], MAX_FILE_BYTES)) for i in chosen)
    images = decode_all(encoded, len(chosen), size, channels)
    return Dataset(folder.name, split, images, labels[chosen], tuple(name for name, _ in found), f"folder {folder}")


def _subfolders(folder: Path) -> list[Path]:
    return [child for child in sorted(folder.iterdir()) if child.is_dir() and not child.name.startswith(".")]


def _pictures(folder: Path) -> list[Path]:
    return [
        file
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".") and file.is_file()
    ]
