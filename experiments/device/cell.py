"""One cell of the device experiment: one method trained with the arithmetic of its program, or one program's RAM."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

import lance_ref
from analysis.steps.net_choice import NetChoice
from experiments.device.whole_maps import WholeMaps
from experiments.finetune.cell import Setup
from lance_ref import calibrate, datasets, device
from lance_ref.algebra.subspace import Subspace
from lance_ref.datasets import Dataset
from lance_ref.nn.module import Module
from lance_ref.nn.tracing import trace
from lance_ref.train.features import Features, tail

Sources = Sequence[np.ndarray]
"""What the frozen operations give for all images, (N, C, P) each."""
EVALUATED = 250
"""Images at a time where nothing is learned."""


def train(
    net: str,
    data: str,
    tune: str,
    method: str,
    directions: int | None,
    update: str,
    lr: float,
    seed: int,
    epochs: int,
    batch: int,
    image_size: int | None,
    train_images: int | None,
    test_images: int | None,
    calibration_batches: int,
    calibration_batch: int,
    validation: bool,
    folder: str,
    clip: float | None = None,
    **own: Any,
) -> dict[str, Any]:
    """Train with the arithmetic of a device program; all arguments are JSON, and so is the result.

    Parameters
    ----------
    net, data, tune : str
        Names of a model, a data set and a selection of layers.
    method : {"head", "bias", "bp", "lance"}
    directions : int or None
        Of LANCE, for each layer that has more channels.
    update : {"image", "batch"}
        Whether every image is an update, or the mean gradient of ``batch`` images.
    lr : float
        To start from; it falls to 0 along half a cosine.
    calibration_batches, calibration_batch : int
        Batches from which LANCE's directions come, and the images of each.
    validation : bool
        Train on nine tenths of the training images and report the accuracy on the rest; 0 if the training diverged.
    folder : str
        Where the outputs of the frozen part are kept between cells; "" keeps none.
    clip : float, optional
        Largest norm of the gradient of a batch. (With an update after every image the weights of a layer change before
        the gradients of earlier layers are known.)
    **own
        The further fields of :class:`~experiments.finetune.cell.Setup`.
    """
    given = {"net": net, "data": data, "tune": tune, "seed": seed, "image_size": image_size}
    given |= {"train_images": train_images, "test_images": test_images, "validation": validation, "folder": folder}
    setup = Setup.of({**given, **own})
    module, parts = _opened(setup)
    lance_ref.tune(module, tune)  # another cell of this process may have chosen otherwise
    part = tail(module, parts[0].stage) if isinstance(parts[0], Features) else module
    calibration = None
    if method == "lance":
        batches = setup.calibration_batches(parts[0], calibration_batch, calibration_batches)
        calibration = calibrate(part, batches, modes=("channel",), mean_free=True, progress=False)
        calibration = calibration.with_ranks({path: _ranks(calibration[path], directions) for path in calibration})
    first = next(_inputs(parts[0], setup))
    program = device.compile(part, calibration, first.shape[1:], update=update, method=method)
    maps = WholeMaps(program)
    began = time.perf_counter()
    sources = frozen_sources(maps, _inputs(parts[0], setup))
    prepared = time.perf_counter() - began
    began = time.perf_counter()
    step = 1 if update == "image" else batch
    try:
        losses = run(maps, sources, parts[0].labels, step, lr, epochs, seed, clip)
    except FloatingPointError as error:
        if not validation:
            raise
        return {"accuracy": 0.0, "diverged": str(error)}  # a learning rate that is too large is not the best one
    trained = time.perf_counter() - began
    return {
        "accuracy": evaluate(maps, _inputs(parts[1], setup), parts[1].labels),
        "images": len(parts[1]),
        "train_images": len(parts[0]),
        "updates": epochs * (len(parts[0]) // step),
        "loss": losses,
        "seconds": {"frozen": prepared, "training": trained},
    }


@lru_cache(maxsize=1)  # a process runs many cells on the same images
def _opened(setup: Setup) -> tuple[Module, list[Dataset | Features]]:
    return setup.open()


def evaluate(maps: WholeMaps, inputs: Iterator[np.ndarray], labels: np.ndarray) -> float:
    """The share of images whose class is predicted rightly."""
    answers = [maps.logits(maps.frozen(x)).argmax(0) for x in inputs]
    return float((np.concatenate(answers) == labels).mean())


def _ranks(space: Subspace, directions: int | None) -> tuple[int | None, ...]:
    """As many directions as asked for, or as the layer has beside its mean."""
    assert directions is not None
    features = space.shape[1]
    return (None, min(directions, features - 1), *(None,) * (len(space.shape) - 2))


def run(
    maps: WholeMaps,
    sources: Sources,
    labels: np.ndarray,
    batch: int,
    lr: float,
    epochs: int,
    seed: int,
    clip: float | None = None,
) -> list[float]:
    """Train on all images in an order of its own for each epoch; the mean loss of every epoch.

    An incomplete last batch is left out.

    Raises
    ------
    FloatingPointError
        If the loss is no finite number.
    """
    steps = len(labels) // batch
    losses = []
    with np.errstate(all="ignore"):  # reported below
        for epoch in range(epochs):
            order = np.random.default_rng((seed, 3, epoch)).permutation(len(labels))
            total = 0.0
            for i in range(steps):
                rows = order[i * batch : (i + 1) * batch]
                rate = lr * (1 + math.cos(math.pi * (epoch * steps + i) / (epochs * steps))) / 2
                loss = maps.step(_chosen(maps, sources, rows), labels[rows], rate, clip)
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss is {loss} in epoch {epoch}, expected a finite number")
                total += loss
            losses.append(total / steps)
        if not maps.is_finite():
            raise FloatingPointError(f"a weight is NaN or infinite after {epochs} epochs, expected finite numbers")
    return losses


def _chosen(maps: WholeMaps, sources: Sources, rows: np.ndarray) -> dict[int, np.ndarray]:
    """The maps (C, P, B) of some images."""
    if len(rows) == 1:
        return {number: array[rows[0]][..., None] for number, array in zip(maps.sources, sources, strict=True)}
    return {
        number: np.ascontiguousarray(array[rows].transpose(1, 2, 0))
        for number, array in zip(maps.sources, sources, strict=True)
    }


def frozen_sources(maps: WholeMaps, inputs: Iterator[np.ndarray]) -> list[np.ndarray]:
    """What the frozen operations give for all images, an image in each row: (N, C, P)."""
    chunks = [[array.transpose(2, 0, 1) for array in maps.frozen(x).values()] for x in inputs]
    return [np.ascontiguousarray(np.concatenate(one)) for one in zip(*chunks, strict=True)]


def _inputs(source: Dataset | Features, setup: Setup) -> Iterator[np.ndarray]:
    """What the trained part takes, some images at a time and always in the same order."""
    if isinstance(source, Features):
        yield from _chunks(source.arrays)
    else:
        taken: dict[str, Any] = {"normalise": setup.normalise, "image_size": setup.image_size}
        for x, _ in datasets.batches(source, EVALUATED, shuffle=False, **taken):
            yield x


def _chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), EVALUATED):
        yield np.asarray(rows[start : start + EVALUATED])


# ---- what a program of the whole network needs -------------------------------------------------------


def plan(
    net: str,
    classes: int,
    input_shape: Sequence[int],
    tune: str,
    method: str,
    directions: int | None,
    update: str,
    budget_kib: float | None,
    own: str | None = None,
) -> dict[str, Any]:
    """Compile a step of the whole network for images in bytes; what it takes depends on ranks, not on numbers.

    Parameters
    ----------
    classes : int
    input_shape : (C, H, W)
    budget_kib : float or None
        The program with the fewest multiply-adds that fits; None: the smallest arena.
    own : str, optional
        What tells a user's net from another of the same name; not looked at.

    Returns
    -------
    dict
        ``ram_bytes`` and more, or ``why`` it does not fit.
    """
    module = _plain(net, classes, tuple(input_shape))
    calibration = _random_calibration(module, tune, tuple(input_shape), directions) if method == "lance" else None
    budget = None if budget_kib is None else round(1024 * budget_kib)
    try:
        program = device.compile(
            module, calibration, tuple(input_shape), None if method == "head" else tune, update, budget, method=method
        )
    except device.BudgetError as error:
        return {"why": str(error)}
    said = program.describe()
    return {name: said[name] for name in _PLANNED}


def _plain(net: str, classes: int, input_shape: tuple[int, ...]) -> Module:
    """The network; of a built-in one with random weights."""
    return NetChoice(net).make(classes, input_shape, 0, pretrained=False)[0]


def _random_calibration(
    module: Module, selection: str, input_shape: tuple[int, ...], directions: int | None
) -> Mapping[str, Subspace]:
    """Random directions, as many for each layer as :func:`train` has."""
    tuned = lance_ref.tune(module, selection).layers
    records = [record for record in trace(module, (1, *input_shape)) if record.op in _WEIGHTED]
    shapes = {record.path: record.inputs[0].shape for record in records}
    rng = np.random.default_rng(0)
    found = {}
    for path in tuned:
        features = shapes[path][1]
        ranks = (None, min(directions or 0, features - 1), *(None,) * (len(shapes[path]) - 2))
        found[path] = Subspace.random(shapes[path], ranks, rng)
    return found


_WEIGHTED = ("conv2d", "linear")
_PLANNED = (
    "ram_bytes", "lower_bound_bytes", "ram", "flash_bytes", "tiled_segments", "tile", "tiles", "recomputed_macs",
)  # fmt: skip
