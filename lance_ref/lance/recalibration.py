"""Watching how much the fixed subspaces still keep, and calibrating a layer again where it is too little.

LANCE calibrates once. If the images of training differ from those of calibration, or training moves the
activations away, the subspaces keep less and less of them. A :class:`Recalibrator` measures that, and computes new
subspaces for such a layer from the batches of the training itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from lance_ref.algebra.grams import LayerGrams
from lance_ref.engine import counting
from lance_ref.engine.tensor import Tensor
from lance_ref.lance.calibration import Calibration
from lance_ref.lance.compression import compress
from lance_ref.nn.module import Module
from lance_ref.nn.selection import refuse_updates, weighted_layers
from lance_ref.stores import Lance
from lance_ref.train.features import in_mode
from lance_ref.train.run import StepInfo


@dataclass(frozen=True)
class Event:
    """One layer that was calibrated again.

    Attributes
    ----------
    step : int
        The first step with the new subspaces.
    energy_before, reference : float
        Share kept over the window that gave the alarm, and what it was compared with.
    batches : int
        Batches that the new subspaces come from.
    macs : int
        Multiply-adds of the Gram matrices and (nominally) of their eigenvectors.
    """

    step: int
    layer: str
    energy_before: float
    reference: float
    batches: int
    macs: int


class Recalibrator:
    """``fit(..., on_step=Recalibrator(calibration, reference))``: off unless it is asked for.

    Parameters
    ----------
    calibration : Calibration
        The one that the network was compressed with: tells the modes and what was protected.
    reference : mapping of layer path to float
        Share of the energy that each layer is to keep, as :func:`measure_energy` finds it on the calibration batches.
    share : float
        In (0, 1]. A layer is calibrated again when it keeps less than ``share`` of its reference, on the mean of
        ``window`` steps.
    batches : int
        Running batches that new subspaces are made of.

    Notes
    -----
    Ranks stay as they are, so the tape does. Protected directions and means are those of the first calibration. What a
    layer keeps in the ``window`` steps after it was calibrated again becomes its new reference. Every renewal is an
    :class:`Event` in ``events``.

    The Gram matrices are booked as calibration, and take no forward pass of their own. A checkpoint of
    :func:`~lance_ref.train.training.fit` does not hold what this object knows: a run with a Recalibrator cannot be
    resumed.
    """

    def __init__(
        self,
        calibration: Calibration,
        reference: Mapping[str, float],
        share: float = 0.8,
        window: int = 10,
        batches: int = 8,
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}, expected a number in (0, 1]")
        for name, value in (("window", window), ("batches", batches)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a positive integer")
        for path, energy in reference.items():
            if path not in calibration:
                raise ValueError(f"reference names layer {path!r}, expected some of {list(calibration)}")
            if not 0 < energy < np.inf:
                raise ValueError(f"reference of layer {path!r} is {energy}, expected a positive share of energy")
        self.calibration, self.share, self.window, self.batches = calibration, share, window, batches
        self.reference: dict[str, float | None] = dict(reference)
        self.events: list[Event] = []
        self._recent: dict[str, deque[float]] = {path: deque(maxlen=window) for path in reference}
        self._collecting: dict[str, _Collection] = {}

    def __call__(self, info: StepInfo) -> None:
        """Look at the energy that the step before kept; called before each step."""
        refuse_updates(info.net, "Recalibrator")  # other directions would need another D
        layers = weighted_layers(info.net)
        for path in self._recent:
            store = layers[path].store
            if not isinstance(store, Lance):
                raise TypeError(f"layer {path!r} has the store {store.name!r}, expected one that LANCE compressed")
            if path in self._collecting:
                self._collecting[path].again = False
                self._finish(path, info)
            elif store.energy_kept is not None:
                self._watch(path, layers[path], store.energy_kept)

    def _watch(self, path: str, layer: Module, energy: float) -> None:
        recent = self._recent[path]
        recent.append(energy)
        if len(recent) < self.window:
            return
        reference = self.reference[path]
        if reference is None:  # the first full window after a recalibration
            self.reference[path] = fmean(recent)
        elif fmean(recent) < self.share * reference:
            old = self.calibration.grams_of(path)
            selected = [K is not None for K in old.grams]
            self._collecting[path] = _Collection(LayerGrams(path, old.shape, selected, old.frame), layer)

    def _finish(self, path: str, info: StepInfo) -> None:
        """New subspaces, once enough batches have been seen."""
        collection = self._collecting[path]
        if collection.grams.batches < self.batches:
            return
        del self._collecting[path]
        collection.stop()
        layer = weighted_layers(info.net)[path]
        store = layer.store
        ranks = tuple([None if U is None else U.shape[1] for U in store.factors])
        fresh = Calibration({path: collection.grams}, {path: 1.0}, {path: ranks})
        macs = collection.macs + sum(counting.eigh_macs(len(U)) for U in fresh[path].factors if U is not None)
        options: dict[str, Any] = {"core_bits": store.core_bits, "order": store.order}
        if store.sketch is not None:
            options |= {"batch_mode": "sketch", "batch_ratio": store.sketch.ratio}
        state = store.state()
        compress(info.net, fresh, **options)
        layer.store.load_state(state)
        reference = self.reference[path]
        assert reference is not None
        self.events.append(Event(info.step, path, fmean(self._recent[path]), reference, self.batches, macs))
        self._recent[path].clear()
        self.reference[path] = None


class _Collection:
    """The Gram matrices of one layer's inputs, summed while the network trains."""

    def __init__(self, grams: LayerGrams, layer: Module) -> None:
        self.grams = grams
        self.macs = 0
        self.again = False  # whether the layer has run in this step
        self.stop: Callable[[], None] = layer.register_forward_pre_hook(self._see)

    def _see(self, layer: Module, inputs: tuple[Tensor, ...]) -> None:
        with counting.spending_on("calibration"):
            with counting.count_macs() as counter:
                self.grams.add(inputs[0].data, self.again)
            macs = sum(counter.by_kind().values())
            counting.add(macs)  # whoever counts the step counts this too
        self.again = True
        self.macs += macs


def measure_energy(net: Module, batches: Iterable[Any]) -> dict[str, float]:
    """The share of the energy that each compressed layer keeps, as a mean over the batches, by layer path.

    The network is left as it was found, but for ``energy_kept`` of its stores. ValueError if no layer is compressed by
    LANCE, or there are no batches.
    """
    stores = {path: layer.store for path, layer in weighted_layers(net).items() if isinstance(layer.store, Lance)}
    if not stores:
        raise ValueError("no layer of the network is compressed by LANCE, so there is no energy to measure")
    states = {path: store.state() for path, store in stores.items()}
    kept: dict[str, list[float]] = {path: [] for path in stores}
    with in_mode(net, training=False):
        for batch in batches:
            net(batch[0] if isinstance(batch, (tuple, list)) else batch)
            for path, store in stores.items():
                if store.energy_kept is not None:
                    kept[path].append(store.energy_kept)
    for path, store in stores.items():
        store.load_state(states[path])
    if not all(kept.values()):
        raise ValueError("batches is empty, expected at least one on which every compressed layer runs")
    return {path: fmean(values) for path, values in kept.items()}
