"""One cell of the fine-tuning experiment: one method, one learning rate, one seed, trained and measured."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import lance_ref
from analysis.rules.account import WEIGHTED, Billed, account
from experiments.finetune.methods import Start, methods, prepare
from lance_ref import F, datasets, models
from lance_ref.datasets import Dataset
from lance_ref.nn.module import Module
from lance_ref.nn.selection import Tuning, weighted_layers
from lance_ref.stores import EXACT
from lance_ref.train.features import frozen_stages, tail
from lance_ref.train.training import Features, StepInfo, evaluate, extract, fit

MAC_KINDS = ("forward", "grad_input", "grad_weight", "projection", "decomposition", "recompute")
TIMED_STEPS = 5
HELD_OUT = 0.1
"""Share of the training images on which learning rates are compared."""


def run(
    net: str,
    data: str,
    tune: str,
    method: str,
    lr: float,
    seed: int,
    epochs: int,
    batch: int,
    image_size: int | None,
    train_images: int | None,
    test_images: int | None,
    calibration_batches: int,
    clip: float | None,
    epsilon: float,
    modes: Sequence[str],
    budget_kib: float,
    validation: bool,
    folder: str,
    **values: Any,
) -> dict[str, Any]:
    """Train one network and measure what it took; all arguments are JSON, and so is the result.

    Methods that are given the same other arguments start from the same weights and see the same batches.

    Parameters
    ----------
    net, data, tune, method : str
        Names of a model, a data set, a selection of layers, and one of :func:`experiments.finetune.methods.methods`.
    image_size : int or None
        None: the data set's own.
    train_images, test_images : int or None
        At most so many, spread over the classes; None: all.
    budget_kib : float
        KiB of cores, for methods with a budget.
    validation : bool
        Train on nine tenths of the training images and report the accuracy on the rest, not on the test set; 0 for
        a training that diverged.
    folder : str
        Where the outputs of the frozen part are kept between cells; "" keeps none.
    **values
        Of the other settings of methods, by name.
    """
    module, sources = data_and_network(
        net, data, tune, seed, image_size, train_images, test_images, validation, folder
    )  # fmt: skip
    tuning = prepare(module, tune, method)
    started = tail(module, sources[0].stage) if isinstance(sources[0], Features) else module
    batches = calibration_batches_of(sources[0], batch, calibration_batches, seed, net, image_size)
    values |= {"epsilon": epsilon, "budget_kib": budget_kib}
    began = time.perf_counter()
    with lance_ref.count_macs() as counter:
        notes = methods()[method].begin(Start(started, tuning, batches, tuple(modes), values, seed))
    prepared = time.perf_counter() - began
    parts = methods()[method].parts
    micro = max(1, batch // parts) if parts > 1 else None
    cost = measure_step(started, tuning, batches[0], micro)
    watch = Watch(tuning)
    try:
        result = fit(
            module, sources[0], epochs=epochs, batch_size=batch, lr=lr, clip_norm=clip, seed=seed, micro_batch=micro,
            on_step=watch, progress=False, normalise=models.preprocessing(net), image_size=image_size,
        )  # fmt: skip
    except FloatingPointError as error:
        if not validation:
            raise
        return {"accuracy": 0.0, "diverged": str(error)}  # a learning rate that is too large is not the best one
    last = StepInfo(result.steps, epochs - 1, result.steps, started, *batches[0])
    watch.measure(last, "end")
    accuracy = evaluate(module, sources[1], normalise=models.preprocessing(net), image_size=image_size)
    return {
        "accuracy": accuracy,
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
    }


# ---- data and network --------------------------------------------------------------------


def prepare_data(cell: Mapping[str, Any]) -> None:
    """Open data and network of a cell, and run the frozen part, so that the cells find its outputs there.

    Raises
    ------
    ValueError, OSError
        If a name is unknown, a file is missing or damaged, or the data do not fit the network.
    """
    names = ("net", "data", "tune", "seed", "image_size", "train_images", "test_images", "validation", "folder")
    _, sources = data_and_network(**{name: cell[name] for name in names})
    if cell["batch"] > len(sources[0]):
        raise ValueError(f"the training set has {len(sources[0])} images, fewer than one batch of {cell['batch']}")
    if len(np.unique(sources[0].labels)) < 2:
        raise ValueError(f"all images of {cell['data']!r} have one label, expected at least two classes")


def data_and_network(
    net: str,
    data: str,
    tune: str,
    seed: int,
    image_size: int | None,
    train_images: int | None,
    test_images: int | None,
    validation: bool,
    folder: str,
) -> tuple[Module, list[Dataset | Features]]:
    """The tuned network, and training and test set after its frozen part.

    Held-out images are rows of the training set's outputs, so that these are computed once.
    """
    train = open_data(data, "train", train_images, image_size)
    module = _network(net, train, seed)
    lance_ref.tune(module, tune)  # where the outputs are cut: the same for all methods
    if validation:
        whole = _features(module, train, net, seed, image_size, folder, tune)
        return module, [_rows(whole, rows) for rows in _held_out(train.labels, seed)]
    test = open_data(data, "test", test_images, image_size)
    return module, [_features(module, each, net, seed, image_size, folder, tune) for each in (train, test)]


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
def open_data(data: str, split: str, limit: int | None, image_size: int | None) -> Dataset:
    """A data set by name, or a folder of the user's own pictures with ``train/`` and ``test/`` inside."""
    if data not in datasets.names() and Path(data).is_dir():
        return datasets.ImageFolder(data, image_size, split=split, limit=limit)
    return datasets.load(data, split, limit=limit)


def _network(net: str, train: Dataset, seed: int) -> Module:
    """The model with its pretrained weights where there are some, and a fresh head."""
    options: dict[str, Any] = {"num_classes": train.num_classes, "rng": seed}
    _, height, width, channels = train.images.shape
    if models.find(net).weights is not None:
        options["pretrained"] = True
    else:
        options |= models.find(net).options_for((channels, height, width))
    module = models.create(net, **options)
    module.train()
    return module


def _features(
    module: Module, data: Dataset, net: str, seed: int, image_size: int | None, folder: str, tune: str
) -> Dataset | Features:
    """The data set after the frozen part, from a file if one is kept; the images where nothing is frozen."""
    if not frozen_stages(module)[0]:
        return data
    path = None
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        weights = "" if models.find(net).weights is not None else f"seed {seed}"
        title = f"{net} {weights} {data.name} {data.split} {len(data)} {image_size} {tune}"  # which is where it is cut
        path = Path(folder) / f"{''.join(c if c.isalnum() else '_' for c in title)}.npy"
    return extract(module, data, normalise=models.preprocessing(net), image_size=image_size, path=path, progress=False)


def calibration_batches_of(
    train: Dataset | Features, batch: int, count: int, seed: int, net: str, image_size: int | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """As many batches as asked for, or as there are, in an order of their own."""
    if batch > len(train):
        raise ValueError(f"the training set has {len(train)} images, fewer than one batch of {batch}")
    order = np.random.default_rng((seed, 1)).permutation(len(train))
    chosen = [order[i * batch : (i + 1) * batch] for i in range(min(count, len(train) // batch))]
    if isinstance(train, Features):
        return [(train.arrays[rows], train.labels[rows]) for rows in chosen]
    normalise = models.preprocessing(net)
    return [
        next(datasets.batches(train.subset(rows), batch, shuffle=False, normalise=normalise, image_size=image_size))
        for rows in chosen
    ]


# ---- measuring ---------------------------------------------------------------------------


def measure_step(
    net: Module, tuning: Tuning, batch: tuple[np.ndarray, np.ndarray], micro: int | None = None
) -> dict[str, Any]:
    """One real step, predicted and measured: tape bytes, multiply-adds by kind; and its time against plain training.

    Of a step in micro-batches the tape is that of one of them, and the multiply-adds those of all.
    """
    x, y = batch
    part = x if micro is None else x[:micro].copy()
    labels = y[: len(part)]
    states = {path: layer.store.state() for path, layer in weighted_layers(net).items()}
    net.zero_grad()
    with lance_ref.count_macs() as counter, lance_ref.record(net) as records:
        loss = F.cross_entropy(net(part), labels)
        tape = lance_ref.tape(loss)
        loss.backward()
    repeats = len(x) // len(part)
    bills = account(records, tuning.head)
    ratio, seconds = _time_ratio(net, part, labels)
    net.zero_grad()
    for path, layer in weighted_layers(net).items():
        layer.store.load_state(states[path])
        layer.store.energy_kept = None
    return {
        "tape_bytes": tape.total_bytes,
        "predicted_tape_bytes": sum(bill.tape_bytes for bill in bills),
        "layer_bytes": _layer_bytes(bills, tuning),
        "second_tape_bytes": max((bill.cost.second_tape_bytes for bill in bills), default=0),
        "paper_bytes": sum(bill.paper_bytes for bill in bills),
        "factor_bytes": sum(layer.store.factor_bytes for layer in weighted_layers(net).values()),
        "macs": {kind: repeats * count for kind, count in counter.by_kind().items() if kind in MAC_KINDS},
        "predicted_macs": {
            kind: repeats * sum(getattr(bill.cost, f"{kind}_macs") for bill in bills) for kind in MAC_KINDS
        },
        "time_ratio": ratio,
        "step_seconds": repeats * seconds,
    }


def _layer_bytes(bills: Sequence[Billed], tuning: Tuning) -> dict[str, int]:
    """What the stores of the tuned layers keep on the tape."""
    return {
        bill.record.path: bill.cost.paper_bytes
        for bill in bills
        if bill.record.op in WEIGHTED and bill.record.path in tuning.layers
    }


def _time_ratio(net: Module, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Median time of a step over that of plain backpropagation of the same layers, in turns; and the former."""
    stores = {path: layer.store for path, layer in weighted_layers(net).items()}
    layers = weighted_layers(net)
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(TIMED_STEPS):
        for plain in (False, True):
            for path, layer in layers.items():
                layer.store = EXACT if plain else stores[path]
            began = time.perf_counter()
            F.cross_entropy(net(x), y).backward()
            times[plain].append(time.perf_counter() - began)
    for path, layer in layers.items():
        layer.store = stores[path]
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
            path: modules[path]
            for path in self.layers
            if modules[path].weight.requires_grad and modules[path].store is not EXACT
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
        exact = _weight_gradients(info, watched)
        for path, layer in watched.items():
            layer.store = stores[path]
            layer.store.load_state(states[path])
        self.cosines[when] = {path: _cosine(exact[path], compressed[path]) for path in watched}


def _weight_gradients(info: StepInfo, layers: Mapping[str, Module]) -> dict[str, np.ndarray]:
    """Of one batch; no gradient is left behind."""
    info.net.zero_grad()
    F.cross_entropy(info.net(info.x), info.y).backward()
    gradients = {path: layer.weight.grad for path, layer in layers.items()}
    info.net.zero_grad()
    return gradients


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """0 where one of them is zero."""
    lengths = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return float(np.vdot(a, b)) / lengths if lengths > 0 else 0.0
