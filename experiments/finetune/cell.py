"""One cell of the fine-tuning experiment: one method, one learning rate, one seed, trained and measured."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import lance_ref
from analysis.rules.account import WEIGHTED, account
from analysis.steps.net_choice import NetChoice, Normalise, Weights
from analysis.steps.nets import CannotRunError
from experiments.finetune.methods import Start, methods, prepare
from lance_ref import F, datasets
from lance_ref.datasets import Dataset
from lance_ref.nn.module import Module
from lance_ref.nn.selection import Tuning, learns, weighted_layers
from lance_ref.nn.subspace import as_whole
from lance_ref.stores import EXACT
from lance_ref.train.chunks import chunks_of
from lance_ref.train.features import frozen_stages, images_of, tail
from lance_ref.train.training import Features, StepInfo, evaluate, extract, fit

MAC_KINDS = ("forward", "grad_input", "grad_weight", "projection", "decomposition", "recompute")
TIMED_STEPS = 5
HELD_OUT = 0.1
"""Share of the training images on which learning rates are compared."""


def run(
    method: str,
    lr: float,
    epochs: int,
    batch: int,
    calibration_batches: int,
    clip: float | None,
    modes: Sequence[str],
    chunk: int | str | None = None,
    **values: Any,
) -> dict[str, Any]:
    """Train one network and measure what it took; all arguments are JSON, and so is the result.

    Methods that are given the same other arguments start from the same weights and see the same batches.

    Parameters
    ----------
    method : str
        One of :func:`experiments.finetune.methods.methods`.
    **values
        The fields of :class:`Setup`, and the settings of all methods by name.
    """
    setup = Setup.of(values)
    module, sources = setup.open()
    tuning = prepare(module, setup.tune, method)
    started = tail(module, sources[0].stage) if isinstance(sources[0], Features) else module
    batches = setup.calibration_batches(sources[0], batch, calibration_batches)
    began = time.perf_counter()
    with lance_ref.count_macs() as counter:
        notes = methods()[method].begin(Start(started, tuning, batches, tuple(modes), values, setup.seed))
    prepared = time.perf_counter() - began
    parts, x = methods()[method].parts, batches[0][0]
    chunk = max(1, batch // parts) if parts > 1 else chunk
    cost = measure_step(started, tuning, batches[0], chunks_of(started, x.shape[1:], x.dtype, batch, chunk).images)
    watch = Watch(tuning)
    taken: dict[str, Any] = {"normalise": setup.normalise, "image_size": setup.image_size}
    try:
        result = fit(
            module, sources[0], epochs=epochs, batch_size=batch, lr=lr, clip_norm=clip, seed=setup.seed,
            chunk=chunk, on_step=watch, progress=False, **taken,
        )  # fmt: skip
    except FloatingPointError as error:
        if not setup.validation:
            raise
        return {"accuracy": 0.0, "diverged": str(error)}  # a learning rate that is too large is not the best one
    watch.measure(StepInfo(result.steps, epochs - 1, result.steps, started, *batches[0]), "end")
    return {
        "accuracy": evaluate(module, sources[1], **taken),
        "images": len(sources[1]),
        "train_accuracy": result.history[-1]["train_accuracy"],
        "loss": [epoch["loss"] for epoch in result.history],
        "notes": notes,
        "calibration_macs": sum(counter.by_kind().values()),
        "seconds": {"preparing": prepared, **result.seconds},
        **cost,
        "cosines": watch.cosines,
        "energy_kept": watch.energies,
        "frozen_part": result.cache_note,
        "chunks": result.chunk_note,
    }


# ---- data and network --------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """Data and network of a cell.

    Attributes
    ----------
    net, data, tune : str
        A net as for :class:`~analysis.steps.net_choice.NetChoice`, data as for :func:`lance_ref.datasets.open_data`,
        and a selection of layers.
    image_size : int or None
        None: the data set's own.
    train_images, test_images : int or None
        Largest number of images, spread over the classes; None means all.
    validation : bool
        Train on nine tenths of the training images and report the accuracy on the rest, not on the test set; 0 for
        a training that diverged.
    folder : str
        Where the outputs of the frozen part are kept between cells; "" keeps none.
    channels : int or None
        Of the images; None: those that the net must have, else the data set's own.
    mean, std : tuple of float or None
        Of the normalisation; None: what the net was trained with, else pixel / 255.
    own : str or None
        What tells net and data of the user from others of the same name (:func:`experiments.frame.own_mark`).
    """

    net: str
    data: str
    tune: str
    seed: int
    image_size: int | None
    train_images: int | None
    test_images: int | None
    validation: bool = False
    folder: str = ""
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    own: str | None = None

    @classmethod
    def of(cls, cell: Mapping[str, Any]) -> Setup:
        """What the arguments of a cell say."""
        given: dict[str, Any] = {field.name: cell[field.name] for field in fields(cls) if field.name in cell}
        for name in ("mean", "std"):
            if given.get(name) is not None:
                given[name] = tuple(given[name])
        return cls(**given)

    @property
    def choice(self) -> NetChoice:
        return NetChoice(self.net)

    @property
    def normalise(self) -> Normalise:
        """The function from pixels to the net's input."""
        return self.choice.normalise(self.mean, self.std)[0]

    def images(self, split: str) -> Dataset:
        """The images of a split as they are stored, with the channels that the net takes."""
        limit = self.test_images if split == "test" else self.train_images
        channels = self.choice.channels if self.channels is None else self.channels
        return open_data(self.data, split, limit, self.image_size, channels)

    def input_shape(self, data: Dataset) -> tuple[int, int, int]:
        """(C, H, W) of what the net takes."""
        height, width, channels = data.images.shape[1:]
        return (channels, height, width) if self.image_size is None else (channels, self.image_size, self.image_size)

    def open(self) -> tuple[Module, list[Dataset | Features]]:
        """The tuned network, and training and test set after its frozen part.

        Held-out images are rows of the training set's outputs, so that these are computed once.
        """
        train = self.images("train")
        module, _ = self.network(train)  # where the outputs are cut: the same for all methods
        if self.validation:
            whole = self.after_frozen(module, train)
            return module, [_rows(whole, rows) for rows in _held_out(train.labels, self.seed)]
        test = self.images("test")
        return module, [self.after_frozen(module, each) for each in (train, test)]

    def network(self, train: Dataset) -> tuple[Module, Tuning]:
        """The net with the weights that it has, and a fresh head where the classes are others; tuned."""
        module, _ = self.made(train)
        module.train()
        return module, lance_ref.tune(module, self.tune)

    def made(self, train: Dataset) -> tuple[Module, Weights]:
        """The net, and where its weights came from."""
        try:
            return self.choice.make(train.num_classes, self.input_shape(train), self.seed)
        except CannotRunError as error:
            raise ValueError(
                f"{error}; --channels and --image-size say what the images of {self.data} become"
            ) from None

    def after_frozen(self, module: Module, data: Dataset) -> Dataset | Features:
        """The data set after the frozen part, from a file if one is kept; the images where nothing is frozen."""
        if not frozen_stages(module)[0]:
            return data
        path = None
        if self.folder:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            weights = "" if self.choice.pretrained is not None else f"seed {self.seed}"
            # the selection is where the network is cut
            title = f"{self.net} {weights} {data.name} {data.split} {len(data)} {self.image_size} {self.tune}"
            given = [self.channels, self.mean, self.std, self.own]
            if any(each is not None for each in given):
                title += f" {hashlib.sha256(repr(given).encode()).hexdigest()[:16]}"
            path = Path(self.folder) / f"{''.join(c if c.isalnum() else '_' for c in title)}.npy"
        return extract(module, data, self.normalise, self.image_size, path=path, progress=False)

    def calibration_batches(
        self, train: Dataset | Features, batch: int, count: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """As many batches as asked for, or as there are, in an order of their own."""
        check_batch(train, batch)
        order = np.random.default_rng((self.seed, 1)).permutation(len(train))
        chosen = [order[i * batch : (i + 1) * batch] for i in range(min(count, len(train) // batch))]
        if isinstance(train, Features):
            return [(train.arrays[rows], train.labels[rows]) for rows in chosen]
        return [images_of(train, rows, self.normalise, self.image_size) for rows in chosen]


def check_batch(train: Dataset | Features, batch: int) -> None:
    """Raise ValueError if there is no full batch."""
    if batch > len(train):
        raise ValueError(f"the training set has {len(train)} images, fewer than one batch of {batch}")


def prepare_data(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Open data and network of a cell, and run the frozen part, so that the cells find its outputs there.

    Returns
    -------
    dict
        For the results: where weights and images came from, and the normalisation.

    Raises
    ------
    ValueError, OSError
        If a name is unknown, a file is missing or damaged, or the data do not fit the network.
    """
    setup = Setup.of(cell)
    images = setup.images("train")
    _, weights = setup.made(images)
    train = setup.open()[1][0]
    check_batch(train, cell["batch"])
    if len(np.unique(train.labels)) < 2:
        raise ValueError(f"all images of {cell['data']!r} have one label, expected at least two classes")
    return {
        "weights": asdict(weights),
        "images": {
            "name": images.name,
            "source": images.source,
            "shape": list(images.images.shape[1:]),
            "count": len(images),
            "classes": images.num_classes,
            "sha256": datasets.checksum(setup.data),
        },
        "normalisation": setup.choice.normalise(setup.mean, setup.std)[1],
    }


def _held_out(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to compare on, the same share of every class."""
    order = np.random.default_rng((seed, 2)).permutation(len(labels))
    by_class = [order[labels[order] == c] for c in np.unique(labels)]
    held = np.sort(np.concatenate([rows[: max(1, round(HELD_OUT * len(rows)))] for rows in by_class]))
    return np.setdiff1d(np.arange(len(labels)), held), held


def _rows(data: Dataset | Features, rows: np.ndarray) -> Dataset | Features:
    if isinstance(data, Dataset):
        return data.subset(rows)
    return replace(data, arrays=np.asarray(data.arrays[rows]), labels=data.labels[rows], split=f"{data.split}, part")


@lru_cache(maxsize=4)  # a process runs many cells on the same images
def open_data(data: str, split: str, limit: int | None, image_size: int | None, channels: int | None) -> Dataset:
    """As :func:`lance_ref.datasets.open_data`, once."""
    return datasets.open_data(data, split, image_size, limit, channels)


# ---- measuring ---------------------------------------------------------------------------


def measure_step(
    net: Module, tuning: Tuning, batch: tuple[np.ndarray, np.ndarray], chunk: int | None = None
) -> dict[str, Any]:
    """One real step, predicted and measured: tape bytes, multiply-adds by kind; and its time against plain training.

    Of a step in equal chunks of images the tape is that of one of them, and the multiply-adds are those of all.
    """
    x, y = batch
    part = x if chunk is None else x[:chunk].copy()
    labels = y[: len(part)]
    layers = weighted_layers(net)
    states = {path: layer.store.state() for path, layer in layers.items()}
    net.zero_grad()
    with lance_ref.count_macs() as counter, lance_ref.record(net) as records:
        loss = F.cross_entropy(net(part), labels)
        tape = lance_ref.tape(loss)
        loss.backward()
    repeats = len(x) // len(part)
    bills = account(records, tuning.head)
    tuned = [bill for bill in bills if bill.record.op in WEIGHTED and bill.record.path in tuning.layers]
    ratio, seconds = _time_ratio(net, part, labels)
    net.zero_grad()
    for path, layer in layers.items():
        layer.store.load_state(states[path])
        layer.store.energy_kept = None
    return {
        "tape_bytes": tape.total_bytes,
        "predicted_tape_bytes": sum(bill.tape_bytes for bill in bills),
        "layer_bytes": {bill.record.path: bill.cost.paper_bytes for bill in tuned},
        "second_tape_bytes": max((bill.cost.second_tape_bytes for bill in bills), default=0),
        "paper_bytes": sum(bill.paper_bytes for bill in bills),
        "factor_bytes": sum(layer.store.factor_bytes for layer in layers.values()),
        "macs": {kind: repeats * count for kind, count in counter.by_kind().items() if kind in MAC_KINDS},
        "predicted_macs": {
            kind: repeats * sum(getattr(bill.cost, f"{kind}_macs") for bill in bills) for kind in MAC_KINDS
        },
        "time_ratio": ratio,
        "step_seconds": repeats * seconds,
    }


def _time_ratio(net: Module, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Median time of a step over that of plain backpropagation of the same layers, in turns; and the former."""
    stores = {layer: layer.store for layer in weighted_layers(net).values()}
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(TIMED_STEPS):
        for plain in (True, False):  # the stores come last, and stay
            for layer, store in stores.items():
                layer.store = EXACT if plain else store
            began = time.perf_counter()
            F.cross_entropy(net(x), y).backward()
            times[plain].append(time.perf_counter() - began)
    return median(times[False]) / median(times[True]), median(times[False])


class Watch:
    """How well the compressed weight gradients point, at the start, in the middle and at the end.

    Called before each step, and once more after the last; what it disturbs it puts back.

    Attributes
    ----------
    cosines : dict
        ``cosines[when][layer]`` = ⟨dW, dŴ⟩ / (‖dW‖ ‖dŴ‖) on the batch of that step.
    energies : dict
        ``energies[when][layer]`` = share of the activation's energy that the store keeps, where it says so.
    """

    def __init__(self, tuning: Tuning) -> None:
        self.layers = tuning.layers
        self.cosines: dict[str, dict[str, float]] = {}
        self.energies: dict[str, dict[str, float]] = {}

    def __call__(self, info: StepInfo) -> None:
        if info.step in (0, info.steps // 2):
            self.measure(info, "start" if info.step == 0 else "middle")

    def measure(self, info: StepInfo, when: str) -> None:
        """Cosines and energies of this batch, under ``when``."""
        modules = weighted_layers(info.net)
        watched = {
            path: modules[path] for path in self.layers if learns(modules[path]) and modules[path].store is not EXACT
        }
        if not watched:
            return
        stores = {path: layer.store for path, layer in watched.items()}
        states = {path: store.state() for path, store in stores.items()}
        compressed = _weight_gradients(info, watched)
        energies = {path: store.energy_kept for path, store in stores.items()}
        self.energies[when] = {path: float(e) for path, e in energies.items() if e is not None}
        for layer in watched.values():
            layer.store = EXACT
        with as_whole(info.net):  # the whole gradient, not the part of it that a subspace can follow
            exact = _weight_gradients(info, watched)
        for path, layer in watched.items():
            layer.store = stores[path]
            layer.store.load_state(states[path])
        lengths = {
            path: float(np.linalg.norm(exact[path])) * float(np.linalg.norm(compressed[path])) for path in watched
        }
        self.cosines[when] = {
            path: float(np.vdot(exact[path], compressed[path])) / length if length > 0 else 0.0
            for path, length in lengths.items()
        }


def _weight_gradients(info: StepInfo, layers: Mapping[str, Module]) -> dict[str, np.ndarray]:
    """The weight gradients of one batch; no gradient is left behind."""
    info.net.zero_grad()
    F.cross_entropy(info.net(info.x), info.y).backward()
    gradients = {path: _gradient(layer) for path, layer in layers.items()}
    info.net.zero_grad()
    return gradients


def _gradient(layer: Module) -> np.ndarray:
    """The gradient of the weight; where D trains, the weight gradient that follows from that of D."""
    if layer.update is None:
        gradient: np.ndarray = layer.weight.grad
        return gradient
    expanded: np.ndarray = layer.update.basis.expand(layer.update.weight.grad, layer.weight.shape)
    return expanded
