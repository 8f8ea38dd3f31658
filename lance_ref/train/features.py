"""The frozen first part of a network, run once: its outputs in memory or in a file, in place of the images.

Where only the last layers train and images are not changed at random, everything before the first
trained layer computes the same at every epoch. A network says where it can be cut by ``stages()``: a
list of functions whose composition is ``forward``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lance_ref import nn
from lance_ref.datasets import Dataset, batches
from lance_ref.datasets.dataset import Normalise
from lance_ref.engine.autograd import no_grad
from lance_ref.engine.tensor import Tensor
from lance_ref.io.npz import digest
from lance_ref.io.progress import progress_bar
from lance_ref.nn.module import Module
from lance_ref.train.features_file import Rows, stored

ImageSize = int | Sequence[int] | None

FORMAT = 1
SPOT_CHECK = 2  # images whose features are compared with those in a file before it is used


@dataclass(frozen=True, eq=False)
class Features:
    """Outputs of the first stages of a network for all images of a data set; made by :func:`extract`.

    Attributes
    ----------
    arrays : numpy.ndarray (N, ...)
        Output of the frozen stages in the network's dtype, float32 as a rule; memory-mapped if it has a file.
    stage : int
        How many stages were run.
    name, split : str
        Of the data set.
    part, fingerprint : str
        SHA-256 of those stages and their weights, and of all that determines ``arrays``.
    """

    arrays: np.ndarray
    labels: np.ndarray
    num_classes: int
    stage: int
    name: str
    split: str
    part: str
    fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.arrays.shape[1:]))
        return f"Features({self.name!r}, {self.split!r}, {len(self)} of {shape} after stage {self.stage})"


class Part(Module):
    """Some consecutive stages of a network as a network of its own, with the same layers under the same paths.

    Parameters, buffers and children are the network's own, not copies, and so is any other attribute that is
    read. Only ``forward`` differs.
    """

    def __init__(self, net: Module, stages: Sequence[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        own: dict[str, Any] = self.__dict__
        own.update(_net=net, _stages=tuple(stages), training=net.training)
        own.update({name: vars(net)[name] for name in ("_parameters", "_modules", "_buffers")})

    def forward(self, x: Tensor) -> Tensor:
        for stage in self._stages:
            x = stage(x)
        return x

    def named_modules(self, prefix: str = "", _seen: set[int] | None = None) -> Iterator[tuple[str, Module]]:
        seen = set() if _seen is None else _seen
        if id(self) not in seen:
            seen.add(id(self))
            yield prefix, self
            yield from ((path, module) for path, module in self._net.named_modules(prefix, seen) if path != prefix)

    def _child(self, name: str) -> Module | None:
        child: Module | None = self._net._child(name)
        return child

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_net"], name)


def stages_of(net: Module) -> list[Any]:
    """What ``net.stages()`` gives, or an empty list if it has none."""
    if not hasattr(net, "stages"):
        return []
    stages = net.stages()
    if not isinstance(stages, (list, tuple)):
        raise TypeError(
            f"stages() of the {type(net).__name__} gives a {type(stages).__name__}, expected a list of modules"
        )
    return list(stages)


def tail(net: Module, stage: int) -> Part:
    """What follows the first ``stage`` stages: takes features where ``net`` takes images."""
    return Part(net, stages_of(net)[stage:])


def frozen_stages(net: Module) -> tuple[int, str]:
    """The number of leading stages that give the same output at every epoch, and why the next one does not.

    A stage counts if no parameter in it trains, and if it holds neither dropout nor a batch norm that
    uses the statistics of the batch in training mode. A stage that is no :class:`~lance_ref.nn.Module` does not
    count, as it cannot be seen what it holds; nor does one with a hook, which has to be called at every step.
    Of random numbers only those of :class:`~lance_ref.nn.Dropout` are noticed.

    The number is 0 also if the frozen stages hold no parameters, as it is not worth while then. The reason is a clause
    for "not cached: ...".
    """
    stages = stages_of(net)
    if not stages:
        return 0, f"{type(net).__name__} has no stages()"
    if net._pre_hooks:
        return 0, "there is a hook on the network"
    reasons = [_changes(stage) for stage in stages]
    count = next((position for position, reason in enumerate(reasons) if reason), len(stages))
    why = f"stage {count} {reasons[count]}" if count < len(stages) else "no stage trains"
    if not any(True for stage in stages[:count] for _ in stage.parameters()):
        count = 0
    return count, why


def _changes(stage: Any) -> str | None:
    """Why the output of a stage may change at the next epoch."""
    if not isinstance(stage, Module):
        return "is a function, which may hold anything"
    if any(parameter.requires_grad for parameter in stage.parameters()):
        return "trains"
    for module in stage.modules():
        if module._pre_hooks:
            return "has a hook"
        if isinstance(module, nn.Dropout) and module.p > 0:
            return "has dropout"
        if isinstance(module, nn.BatchNorm2d) and not (module.frozen and module.track_running_stats):
            return "has a batch norm that uses the statistics of the batch"
    return None


def extract(
    net: Module,
    dataset: Dataset,
    normalise: Normalise = None,
    image_size: ImageSize = None,
    batch_size: int = 100,
    path: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Features:
    """Run the frozen first stages of a network once over a data set.

    Parameters
    ----------
    net : Module
        With ``stages()``; what is frozen is decided by :func:`lance_ref.tune` or ``requires_grad_`` beforehand.
        Left as it was found.
    normalise, image_size
        As for :func:`lance_ref.datasets.batches`; ``normalise`` must give the same at each call.
    batch_size : int
        Images at a time; it may change the last bits.
    path : path, optional
        A ``.npy`` file to write the arrays to, and to map into memory; what it was made of is written beside
        it, with ``.json`` added to its name. If the file is there and was made of the same, it is not made again.
    progress : bool, optional
        Show a bar; by default if standard error is a terminal.

    Raises
    ------
    ValueError
        If there is nothing frozen to run, or the network does not take the images.
    OSError
        If the file cannot be written. No part of it is left then.

    Examples
    --------
    >>> import lance_ref
    >>> from lance_ref import datasets, models
    >>> net = models.create("convnet", in_channels=1, rng=0)
    >>> tuning = lance_ref.tune(net, "last:1")  # conv3, and the head
    >>> extract(net, datasets.load("digits", "test"))
    Features('digits', 'test', 360 of 32x2x2 after stage 2)
    """
    stage, why = frozen_stages(net)
    if not stage:
        raise ValueError(f"there is no frozen part to run once: {why}")
    if not len(dataset):
        raise ValueError(f"{dataset.name} ({dataset.split}) has no images")
    if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}, expected a positive integer")
    part = part_digest(net, stage)
    fingerprint = digest(
        {
            "format, stage, part, data": np.array([str(FORMAT), str(stage), part, data_digest(dataset)]),
            "image size": np.array(repr(image_size)),
            "sample": sample_of(dataset, normalise, image_size),
        }
    )

    outputs = partial(_outputs, net, stage, normalise=normalise, image_size=image_size)
    rows = partial(outputs, dataset, batch_size=batch_size, progress=progress)
    if path is None:
        arrays = _in_memory(rows(), len(dataset))
    else:
        check = outputs(dataset.subset(range(min(SPOT_CHECK, len(dataset)))), batch_size=1)
        arrays = stored(Path(path), fingerprint, np.concatenate(list(check)), len(dataset), rows)
    return Features(arrays, dataset.labels, dataset.num_classes, stage, dataset.name, dataset.split, part, fingerprint)


def _outputs(
    net: Module,
    stage: int,
    dataset: Dataset,
    normalise: Normalise,
    image_size: ImageSize,
    batch_size: int,
    progress: bool | None = False,
) -> Rows:
    """The first stages' output for consecutive images: what they give in training, to rounding."""
    body = Part(net, stages_of(net)[:stage])
    title = f"frozen part, {dataset.name} {dataset.split}"
    with progress_bar(title, len(dataset), progress) as advance:
        for start in range(0, len(dataset), batch_size):
            indices = np.arange(start, min(start + batch_size, len(dataset)))
            x, _ = images_of(dataset, indices, normalise, image_size)
            with in_mode(net, training=False), no_grad():  # not across the yield: others run meanwhile
                output = body(x.astype(dtype_of(net), copy=False)).data
            yield output
            advance(len(indices), "")


def _in_memory(rows: Rows, count: int) -> np.ndarray:
    """All rows in one array."""
    with closing(rows):
        first = next(rows)
        arrays = np.empty((count, *first.shape[1:]), first.dtype)
        stop = len(first)
        arrays[:stop] = first
        for chunk in rows:
            arrays[stop : stop + len(chunk)] = chunk
            stop += len(chunk)
    return arrays


# ---- what fit() uses too --------------------------------------------------------------------


def images_of(
    dataset: Dataset, indices: np.ndarray, normalise: Normalise, image_size: ImageSize
) -> tuple[np.ndarray, np.ndarray]:
    """These images as one batch: x (B, C, H, W) and y (B,)."""
    chosen = dataset.subset(indices)
    return next(batches(chosen, len(indices), shuffle=False, normalise=normalise, image_size=image_size))


def sample_of(dataset: Dataset, normalise: Normalise, image_size: ImageSize, count: int = 4) -> np.ndarray:
    """The first images of the data, prepared as the network takes them."""
    return images_of(dataset, np.arange(min(count, len(dataset))), normalise, image_size)[0]


def part_digest(net: Module, stage: int) -> str:
    """SHA-256 of the first ``stage`` stages: what they are made of, and all parameters and buffers."""
    arrays: dict[str, np.ndarray] = {}
    for position, module in enumerate(stages_of(net)[:stage]):
        arrays[f"{position}"] = np.array(repr(module))
        arrays.update((f"{position}.{name}", array) for name, array in module.state_dict().items())
    return digest(arrays)


def data_digest(dataset: Dataset) -> str:
    """SHA-256 of name, split, pixels and labels."""
    name = np.array([dataset.name, dataset.split])
    return digest({"name, split": name, "images": dataset.images, "labels": dataset.labels})


def dtype_of(net: Module) -> np.dtype[Any]:
    """The dtype of the network's first parameter; float32 without parameters."""
    return next((np.dtype(parameter.dtype) for parameter in net.parameters()), np.dtype(np.float32))


@contextmanager
def in_mode(net: Module, training: bool) -> Iterator[None]:
    """Training or evaluation mode inside the ``with`` block; afterwards every module is in its own again."""
    modes = [(module, module.training) for module in net.modules()]
    net.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def mixed_batches(count: int, batch_size: int) -> list[np.ndarray]:
    """Positions 0 … count − 1 in equal batches of at most ``batch_size``, in an order that is always the same.

    For evaluation. The order mixes the classes: where batch norm keeps no running statistics, an answer depends on its
    batch, and in a batch of one class, as images that are stored class by class would make, nothing is left of what
    tells the classes apart.
    """
    order = np.random.default_rng(0).permutation(count)
    return np.array_split(order, -(-count // batch_size))
