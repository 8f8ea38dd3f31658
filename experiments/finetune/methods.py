"""The methods of the fine-tuning experiment: what each does to a network before it trains.

Those of the cost model are taken from its register; more entries stand below, beside the function that begins each. All
methods start from the same weights and see the same batches; they differ in what trains and in what is kept for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

import lance_ref
from analysis.commands.cli import positive, share
from analysis.rules.account import WEIGHTED
from analysis.steps import methods as register
from analysis.steps.register import tuned_layers
from analysis.steps.settings import Setting, Settings
from lance_ref import nn
from lance_ref.engine.tensor import Tensor
from lance_ref.lance.asi_ranks import choose_ranks
from lance_ref.lance.calibration import Calibration
from lance_ref.lance.gradient_samples import sample_gradients
from lance_ref.lance.planning import plan_ranks
from lance_ref.nn.module import Module
from lance_ref.nn.selection import Tuning, weighted_layers
from lance_ref.stores import Hosvd, Sketch

Notes = dict[str, Any]
ALL_MODES = ("batch", "channel", "height", "width")
GRADIENT_SAMPLES = 2
"""Batches from which ASI and the planner with gradients choose ranks."""

EPSILON = Setting("epsilon", 0.7, share, "energy threshold")
BUDGET = Setting("budget_kib", None, positive, "KiB of cores")


@dataclass(frozen=True)
class Start:
    """What a method starts from.

    Attributes
    ----------
    net : Module
        What takes the batches: the network, or what follows its frozen part.
    tuning : Tuning
    batches : list of (x, y)
        For calibration, drawn from the training set.
    modes : tuple of str
        Modes that LANCE compresses where the method does not say.
    values : mapping of setting to value
        Of every setting of every method.
    seed : int
    """

    net: Module
    tuning: Tuning
    batches: list[tuple[np.ndarray, np.ndarray]]
    modes: tuple[str, ...]
    values: Mapping[str, Any]
    seed: int

    @property
    def update(self) -> str:
        """What trains of compressed layers, for methods of LANCE."""
        return self.values.get("update") or "weight"

    @property
    def budget_bytes(self) -> int:
        """For the cores of methods that work under a budget."""
        return int(self.values["budget_kib"] * 1024)

    def calibrate(self, modes: Iterable[str] | None = None, **options: Any) -> Calibration:
        """Of all tuned layers, at the threshold of the setting."""
        wanted = self.modes if modes is None else tuple(modes)
        return lance_ref.calibrate(self.net, self.batches, epsilon=self.values["epsilon"], modes=wanted, **options)


Begin = Callable[[Start], Notes]
Begins = TypeVar("Begins", bound=Callable[..., Notes])


@dataclass(frozen=True)
class Entry:
    """A method of this experiment.

    Attributes
    ----------
    about : str
        In a few words.
    begin : callable
        What it does to the network before training; gives the notes that it wants in the results.
    settings : tuple of Setting
        Those that it heeds; the first is what ``METHOD@VALUE`` sets.
    modes : bool
        Whether it compresses the modes of ``--modes``; other methods have modes of their own.
    on_net : callable, optional
        What runs otherwise in the network.
    parts : int
        Into how many parts the batch goes.
    """

    about: str
    begin: Begin
    settings: tuple[Setting, ...] = ()
    modes: bool = False
    on_net: Callable[[Module], None] | None = None
    parts: int = 1


_ENTRIES: dict[str, Entry] = {}


def _entry(name: str, about: str = "", *settings: Setting, **fields: Any) -> Callable[[Begins], Begins]:
    """Register the function below as a method of this experiment, in place of what the cost model's register says."""

    def add(begin: Begins) -> Begins:
        _ENTRIES[name] = Entry(about or register.METHODS[name].about, begin, settings, **fields)
        return begin

    return add


def methods() -> dict[str, Entry]:
    """Every method by its name on the command line: those below, and all others that begin with a store or a tuning."""
    others = {
        name: Entry(of.about, of.begin or _with_stores(of), of.settings)
        for name, of in register.METHODS.items()
        if name not in _ENTRIES and (of.make or of.begin or (of.tune and not of.runs))
    }
    return {**_ENTRIES, **others}


def all_settings() -> dict[str, Setting]:
    """What the methods can be told, by name."""
    return {setting.name: setting for entry in methods().values() for setting in entry.settings}


def _with_stores(method: register.Method) -> Begin:
    """A store of the method in every tuned layer, at ranks by energy where it has ranks."""

    def begin(start: Start) -> Notes:
        if method.make is None:
            return {}
        make = method.make
        records = lance_ref.trace(start.net, start.batches[0][0].shape)
        shapes = {r.path: r.inputs[0].shape for r in records if r.op in WEIGHTED and r.path in start.tuning.layers}
        calibration = start.calibrate() if method.ranks else {}
        ranks = {path: tuple(space.ranks) for path, space in calibration.items()}
        settings = Settings(**{name: start.values[name] for name in method.names if name in start.values})
        dtype = start.batches[0][0].dtype
        layers = {layer.path: layer for layer in tuned_layers(dtype, shapes, ranks, settings, start.seed)}
        lance_ref.attach(start.net, lambda path, layer: make(layers[path]))
        return {"ranks": {path: list(of) for path, of in ranks.items()}} if ranks else {}

    return begin


# ---- the entries ---------------------------------------------------------------------------


@_entry("micro-batch", parts=4)
@_entry("checkpoint", on_net=lambda net: _recompute_stages(net))
@_entry("bp")
@_entry("bias-only", "the biases of the layers and the classifier")
@_entry("head-only", "the classifier alone trains")
def nothing(start: Start) -> Notes:
    """Plain backpropagation; what trains was decided by the tuning, and what runs by the entry."""
    return {}


@_entry("lance", "one threshold for all layers and modes", EPSILON, register.UPDATE, modes=True)
def lance(start: Start, **options: Any) -> Notes:
    """One threshold for all layers and modes."""
    calibration = start.calibrate()
    lance_ref.compress(start.net, calibration, update=start.update, **options)
    return _ranks(calibration)


@_entry(
    "lance-mean-free",
    "channel directions orthogonal to the mean activation, as many in each layer, in the budget",
    BUDGET,
    register.UPDATE,
)
def lance_mean_free(start: Start) -> Notes:
    """Channel directions orthogonal to the mean activation, as many in each layer as the budget gives equally."""
    return equal_channels(start, mean_free=True)


@_entry("lance-mean-free-epsilon", "lance, orthogonal to the mean activation", EPSILON, register.UPDATE, modes=True)
def lance_mean_free_epsilon(start: Start) -> Notes:
    """As ``lance``, one threshold for all layers and modes, but orthogonal to the mean activation."""
    calibration = start.calibrate(mean_free=True)
    lance_ref.compress(start.net, calibration, update=start.update)
    return _ranks(calibration)


@_entry("lance-channels", "lance-mean-free with the mean", BUDGET, register.UPDATE)
def lance_channels(start: Start) -> Notes:
    """The leading channel directions, mean included, as many in each layer as the budget gives equally."""
    return equal_channels(start, mean_free=False)


@_entry("lance-center", "lance-mean-free, the mean's own gradient added exactly", BUDGET, register.UPDATE)
def lance_center(start: Start) -> Notes:
    """The mean activation exactly, and channel directions of the rest, as many as the budget gives equally."""
    return equal_channels(start, center=True)


@_entry("lance-uniform", "the largest single threshold in the budget", BUDGET, modes=True)
def lance_uniform(start: Start) -> Notes:
    """The largest single threshold whose cores fit the budget: the papers' way to spend it."""
    calibration = start.calibrate()
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        fits = _core_bytes(calibration.with_epsilon(middle)) <= start.budget_bytes
        low, high = (middle, high) if fits else (low, middle)
    if low == 0:
        raise ValueError(f"budget is {start.budget_bytes} bytes, less than rank 1 in every mode of every layer takes")
    calibration = calibration.with_epsilon(low)
    lance_ref.compress(start.net, calibration)
    return {"epsilon": low, **_ranks(calibration)}


@_entry("lance-planned", "mean-free, the budget shared out over layers and modes by sampled gradients", BUDGET)
def lance_planned(start: Start) -> Notes:
    """Mean-free subspaces, the bytes shared out over layers and modes by the error of sampled weight gradients.

    The batch mode is left alone: what a calibrated one keeps of another batch is little.
    """
    return _planned(start, start.calibrate(["channel", "height", "width"], mean_free=True))


@_entry("lance-planned-channels", "lance-planned over layers and channels alone", BUDGET)
def lance_planned_channels(start: Start) -> Notes:
    """As planned, over layers and channels alone."""
    return _planned(start, start.calibrate(["channel"], mean_free=True))


@_entry("lance-planned-modes", "lance-planned over all modes, with the mean", BUDGET, modes=True)
def lance_planned_modes(start: Start) -> Notes:
    """As planned, over all modes of the setting and with the mean."""
    return _planned(start, start.calibrate())


def _planned(start: Start, calibration: Calibration) -> Notes:
    samples = sample_gradients(start.net, start.batches[:GRADIENT_SAMPLES])
    plan = plan_ranks(calibration, start.budget_bytes, samples)
    calibration = plan.apply(start.net, calibration)
    return {**_ranks(calibration, plan.trained), "not_trained": [p for p, r in plan.ranks.items() if r is None]}


@_entry("hosvd", "a fresh HOSVD at every step, at the threshold", EPSILON)
def hosvd(start: Start) -> Notes:
    """A fresh HOSVD at every step, at the threshold of the start."""
    lance_ref.attach(start.net, lambda path, layer: Hosvd(start.values["epsilon"]))
    return {}


@_entry("asi", "one subspace iteration a step, ranks chosen in the budget", BUDGET)
def asi(start: Start) -> Notes:
    """Subspace iteration at ranks chosen by perplexity under the budget."""
    plan = choose_ranks(sample_gradients(start.net, start.batches[:GRADIENT_SAMPLES]), start.budget_bytes)
    lance_ref.attach(start.net, plan.make)
    return {"ranks": {path: list(ranks) for path, ranks in plan.ranks.items()}}


@_entry(
    "lance-sketch",
    "lance, the batch mode projected on directions drawn at every step",
    EPSILON,
    register.RATIO,
    modes=True,
)
def lance_sketch(start: Start) -> Notes:
    """As ``lance``, without a calibrated batch mode."""
    return lance(start, batch_mode="sketch", batch_ratio=start.values["ratio"], seed=start.seed)


@_entry("lance-int8", "lance, its cores as 8-bit codes", EPSILON, modes=True)
def lance_int8(start: Start) -> Notes:
    """As ``lance``, with smaller cores."""
    return lance(start, core_bits=8)


@_entry("sketch", "", register.RATIO)
def sketch(start: Start) -> Notes:
    """One seed for all layers."""
    lance_ref.attach(start.net, lambda path, layer: Sketch(start.values["ratio"], seed=start.seed))
    return {}


def equal_channels(start: Start, **options: Any) -> Notes:
    """Channel directions only, the same number r in every ungrouped layer; grouped layers are not trained.

    A depthwise layer has one channel a group: its weight gradient cannot be had from few directions.
    """
    modules = weighted_layers(start.net)
    layers = [path for path in start.tuning.layers if getattr(modules[path], "groups", 1) == 1]
    calibration = start.calibrate(["channel"], layers=layers, **options)
    spaces = {path: calibration[path] for path in layers}
    one = sum(4 * math.prod(space.shape) // space.shape[1] for space in spaces.values())
    r = start.budget_bytes // one
    if r < 1:
        raise ValueError(f"budget is {start.budget_bytes} bytes, one channel direction in every layer takes {one}")
    ranks = {path: [None] * len(space.shape) for path, space in spaces.items()}
    for path in ranks:
        ranks[path][1] = min(r, calibration.grams_of(path).free_directions)  # type: ignore[call-overload]
    calibration = calibration.with_ranks(ranks)
    lance_ref.compress(start.net, calibration, update=start.update)
    for path in start.tuning.layers:
        if path not in layers:
            modules[path].requires_grad_(False)
    return {**_ranks(calibration), "not_trained": [path for path in start.tuning.layers if path not in layers]}


def _ranks(calibration: Calibration, layers: Iterable[str] | None = None) -> Notes:
    paths = calibration if layers is None else layers
    return {"ranks": {path: list(calibration[path].ranks) for path in paths}}


def _core_bytes(calibration: Calibration) -> int:
    return sum(4 * math.prod(space.core_shape) for space in calibration.values())


def prepare(net: Module, selection: str, method: str) -> Tuning:
    """Choose what trains for this method, and mark the segments that are run again."""
    of = register.METHODS.get(method)
    changes: dict[str, Any] = {"selection": selection, **(of.tune if of else {})}
    tuning = lance_ref.tune(net, **changes)
    on_net = methods()[method].on_net
    if on_net is not None:
        on_net(net)
    return tuning


def _recompute_stages(net: Module) -> None:
    """Every stage that trains, the last aside, keeps its input alone and runs again in the backward pass."""
    *stages, last = net.stages()
    trained = [any(parameter.requires_grad for parameter in stage.parameters()) for stage in stages]
    segments = [nn.Recompute(stage) if trains else stage for stage, trains in zip(stages, trained, strict=True)]

    def forward(x: Tensor) -> Tensor:
        for segment in (*segments, last):
            x = segment(x)
        return x

    # of this one network, not of its class
    net.__dict__.update(stages=lambda: [*segments, last], forward=forward)
