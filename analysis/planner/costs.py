"""What one candidate costs: memory on the device, and multiply-adds beside backpropagation's.

The net is traced once for every number of images at a time, with every layer training; for fewer layers the flags of
the records are changed (:func:`analysis.steps.changes.retrained`), which is cheaper than another trace and the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

import numpy as np

import lance_ref
from analysis.peak.lifetimes import Lifetimes, lifetimes_from_scopes
from analysis.peak.memory import STATE_COPIES, peak
from analysis.planner.options import Option
from analysis.ranks.choose import fraction_of, mean_free
from analysis.ranks.spectra_file import Spectra
from analysis.rules.account import WEIGHTED, account, with_described_stores
from analysis.rules.calibration_costs import calibration_cost
from analysis.rules.layouts import Memory as Layouts
from analysis.rules.op_cost import MAC_KINDS, cost_of
from analysis.rules.recompute import flatten
from analysis.steps.changes import retrained
from analysis.steps.chunks import mixing_store
from analysis.steps.methods import METHODS, method_step
from analysis.steps.nets import TracedStep, trace_step
from analysis.steps.settings import MethodStep
from lance_ref.engine.recording import OpRecord
from lance_ref.nn.module import Module
from lance_ref.train.chunks import SIZES, mixing_operation, shared_draws

Ranks = tuple[int | None, ...]
Layers = int | tuple[str, ...]
"""What trains besides the head: a number of layers, counted from the last, or the layers of these paths."""
COUNTS = ("peak", "kept", "program")


@dataclass(frozen=True)
class Device:
    """How memory is counted."""

    #: "peak": the simulated peak of a step (:mod:`analysis.peak.memory`): batch, activations in flight, tape,
    #: gradients, optimiser state, workspaces. "kept": tape, gradients and optimiser state as if all of them were there
    #: at once, without activations in flight and workspaces, which another engine may do without. "program": the arena
    #: of a device program, see :mod:`analysis.planner.device_costs`.
    count: str = "peak"
    #: "flash": of the parameters only those that train are in RAM; "ram": all of them, and the module buffers; "int8":
    #: as "flash", where device programs have the frozen ones in int8.
    weights: str = "flash"
    #: "device": the Gram matrices have to fit too, beside the activations in flight of a forward pass.
    calibration: str = "device"
    optimizer: str = "sgd"  #: {"sgd", "sgd-momentum", "adam"}

    def __post_init__(self) -> None:
        allowed = {
            "count": COUNTS,
            "weights": ("flash", "ram", "int8"),
            "calibration": ("device", "elsewhere"),
            "optimizer": tuple(STATE_COPIES),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(values)}")


@dataclass(frozen=True)
class Memory:
    """Bytes on the device; ``step`` is the peak or what is kept, see :class:`Device`.

    ``gradients`` and ``optimizer_state`` are in ``step``. ``calibration`` is all that is there while a calibration
    runs, weights included; it is over before the first step, so the larger of the two has to fit.
    """

    step: int
    factors: int
    weights: int
    gradients: int
    optimizer_state: int
    calibration: int = 0
    at: str = ""
    #: What the gradients of earlier images add where a batch goes a few at a time: in ``step`` if it does so here.
    carried: int = 0
    flash: int = 0  #: Of a device program: frozen weights, and what else never changes.

    @property
    def training(self) -> int:
        """While a step runs."""
        return self.step + self.factors + self.weights

    @property
    def total(self) -> int:
        """What the device must have."""
        return max(self.training, self.calibration)


class Costs:
    """Costs of all candidates of one net, which is tuned again and again; those asked for before are remembered.

    ``input_shape`` is without the batch; ``layers`` are all that could be tuned, the classifier left out.
    """

    def __init__(
        self,
        net: Module,
        name: str,
        input_shape: tuple[int, ...],
        device: Device,
        dtype: str = "float32",
        spectra: Spectra | None = None,
        tune: str | Sequence[str] = "all",
    ) -> None:
        self.net, self.name, self.input_shape = net, name, input_shape
        self.device, self.dtype, self.spectra = device, dtype, spectra
        self.every = lance_ref.tune(net, "all").layers
        self.layers = self.every if tune == "all" else lance_ref.tune(net, tune).layers
        for method in ("whole", "shapes", "ranks", "macs", "in_flight", "trains", "runs", "mixing", "mixing_net"):
            setattr(self, method, cache(getattr(self, method)))  # what this net's calls gave goes away with the net
        self.memory = cache(self._memory)
        self.step = lru_cache(maxsize=4)(self._step)
        self._last: tuple[Any, MethodStep] | None = None

    # ---- the step ----------------------------------------------------------------------------

    def whole(self, batch: int) -> TracedStep:
        """Backpropagation through all layers."""
        return trace_step(self.net, self.name, self.input_shape, batch, "all", self.dtype)

    def runs(self, batch: int) -> str:
        """Why the net cannot run on such a batch; empty if it can."""
        try:
            self.whole(batch)
        except ValueError as error:
            return str(error)
        return ""

    def selection(self, layers: Layers) -> str | tuple[str, ...]:
        """The selection for :func:`lance_ref.tune`: a number of the layers that may be chosen, or layers by name."""
        if not layers:
            return "head"
        if not isinstance(layers, int):
            return layers
        return f"last:{layers}" if self.layers == self.every else self.layers[-layers:]

    def tuned(self, layers: Layers) -> tuple[str, ...]:
        """Tune the net to these layers; their paths."""
        selection = self.selection(layers)
        if self.net.tuning.selection != selection:
            lance_ref.tune(self.net, selection)
        return tuple(self.net.tuning.layers)

    def depth(self, layers: Layers) -> int:
        """How many layers train from the last on without a gap: as many as an experiment with the last n may have."""
        trained = self.trains(layers)[0]
        return next((i for i, path in enumerate(reversed(self.every)) if path not in trained), len(self.every))

    def trains(self, layers: Layers) -> tuple[tuple[str, ...], frozenset[str]]:
        """Paths of these layers, and the names of all parameters that train with them."""
        paths = self.tuned(layers)
        return paths, frozenset(name for name, parameter in self.net.named_parameters() if parameter.requires_grad)

    def _step(self, layers: Layers, batch: int) -> TracedStep:
        """Backpropagation through these layers."""
        whole = self.whole(batch)
        paths, trains = self.trains(layers)
        return replace(whole, records=retrained(whole.records, trains), tuned_layers=paths)

    def shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Input shape of every layer that could be tuned."""
        shapes: dict[str, tuple[int, ...]] = {}
        for record in flatten(self.whole(batch).records):
            if record.op in WEIGHTED and record.path in self.every:
                shape = record.inputs[0].shape
                if shapes.setdefault(record.path, shape) != shape:
                    raise ValueError(f"layer {record.path!r} is called with inputs of several shapes")
        return shapes

    def ranks(self, option: Option, batch: int) -> dict[str, Ranks]:
        """Ranks of every layer that could be tuned, as the cost model chooses them; empty for methods without."""
        if METHODS[option.method].ranks is None:
            return {}
        shapes = self.shapes(batch)
        ranks: dict[str, Ranks]
        if option.directions is not None:  # of channels alone; a layer with no more keeps its input as it is
            number = option.directions
            fewer = {path: number if number < shape[1] else None for path, shape in shapes.items()}
            ranks = {path: (None, fewer[path], *[None] * (len(shape) - 2)) for path, shape in shapes.items()}
        elif option.fraction is not None:
            ranks = {path: fraction_of(option.fraction, shape) for path, shape in shapes.items()}
        elif self.spectra is not None and option.epsilon is not None:
            ranks = {path: self.spectra.layers[path].ranks(option.epsilon, batch) for path in shapes}
        else:
            raise ValueError(f"{option.name} takes spectra, or a fraction of each mode")
        return {path: (None, *of[1:]) for path, of in ranks.items()} if option.by_image else ranks

    def changed(self, option: Option, layers: Layers, batch: int) -> MethodStep:
        """The step of a candidate with ``batch`` images at a time.

        Raises ValueError if the method does not fit the net with these layers or this number of images.
        """
        option = plain(option)
        key = (option, layers, batch)
        if self._last is None or self._last[0] != key:
            step = self.step(layers, batch)
            entry = METHODS[option.method]
            if entry.tune or entry.runs:  # these look at what the net itself is tuned to
                self.tuned(layers)
            tuned = self.trains(layers)[0]
            ranks = {path: of for path, of in self.ranks(option, batch).items() if path in tuned}
            shapes = {path: self.shapes(batch)[path] for path in tuned}
            if METHODS[option.method].ranks == "mean-free":
                ranks = mean_free(ranks, shapes)
            changed = method_step(option.method, step, option.settings, ranks, shapes)
            if option.core_bits is not None:
                stores = {path: {**store, "core_bits": option.core_bits} for path, store in changed.stores.items()}
                changed = replace(changed, records=with_described_stores(changed.records, stores), stores=stores)
            self._last = key, changed
        return self._last[1]

    def mixing_net(self) -> str | None:
        """Why the images of a batch cannot go through the net a few at a time, as a clause; None if they can."""
        try:
            few, more = (self.whole(size).records[:-1] for size in SIZES)
        except ValueError as error:
            return str(error)
        return mixing_operation(few, more, SIZES) or shared_draws(self.net, few)

    def mixing(self, option: Option, images: int) -> str | None:
        """Why a batch cannot be divided into parts of this size with this option, as a clause; None if it can.

        The stores of an option are alike in all layers, so that the fewest layers that can be had tell.
        """
        for layers in range(len(self.layers) + 1) if METHODS[option.method].layers else (0,):
            try:
                changed = self.changed(option, layers, images)
            except ValueError:
                continue
            if changed.stores or METHODS[option.method].make is None:
                return mixing_store(changed) or self.mixing_net()
        return "the method does not fit the net"

    # ---- memory ------------------------------------------------------------------------------

    def _memory(self, option: Option, layers: Layers, batch: int) -> Memory:
        """Memory of a candidate with ``batch`` images at a time; ValueError as for :meth:`changed`."""
        if option != plain(option):  # of one simulation
            found = self.memory(plain(option), layers, batch)
            if option.batch is not None and option.batch % batch:
                raise ValueError(f"{batch} images at a time do not divide {option.batch}")
            carried = found.carried if option.batch not in (None, batch) else 0
            calibration = 0 if option.elsewhere else found.calibration
            return replace(found, step=found.step + carried, calibration=calibration)
        changed = self.changed(option, layers, batch)
        gradients, weights = self._parameters(changed)
        state = STATE_COPIES[self.device.optimizer] * gradients
        carried = 0
        if self.device.count == "peak":
            step, carried, at = self._peak(option, batch, changed)
            factors = self._factors(changed)
        else:
            bills = account(changed.records, None)
            factors = sum(bill.subspace_bytes for bill in bills)
            step, at = sum(bill.tape_bytes for bill in bills) + gradients + state, ""
        calibration = self._calibration(option, layers, batch)
        return Memory(step, factors, weights, gradients, state, calibration, at, carried)

    def _parameters(self, changed: MethodStep) -> tuple[int, int]:
        """Bytes of the gradients, and of the weights that are in RAM."""
        trained = {
            v.id: v.nbytes for r in flatten(changed.records) for v in r.inputs if v.parameter and v.requires_grad
        }
        gradients = sum(trained.values())
        return gradients, self._all_weights(changed.records) if self.device.weights == "ram" else gradients

    def kept(self, option: Option, layers: Layers, batch: int) -> int:
        """Bytes that a step keeps, with factors and weights, as ``count="kept"`` has them; ValueError as above."""
        changed = self.changed(option, layers, batch)
        bills = account(changed.records, None)
        gradients, weights = self._parameters(changed)
        kept = sum(bill.tape_bytes + bill.subspace_bytes for bill in bills)
        return kept + (1 + STATE_COPIES[self.device.optimizer]) * gradients + weights

    def _peak(self, option: Option, batch: int, changed: MethodStep) -> tuple[int, int, str]:
        """The peak, what it is higher by in a batch of several such parts, and where it is."""
        ends = self._lifetimes(option, batch, changed)
        found = peak(changed.records, optimizer=self.device.optimizer, lifetimes=ends)
        before = found.gradients_bytes  # those of the micro-batches before are there from the start
        most = max(found.forward_bytes, found.backward_bytes) + before
        in_parts = max(most, found.optimizer_bytes)
        at_once = found.peak_bytes if changed.repeats == 1 else in_parts
        return at_once, in_parts - at_once, f"{found.moment}, {found.at}"

    def _factors(self, changed: MethodStep) -> int:
        """The fixed factors of every layer that has some; those of a layer that is called twice once."""
        factors = {}
        for record in flatten(changed.records):
            if record.path in changed.stores and record.op in WEIGHTED:
                factors[record.path] = cost_of(record, Layouts(), True).subspace_bytes
        return sum(factors.values())

    def _all_weights(self, records: list[OpRecord]) -> int:
        """Parameters, those that a method adds included, and buffers."""
        own = {name: p.size * np.dtype(p.dtype).itemsize for name, p in self.net.named_parameters()}
        read = {v.parameter: v.nbytes for r in flatten(records) for v in r.inputs if v.parameter}
        return sum((read | own).values()) + sum(array.nbytes for _, array in self.net.named_buffers())

    def _lifetimes(self, option: Option, batch: int, changed: MethodStep) -> Lifetimes:
        """When the tensors of a candidate's step are given back."""
        if "parameters" in changed.facts:  # of layers that the plain step does not have
            return lifetimes_from_scopes(changed.records)
        return self.whole(batch).lifetimes if changed.lifetimes is None else changed.lifetimes

    def _calibration(self, option: Option, layers: Layers, batch: int) -> int:
        """Bytes while the subspaces are found: Gram matrices, the activations in flight, and the weights."""
        kind = METHODS[option.method].calibration
        if kind is None or self.device.calibration == "elsewhere":
            return 0
        tuned = self.trains(layers)[0]
        ranks = {path: of for path, of in self.ranks(option, batch).items() if path in tuned}
        records = flatten(self.whole(batch).records)
        grams = calibration_cost(records, 0, ranks, 1, kind).gram_bytes
        weights = self._all_weights(records) if self.device.weights == "ram" else 0
        return grams + weights + (self.in_flight(batch) if self.device.count == "peak" else 0)

    def in_flight(self, batch: int) -> int:
        """The peak of a forward pass in which nothing trains."""
        records = retrained(self.whole(batch).records, ())
        return peak(records, lifetimes=self.whole(batch).lifetimes).forward_bytes

    # ---- work --------------------------------------------------------------------------------

    def macs(self, option: Option, layers: Layers, batch: int) -> int:
        """Multiply-adds of ``batch`` images of a candidate, nominal ones of decompositions included."""
        changed = self.changed(option, layers, batch)
        bills = account(changed.records, None, changed.repeats)
        return sum(getattr(bill.cost, f"{kind}_macs") for bill in bills for kind in MAC_KINDS)

    def times_bp(self, option: Option, layers: Layers, batch: int) -> Fraction:
        """Multiply-adds of a step relative to plain backpropagation through the same layers, with the same batch."""
        return Fraction(self.macs(plain(option), layers, batch), self.macs(Option("bp"), layers, batch))

    def exact_statistics(self, batch: int) -> bool:
        """Whether no batch norm uses the statistics of the batch, so that micro-batches give the same gradient."""
        return not any(r.op == "batch_norm" and r.attributes["training"] for r in flatten(self.whole(batch).records))


def plain(option: Option) -> Option:
    """The option whose simulation serves this one too: all images at once, calibrated here."""
    return replace(option, batch=None, elsewhere=False)


def layers_of(option: Option) -> Callable[[int], int]:
    """How many layers a step of this option tunes when n were chosen."""
    return (lambda n: n) if METHODS[option.method].layers else (lambda n: 0)


def weights_by_layer(records: list[OpRecord], layers: tuple[str, ...]) -> Mapping[str, int]:
    """Number of weights of each layer."""
    sizes = {r.path: r.inputs[1].size for r in flatten(records) if r.op in WEIGHTED}
    return {path: sizes[path] for path in layers}
