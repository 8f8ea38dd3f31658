"""One way to say which images: a data set by its name, a folder of pictures, or a ``.npz`` file of arrays.

Every command that takes ``--data`` opens it here.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from lance_ref.datasets.arrays import read_parts
from lance_ref.datasets.dataset import Dataset, spread, to_channels, validation_split
from lance_ref.datasets.folder import ImageFolder, load_folder, parts_of
from lance_ref.datasets.registry import SOURCES, data_files, load, names
from lance_ref.io.opening import open_regular

SPLITS = ("train", "test", "all")
HELD_OUT = 0.2
"""Share of each class that is the test set of data without one."""


def is_data(text: str) -> bool:
    """Whether this is the name of a data set, a folder, or a ``.npz`` file that is there."""
    return text in names() or (bool(text) and (Path(text).is_dir() or (text.endswith(".npz") and Path(text).is_file())))


def has_parts(data: str) -> bool:
    """Whether a folder or a file of arrays has the parts ``train`` and ``test``."""
    return "all" not in read_parts(data, labelled=False) if data.endswith(".npz") else bool(parts_of(data))


def open_data(
    data: str,
    split: str = "train",
    image_size: int | tuple[int, int] | None = None,
    limit: int | None = None,
    channels: int | None = None,
    labelled: bool = True,
) -> Dataset:
    """Images and labels, from wherever they come.

    Parameters
    ----------
    data : str
        A name of :func:`~lance_ref.datasets.names`; a folder, as for :class:`~lance_ref.datasets.ImageFolder`; or a
        ``.npz`` file, as for :func:`~lance_ref.datasets.load_arrays`. A folder whose name is also that of a data set is
        written ``./digits``.
    split : {"train", "test", "all"}
        Of a folder or a file without such parts, a fifth of each class is the test set. Which fifth it is depends on
        nothing but the labels.
    image_size : int or (height, width), optional
        Of the pictures of a folder, which are cut and resized as they are read. The default takes them as they are;
        they must then have one size. Images of other data are left to :func:`~lance_ref.datasets.batches`.
    limit : int, optional
        That many images, spread over the classes. The default is all of them.
    channels : int, optional
        One channel is the mean of several; a single channel is repeated; further channels than there are repeat those
        that there are. The default leaves them as they are.
    labelled : bool
        Whether labels are needed. False also takes a folder of pictures without classes, and then all of its images.

    Raises
    ------
    FileNotFoundError
        If there is no such folder or file.
    ValueError
        If the name is unknown, an argument is out of range, or the data are damaged or of another form.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    if channels is not None and channels < 1:
        raise ValueError(f"channels is {channels}, expected a positive integer")
    if not is_data(data):
        kinds = f"{', '.join(names())}, a folder of pictures, or a .npz file of arrays"
        raise ValueError(f"data is {data!r}, expected one of {kinds}")
    if data in names():
        found = [load(data, part, limit=limit) for part in (("train", "test") if split == "all" else (split,))]
        images = found[0] if len(found) == 1 else _joined(found)
    elif data.endswith(".npz"):
        images = _of_file(data, split, labelled)
    else:
        images = _of_folder(data, split, image_size, labelled)
    if limit is not None:
        images = images.subset(spread(images.labels, limit))
    return replace(images, images=to_channels(images.images, channels))


def checksum(data: str) -> str:
    """SHA-256 of the files that the images come from: of a folder, of names and contents; of ``digits``, of pixels."""
    digest = hashlib.sha256()
    if data == "digits":
        digest.update(np.concatenate([load(data, part).images for part in ("train", "test")]).tobytes())
        return digest.hexdigest()
    if data in SOURCES:
        files = list(data_files(data)[0].values())
    elif Path(data).is_dir():
        files = sorted(path for path in Path(data).rglob("*") if path.is_file())
    else:
        files = [Path(data)]
    for file in files:
        if Path(data).is_dir() and data not in SOURCES:
            digest.update(f"{file.relative_to(data).as_posix()}\0{file.stat().st_size}\0".encode())
        with open_regular(file) as opened:
            while piece := opened.read(2**20):
                digest.update(piece)
    return digest.hexdigest()


def _of_folder(folder: str, split: str, image_size: int | tuple[int, int] | None, labelled: bool) -> Dataset:
    if parts_of(folder):
        if split == "all":
            return _joined([ImageFolder(folder, image_size, part) for part in ("train", "test")])
        return ImageFolder(folder, image_size, split)
    if not labelled and image_size is not None:
        return load_folder(folder, image_size)
    return _part(ImageFolder(folder, image_size), split if labelled else "all")


def _of_file(file: str, split: str, labelled: bool) -> Dataset:
    parts = read_parts(file, labelled)
    if "all" in parts:
        return _part(parts["all"], split if labelled else "all")
    return _joined(list(parts.values())) if split == "all" else parts[split]


def _part(whole: Dataset, split: str) -> Dataset:
    """Four fifths or one fifth of data that have no parts of their own."""
    if split == "all":
        return whole
    train, test = validation_split(whole, HELD_OUT)
    about = f"{whole.source}; a fifth of each class is the test set"
    return replace(train if split == "train" else test, split=split, source=about)


def _joined(parts: list[Dataset]) -> Dataset:
    """One data set after the other."""
    return replace(
        parts[0],
        split=" + ".join(part.split for part in parts),
        images=np.concatenate([part.images for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
    )
