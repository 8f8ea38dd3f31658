"""Scenarios: sequences of tasks that are learned one after the other, each with its training and test images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lance_ref import datasets
from lance_ref.datasets import Dataset
from lance_ref.datasets.dataset import affine, spread, to_network
from lance_ref.train.features import Features

Channels = tuple[float, ...]

STATISTICS: dict[str, tuple[Channels, Channels]] = {
    "digits": ((0.3054,), (0.3753,)),
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4913, 0.4821, 0.4465), (0.2452, 0.2428, 0.2606)),
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "split100": ((0.4747, 0.4463, 0.3914), (0.2546, 0.2454, 0.2568)),
}
"""Mean and standard deviation of each channel of the training pixels, on a scale from 0 to 1."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Images of one task, as they are stored.

    Attributes
    ----------
    images : (N, ...) array, uint8 or float32
        Pixels (N, H, W, C), or features of a frozen part.
    labels : (N,) array, int64
        Classes of the task's head, from 0.
    permutation : (pixels,) array or None
        Order in which an image's numbers are read; the stored image is then a vector.
    """

    images: np.ndarray
    labels: np.ndarray
    permutation: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one stored image."""
        size = self.images.shape[1:]
        return size if self.permutation is None else (int(np.prod(size)),)

    @property
    def image_bytes(self) -> int:
        """Bytes of one stored image."""
        return int(np.prod(self.shape)) * self.images.itemsize

    def stored(self, indices: np.ndarray | slice) -> np.ndarray:
        """The images at these positions (B, ...), not yet normalised."""
        images = self.images[indices]
        if self.permutation is None:
            return images
        # packed: an index on the second axis alone leaves the images of a batch side by side, pixel by pixel
        return np.ascontiguousarray(images.reshape(len(images), -1)[:, self.permutation])  # (B, pixels)

    def limited(self, count: int | None) -> Samples:
        """The same samples, or ``count`` of them, spread over the classes; None means all."""
        if count is None or count >= len(self):
            return self
        chosen = spread(self.labels, count)
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])


@dataclass(frozen=True, eq=False)
class Task:
    """One task, answered by head number ``head`` of the network."""

    name: str
    train: Samples
    test: Samples
    head: int


@dataclass(frozen=True, eq=False)
class Scenario:
    """Tasks in the order in which they are learned.

    Attributes
    ----------
    heads : tuple of int
        Classes of each head: one head for each task, or a single shared one.
    convert : callable
        From stored images (B, ...) to what the network takes, float32.
    about : str
        Data, tasks and normalisation in a sentence.

    Raises
    ------
    ValueError
        If there are no tasks, a task is empty or has one class, a label is outside its head, or images differ in
        size; names the task.
    """

    name: str
    tasks: tuple[Task, ...]
    heads: tuple[int, ...]
    convert: Callable[[np.ndarray], np.ndarray]
    about: str

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError(f"scenario {self.name!r} has no tasks")
        shape = self.tasks[0].train.shape
        for task in self.tasks:
            if not 0 <= task.head < len(self.heads):
                raise ValueError(f"{self.name}, {task.name}: head is {task.head}, expected 0..{len(self.heads) - 1}")
            for split, samples in (("train", task.train), ("test", task.test)):
                self._check(f"{self.name}, {task.name} ({split})", samples, self.heads[task.head], shape)

    @staticmethod
    def _check(where: str, samples: Samples, classes: int, shape: tuple[int, ...]) -> None:
        labels = samples.labels
        if not len(samples):
            raise ValueError(f"{where} is empty, expected at least one image of each class")
        if labels.shape != (len(samples.images),) or labels.dtype != np.int64:
            raise ValueError(
                f"{where}: labels are {labels.shape} {labels.dtype}, expected ({len(samples.images)},) int64"
            )
        if samples.shape != shape:
            raise ValueError(f"{where}: images have shape {samples.shape}, those of the first task {shape}")
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(
                f"{where}: labels run from {labels.min()} to {labels.max()}, outside its head of {classes} classes"
            )
        if len(np.unique(labels)) < 2:
            raise ValueError(f"{where}: all labels are {labels[0]}, expected at least two classes")

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def shared_head(self) -> bool:
        """Whether all tasks are answered by one head."""
        return len(self.heads) == 1

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one image as the network takes it."""
        return tuple(self.convert(self.tasks[0].test.stored(slice(0, 1))).shape[1:])

    def limited(self, tasks: int | None = None, train: int | None = None, test: int | None = None) -> Scenario:
        """The first tasks, with a limited number of images each, spread over the classes; None means no limit."""
        if tasks is not None and not 1 <= tasks <= len(self):
            raise ValueError(f"tasks is {tasks}, but {self.name} has {len(self)}")
        chosen = self.tasks[:tasks]
        heads = self.heads if self.shared_head else self.heads[: len(chosen)]
        few = tuple(replace(task, train=task.train.limited(train), test=task.test.limited(test)) for task in chosen)
        return replace(self, tasks=few, heads=heads)


# ---- making them -------------------------------------------------------------------------


def split(name: str, train: Dataset, test: Dataset, tasks: int, statistics: tuple[Channels, Channels]) -> Scenario:
    """Consecutive classes, the same number in each task, one head for each.

    ``statistics`` are mean and standard deviation of each channel: x = (pixel/255 − mean) / std. ValueError if the
    classes, which must be those of both parts, cannot be divided so, or a task would be empty or have one class.
    """
    classes = train.num_classes
    if test.num_classes != classes or tasks < 1 or classes % tasks:
        raise ValueError(
            f"{name}: {classes} classes in train, {test.num_classes} in test, expected the same number, "
            f"a multiple of the {tasks} tasks"
        )
    width = classes // tasks
    made = []
    for t in range(tasks):
        first = t * width
        parts = []
        for data in (train, test):
            rows = np.flatnonzero((data.labels >= first) & (data.labels < first + width))
            parts.append(Samples(data.images[rows], data.labels[rows] - first))
        made.append(Task(f"classes {first}-{first + width - 1}", parts[0], parts[1], head=t))
    about = f"{train.name}, {tasks} tasks of {width} classes in their order, a head for each; {_about(statistics)}"
    return Scenario(name, tuple(made), (width,) * tasks, normaliser(statistics), about)


def permuted(
    name: str, train: Dataset, test: Dataset, tasks: int, statistics: tuple[Channels, Channels], seed: int = 0
) -> Scenario:
    """The same images in every task, their pixels in another order, and one head for all (see :func:`split`).

    The order of each task is drawn from (``seed``, task); that of task 0 is the identity.
    """
    if tasks < 1:
        raise ValueError(f"tasks is {tasks}, expected a positive integer")
    pixels = int(np.prod(train.images.shape[1:]))
    made = []
    for t in range(tasks):
        order = np.random.default_rng((seed, t)).permutation(pixels) if t else np.arange(pixels)
        parts = [Samples(data.images, data.labels, order) for data in (train, test)]
        made.append(Task(f"permutation {t}", parts[0], parts[1], head=0))
    about = f"{train.name}, {tasks} orders of the pixels, the first unchanged, one shared head; {_about(statistics)}"
    return Scenario(name, tuple(made), (train.num_classes,), normaliser(statistics), about)


def domains(name: str, features: Sequence[tuple[Features, Features]], classes: Sequence[int]) -> Scenario:
    """One data set after the other, seen through the same frozen part of a network; a head for each.

    ``features`` are (train, test) of :func:`lance_ref.train.features.extract` for each data set.
    """
    made = []
    for t, (train, test) in enumerate(features):
        parts = [Samples(np.asarray(part.arrays), part.labels) for part in (train, test)]
        made.append(Task(train.name, parts[0], parts[1], head=t))
    names = " -> ".join(task.name for task in made)
    about = f"{names}, through the frozen part of a network, a head for each; normalised as that network expects"
    return Scenario(name, tuple(made), tuple(classes), np.asarray, about)


def normaliser(statistics: tuple[Channels, Channels]) -> Callable[[np.ndarray], np.ndarray]:
    """x = (pixel/255 − mean) / std, float32.

    Images (B, H, W, C) become (B, C, H, W); vectors (B, n), of one channel, stay vectors.
    """
    scale, shift = affine(statistics, len(statistics[0]))

    def convert(stored: np.ndarray) -> np.ndarray:
        if stored.ndim == 2:
            return stored * scale[0, 0, 0] + shift[0, 0, 0]
        return to_network(stored, scale, shift)

    return convert


def _about(statistics: tuple[Channels, Channels]) -> str:
    mean, std = ("(" + ", ".join(f"{value:g}" for value in part) + ")" for part in statistics)
    return f"x = (pixel/255 - {mean}) / {std}"


# ---- by name -----------------------------------------------------------------------------

SPLITS = {
    # scenario: data set, tasks
    "split-digits": ("digits", 5),
    "split-mnist": ("mnist", 5),
    "split-cifar10": ("cifar10", 5),
    "split100": ("split100", 10),
    "split-cifar100": ("cifar100", 10),
}
PERMUTED = {"permuted-digits": ("digits", 5), "permuted-mnist": ("mnist", 10)}
DOMAINS = {"domains": ("eurosat", "cifar10", "flowers102")}


def names() -> list[str]:
    """The scenarios by name, those that need more than images (``domains``) included."""
    return [*SPLITS, *PERMUTED, *DOMAINS]


def load(name: str, seed: int = 0) -> Scenario:
    """A scenario of images by name, its pixels normalised with :data:`STATISTICS` of the data set's training images.

    The names are those of :data:`SPLITS` (5 tasks of 2 classes, or 10 tasks of 10) and :data:`PERMUTED` (5 or 10
    orders of the pixels, drawn from ``seed``). ValueError for another name; ``domains`` needs a network, see
    :func:`lance_ref.continual.networks.domains`. FileNotFoundError if the data set is not there.
    """
    if name not in SPLITS and name not in PERMUTED:
        raise ValueError(f"unknown scenario {name!r}, expected one of {', '.join([*SPLITS, *PERMUTED])}")
    data, tasks = SPLITS.get(name) or PERMUTED[name]
    train, test = (datasets.load(data, part) for part in ("train", "test"))
    if name in SPLITS:
        return split(name, train, test, tasks, STATISTICS[data])
    return permuted(name, train, test, tasks, STATISTICS[data], seed)
