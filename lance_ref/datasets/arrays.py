"""The user's own arrays: a ``.npz`` file with images and labels under documented names."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lance_ref.datasets.dataset import MAX_BYTES, Dataset
from lance_ref.io.npz import load_npz

KEYS = "x_train, y_train, x_test and y_test, or x and y; class_names if there are names"
MAX_CLASSES = 100_000


def load_arrays(path: str | Path, split: str | None = None, labelled: bool = True) -> Dataset:
    """Images and labels of a ``.npz`` file, without pickles, its sizes compared with the file before any allocation.

    The file holds :data:`KEYS`. Images are pixels, uint8 (N, H, W) or (N, H, W, C) with any number of channels, which
    come last. Labels are integers (N,), from 0 to the number of classes − 1. ``class_names`` (classes,) is text;
    without it the classes are called 0, 1, and so on, up to the largest label of both parts.

    Parameters
    ----------
    split : {"train", "test"}, optional
        Needed where the file has ``x_train`` and ``x_test``, and not allowed where it has ``x``; the result's split is
        then ``"all"``.
    labelled : bool
        Whether labels are needed. False gives label 0 to images without any.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, larger than :data:`~lance_ref.datasets.dataset.MAX_BYTES` in memory, lacks an array, or an
        array has another dtype or shape; names the file and the array.

    Examples
    --------
    ``numpy.savez("data.npz", x_train=..., y_train=..., x_test=..., y_test=...)`` writes such a file.
    """
    parts = read_parts(path, labelled)
    wanted = "all" if split is None else split
    if wanted not in parts:
        has = "x, which has no parts" if "all" in parts else "x_train and x_test"
        raise ValueError(f"{path}: has {has}, but split is {split!r}")
    return parts[wanted]


def read_parts(path: str | Path, labelled: bool = True) -> dict[str, Dataset]:
    """All parts of a file of arrays: ``train`` and ``test``, or ``all``; see :func:`load_arrays`."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file of arrays")
    arrays = load_npz(file, max_bytes=MAX_BYTES)
    parts = ["train", "test"] if {"x_train", "x_test", "y_train", "y_test"} & set(arrays) else ["all"]
    named = {part: ("x", "y") if part == "all" else (f"x_{part}", f"y_{part}") for part in parts}
    missing = [name for part in parts for name in named[part][: 2 if labelled else 1] if name not in arrays]
    if missing:
        raise ValueError(f"{file}: has no array {', '.join(map(repr, missing))}, expected {KEYS}")
    images = {part: _images(file, x, arrays) for part, (x, _) in named.items()}
    labels = {part: _labels(file, y, arrays, len(images[part])) for part, (_, y) in named.items()}
    shapes = {of.shape[1:] for of in images.values()}
    if len(shapes) > 1:
        raise ValueError(f"{file}: images of the parts have shapes {sorted(shapes)}, expected one shape (H, W, C)")
    names = _class_names(file, arrays, 1 + max(int(of.max()) for of in labels.values()))
    return {part: Dataset(file.stem, part, images[part], labels[part], names, f"file {file}") for part in parts}


def _images(file: Path, name: str, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """(N, H, W, C) uint8."""
    x = arrays[name]
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or not x.size:
        hint = "; numbers that are no pixels are scaled to 0..255 before they are saved" if x.dtype.kind == "f" else ""
        raise ValueError(
            f"{file}: {name} has shape {x.shape} and dtype {x.dtype}, expected uint8 (N, H, W) or (N, H, W, C){hint}"
        )
    return x[..., None] if x.ndim == 3 else x


def _labels(file: Path, name: str, arrays: dict[str, np.ndarray], count: int) -> np.ndarray:
    """(N,) int64; zeros where there are none."""
    if name not in arrays:
        return np.zeros(count, np.int64)
    y = arrays[name]
    if y.shape != (count,) or y.dtype.kind not in "iu":
        raise ValueError(f"{file}: {name} has shape {y.shape} and dtype {y.dtype}, expected integers ({count},)")
    if int(y.min()) < 0 or int(y.max()) >= MAX_CLASSES:
        raise ValueError(
            f"{file}: {name} runs from {y.min()} to {y.max()}, expected labels from 0 to the number of classes - 1"
        )
    return y.astype(np.int64)


def _class_names(file: Path, arrays: dict[str, np.ndarray], least: int) -> tuple[str, ...]:
    if "class_names" not in arrays:
        return tuple(map(str, range(least)))
    names = arrays["class_names"]
    if names.ndim != 1 or names.dtype.kind != "U" or len(names) < least:
        raise ValueError(
            f"{file}: class_names has shape {names.shape} and dtype {names.dtype}, expected text of at least {least}"
        )
    return tuple(map(str, names))
