"""A data set in memory, resizing, and batches as float arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from lance_ref.engine.random import as_generator

MAX_BYTES = 2 * 1024**3
"""Most bytes of pixels that one data set may take in memory."""

Normalise = Callable[[np.ndarray], np.ndarray] | tuple[Sequence[float], Sequence[float]] | None


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images with labels.

    Attributes
    ----------
    name : str
        What to call the data set in tables and figures, e.g. ``"CIFAR-10 (JPEG q75 copy)"``.
    split : str
        ``"train"``, ``"test"`` or, for a folder, ``"all"``.
    images : numpy.ndarray (N, H, W, C), uint8
        Pixels 0..255; C is 1 (grey), 3 (RGB) or any other number of channels.
    labels : numpy.ndarray (N,), int64
        Class index, a position in ``class_names``.
    source : str
        Where the images come from and under which terms.
    """

    name: str
    split: str
    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != np.uint8 or not self.images.shape[3]:
            raise ValueError(
                f"images has shape {self.images.shape} and dtype {self.images.dtype}, expected (N, H, W, C) uint8"
            )
        if self.labels.shape != (len(self.images),) or self.labels.dtype != np.int64:
            raise ValueError(
                f"labels has shape {self.labels.shape} and dtype {self.labels.dtype}, "
                f"expected ({len(self.images)},) int64"
            )
        if len(self.labels) and not (self.labels.min() >= 0 and self.labels.max() < len(self.class_names)):
            raise ValueError(
                f"labels run from {self.labels.min()} to {self.labels.max()}, expected 0..{len(self.class_names) - 1}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        N, H, W, C = self.images.shape
        return f"Dataset({self.name!r}, {self.split!r}, {N} images {H}x{W}x{C}, {len(self.class_names)} classes)"

    @property
    def num_classes(self) -> int:
        """Number of classes, also of those without an image here."""
        return len(self.class_names)

    def subset(self, indices: np.ndarray | Sequence[int]) -> Dataset:
        """The images at these positions, in this order."""
        positions = np.asarray(indices, dtype=np.int64)
        return dataclasses.replace(self, images=self.images[positions], labels=self.labels[positions])


def spread(labels: np.ndarray, limit: int | None) -> np.ndarray:
    """Positions of ``limit`` items, spread over the classes as evenly as they allow, ascending.

    Takes the first item of every class, then the second of every class, and so on.

    >>> spread(np.array([0, 0, 0, 1, 1, 2]), 4).tolist()
    [0, 1, 3, 5]
    """
    if limit is None:
        return np.arange(len(labels))
    if not isinstance(limit, (int, np.integer)) or isinstance(limit, bool) or limit < 1:
        raise ValueError(f"limit is {limit!r}, expected a positive integer or None")
    by_class = np.argsort(labels, kind="stable")
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank = np.empty(len(labels), dtype=np.int64)  # how many of the same class came before
    rank[by_class] = np.arange(len(labels)) - np.repeat(starts, counts)
    return np.sort(np.lexsort((labels, rank))[:limit])


def validation_split(dataset: Dataset, fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Set a part of a data set aside, the same share of every class; gives the parts to train and to validate on.

    ``fraction``, between 0 and 1, is of each class, rounded to whole images; a class of two images or more keeps one
    on either side, a single image stays with the training part. ``seed`` decides which images. ValueError if nothing
    would be set aside.

    Examples
    --------
    >>> from lance_ref.datasets import load_digits
    >>> [len(part) for part in validation_split(load_digits("test", limit=40), 0.25)]
    [30, 10]
    """
    number = isinstance(fraction, (int, float, np.integer, np.floating)) and not isinstance(fraction, bool)
    if not number or not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction!r}, expected a number between 0 and 1")
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed is {seed!r}, expected an integer of at least 0")
    rng = np.random.default_rng(seed)
    aside = np.zeros(len(dataset), dtype=bool)
    for label in np.unique(dataset.labels):
        members = np.flatnonzero(dataset.labels == label)
        if len(members) > 1:
            count = min(max(1, int(fraction * len(members) + 0.5)), len(members) - 1)
            aside[rng.permutation(members)[:count]] = True
    if not aside.any():
        raise ValueError(f"{dataset.name} has {len(dataset)} image(s), one a class: nothing can be set aside")
    validation = dataclasses.replace(dataset.subset(np.flatnonzero(aside)), split="validation")
    return dataset.subset(np.flatnonzero(~aside)), validation


def size_pair(image_size: int | Sequence[int]) -> tuple[int, int]:
    """``image_size`` as (height, width)."""
    size = tuple(image_size) if isinstance(image_size, Sequence) else (image_size, image_size)
    if len(size) != 2 or any(not isinstance(n, (int, np.integer)) or isinstance(n, bool) or n < 1 for n in size):
        raise ValueError(f"image_size is {image_size!r}, expected a positive integer or (height, width)")
    return int(size[0]), int(size[1])


def check_memory(count: int, size: tuple[int, int], channels: int) -> None:
    """Raise ValueError if that many images of that size are more than :data:`MAX_BYTES`."""
    total = count * size[0] * size[1] * channels
    if total > MAX_BYTES:
        raise ValueError(
            f"{count} images of {size[0]}x{size[1]}x{channels} take {total} bytes, more than {MAX_BYTES}; "
            "give a limit, or leave image_size to batches(), which resizes one batch at a time"
        )


def resize(images: np.ndarray, image_size: int | Sequence[int]) -> np.ndarray:
    """Resize uint8 (N, H, W, C) with PIL's bilinear filter, which averages when it makes images smaller.

    ``image_size`` is an int or (height, width); images that have that size already are given back themselves.
    """
    if images.ndim != 4 or images.dtype != np.uint8 or not images.shape[3]:
        raise ValueError(f"images has shape {images.shape} and dtype {images.dtype}, expected (N, H, W, C) uint8")
    height, width = size_pair(image_size)
    if images.shape[1:3] == (height, width):
        return images
    from PIL import Image

    check_memory(len(images), (height, width), images.shape[3])
    result = np.empty((len(images), height, width, images.shape[3]), dtype=np.uint8)
    # PIL knows pictures of one and of three channels; of others each channel is a picture of its own
    groups = [slice(0, 3)] if images.shape[3] == 3 else [slice(c, c + 1) for c in range(images.shape[3])]
    for image, out in zip(images, result, strict=True):
        for of in groups:
            picture = Image.fromarray(image if len(groups) == 1 and of.stop == 3 else image[:, :, of.start])
            resized = picture.resize((width, height), Image.Resampling.BILINEAR)
            out[:, :, of] = np.asarray(resized).reshape(height, width, -1)
    return result


def to_channels(images: np.ndarray, channels: int | None) -> np.ndarray:
    """The images (N, H, W, C) with another number of channels; ``None`` leaves them alone.

    One channel is the mean of those that there are. More than there are repeat them from the first on; fewer are the
    first ones.
    """
    if channels is None or channels == images.shape[3]:
        return images
    if not isinstance(channels, (int, np.integer)) or isinstance(channels, bool) or channels < 1:
        raise ValueError(f"channels is {channels!r}, expected a positive integer or None")
    if channels == 1:
        grey = np.empty((*images.shape[:3], 1), np.uint8)
        for start in range(0, len(images), 1024):  # the means are float64 for a moment
            np.rint(
                images[start : start + 1024].mean(axis=3, keepdims=True),
                out=grey[start : start + 1024],
                casting="unsafe",
            )
        return grey
    return images[..., np.arange(channels) % images.shape[3]]


def batches(
    dataset: Dataset,
    batch_size: int,
    rng: int | np.random.Generator | None = None,
    shuffle: bool = True,
    drop_last: bool = True,
    normalise: Normalise = None,
    image_size: int | Sequence[int] | None = None,
    channels: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One pass over a data set in batches x (B, C, H, W) float32 and y (B,) int64, ready for a network.

    Parameters
    ----------
    batch_size : int
        Images a batch, at least 1.
    rng : int, numpy.random.Generator or None
        Seed or generator of the order. The same seed gives the same order each time; one Generator in
        successive calls gives a new order in each epoch, and so does None, the library's default
        generator (:func:`lance_ref.manual_seed`).
    shuffle : bool
        False keeps the data set's own order (for files: sorted by class).
    drop_last : bool
        Leave out a last batch that is smaller than ``batch_size``.
    normalise : callable, (mean, std) or None
        A callable takes uint8 (B, H, W, C) to float32 (B, C, H, W), e.g. ``models.preprocess``.
        A pair gives (pixel/255 − mean) / std for each channel. None gives pixel/255.
    image_size : int or (height, width), optional
        Resize each batch, bilinearly, when it is its turn.
    channels : int, optional
        As of :func:`to_channels`: 3 repeats a grey channel.

    Raises
    ------
    ValueError
        If an argument is out of range, or no batch would come out.
    """
    if not isinstance(batch_size, (int, np.integer)) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}, expected a positive integer")
    if not len(dataset) or (drop_last and batch_size > len(dataset)):
        raise ValueError(
            f"batch_size is {batch_size}, but {dataset.name} ({dataset.split}) has {len(dataset)} images: no full batch"
        )
    if image_size is not None:
        size_pair(image_size)
    to_channels(dataset.images[:0], channels)
    if callable(normalise):
        convert = normalise
    else:
        scale, shift = affine(normalise, channels or dataset.images.shape[3])
        convert = partial(to_network, scale=scale, shift=shift)
    order = as_generator(rng).permutation(len(dataset)) if shuffle else np.arange(len(dataset))
    stop = len(dataset) - len(dataset) % batch_size if drop_last else len(dataset)

    def run() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, stop, batch_size):
            chosen = order[start : start + batch_size]
            images = to_channels(dataset.images[chosen], channels)  # (B, H, W, C)
            if image_size is not None:
                images = resize(images, image_size)
            yield convert(images), dataset.labels[chosen]

    return run()


def affine(normalise: tuple[Sequence[float], Sequence[float]] | None, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift, each (C, 1, 1) float32, so that scale·pixel + shift = (pixel/255 − mean) / std."""
    if normalise is None:
        mean, std = np.zeros(channels), np.ones(channels)
    else:
        try:
            mean, std = (np.broadcast_to(np.asarray(part, dtype=np.float64), channels) for part in normalise)
        except (TypeError, ValueError):
            raise ValueError(
                f"normalise is {normalise!r}, expected a callable or (mean, std) with {channels} number(s) each"
            ) from None
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
            raise ValueError(f"normalise is {normalise!r}, expected finite means and positive standard deviations")
    return (1 / (255 * std)).astype(np.float32)[:, None, None], (-mean / std).astype(np.float32)[:, None, None]


def to_network(images: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """uint8 (B, H, W, C) to float32 (B, C, H, W): scale·pixel + shift."""
    pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)
    result: np.ndarray = pixels * scale + shift
    return result
