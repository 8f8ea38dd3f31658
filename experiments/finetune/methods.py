"""The methods of the fine-tuning experiment: what each does to a network before it trains.

Those of the cost model come from its register; more stand in :data:`ENTRIES`, below the functions that begin them.
All methods start from the same weights and see the same batches; they differ in what trains and in what is kept for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

import lance_ref
from analysis.commands.cli import positive, share
from analysis.rules.account import WEIGHTED
from analysis.steps import methods as register
from analysis.steps.changes import in_segments
from analysis.steps.register import tuned_layers
from analysis.steps.settings import Setting, Settings
from lance_ref.lance.asi_ranks import choose_ranks
from lance_ref.lance.calibration import Calibration
from lance_ref.lance.gradient_samples import sample_gradients
from lance_ref.lance.planning import plan_ranks
from lance_ref.nn.module import Module
from lance_ref.nn.selection import Tuning, weighted_layers
from lance_ref.stores import ActivationStore, Hosvd, Sketch

Notes = dict[str, Any]
GRADIENT_SAMPLES = 2
"""Batches from which ASI and the planner with gradients choose ranks."""

EPSILON = Setting("epsilon", 0.7, share, "share of the squared values of activations that is kept, in every mode")
BUDGET = Setting("budget_kib", None, positive, "KiB that the compressed activations may take")


@dataclass(frozen=True)
class Start:
    """What a method starts from.

    Attributes
    ----------
    net : Module
        What takes the batches: the network, or what follows its frozen part.
    batches : list of (x, y)
        For calibration, drawn from the training set.
    modes : tuple of str
        Modes that LANCE compresses where the method does not say.
    values : mapping of setting to value
        Of every setting of every method.
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
        """The budget for the cores, of methods that have one."""
        return int(self.values["budget_kib"] * 1024)

    def calibrate(self, modes: Iterable[str] | None = None, **options: Any) -> Calibration:
        """A calibration of all tuned layers, at the threshold of the setting."""
        wanted = self.modes if modes is None else tuple(modes)
        return lance_ref.calibrate(self.net, self.batches, epsilon=self.values["epsilon"], modes=wanted, **options)


Begin = Callable[[Start], Notes]


@dataclass(frozen=True)
class Entry:
    """A method of this experiment.

    Attributes
    ----------
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


def methods() -> dict[str, Entry]:
    """Every method by its name on the command line: those below, and all others that begin with a store or a tuning."""
    others = {
        name: Entry(of.about, of.begin or _with_stores(of), of.settings)
        for name, of in register.METHODS.items()
        if name not in ENTRIES and (of.make or of.begin or (of.tune and not of.runs))
    }
    return {**ENTRIES, **others}


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


# ---- what a method does before training -----------------------------------------------------


def nothing(start: Start) -> Notes:
    """Plain backpropagation; what trains was decided by the tuning, and what runs by the entry."""
    return {}


def compressed(start: Start, mean_free: bool = False, **options: Any) -> Notes:
    """LANCE with one threshold for all layers and modes; options as of :func:`lance_ref.compress`."""
    calibration = start.calibrate(mean_free=mean_free)
    lance_ref.compress(start.net, calibration, update=start.update, **options)
    return _ranks(calibration)


def uniform(start: Start) -> Notes:
    """LANCE with the largest single threshold whose cores fit the budget: the papers' way to spend it."""
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


def planned(start: Start, modes: Iterable[str] | None = None, mean_free: bool = True) -> Notes:
    """LANCE, the bytes shared out over layers and modes by the error of sampled weight gradients."""
    calibration = start.calibrate(modes, mean_free=mean_free)
    samples = sample_gradients(start.net, start.batches[:GRADIENT_SAMPLES])
    plan = plan_ranks(calibration, start.budget_bytes, samples)
    calibration = plan.apply(start.net, calibration)
    return {**_ranks(calibration, plan.trained), "not_trained": [p for p, r in plan.ranks.items() if r is None]}


def asi(start: Start) -> Notes:
    """Subspace iteration at ranks chosen by perplexity under the budget."""
    plan = choose_ranks(sample_gradients(start.net, start.batches[:GRADIENT_SAMPLES]), start.budget_bytes)
    lance_ref.attach(start.net, plan.make)
    return {"ranks": {path: list(ranks) for path, ranks in plan.ranks.items()}}


def with_store(start: Start, make: Callable[[], ActivationStore]) -> Notes:
    """A new store in every tuned layer, and no ranks that are known before training."""
    lance_ref.attach(start.net, lambda path, layer: make())
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
    if (on_net := methods()[method].on_net) is not None:
        on_net(net)
    return tuning


def _recompute_stages(net: Module) -> None:
    """Every stage that trains, the last aside, keeps its input alone and runs again in the backward pass."""
    parts, _ = in_segments(net, None)
    # of this one network, not of its class
    net.__dict__.update(stages=lambda: parts, forward=lambda x: reduce(lambda value, part: part(value), parts, x))


# ---- the entries ---------------------------------------------------------------------------


def _of_register(name: str, begin: Begin, *settings: Setting, **fields: Any) -> Entry:
    """A method of the cost model that begins otherwise here."""
    return Entry(register.METHODS[name].about, begin, settings, **fields)


ENTRIES: dict[str, Entry] = {
    "head-only": Entry("the classifier alone trains", nothing),
    "bias-only": Entry("the biases of the layers and the classifier", nothing),
    "bp": _of_register("bp", nothing),
    "checkpoint": _of_register("checkpoint", nothing, on_net=_recompute_stages),
    "micro-batch": _of_register("micro-batch", nothing, parts=4),
    "lance": Entry(
        "cores by fixed, calibrated factors, one --epsilon for all", compressed, (EPSILON, register.UPDATE), modes=True
    ),
    "lance-mean-free": Entry(
        "channel directions orthogonal to the mean activation, as many in each layer, in --budget-kib",
        lambda start: equal_channels(start, mean_free=True), (BUDGET, register.UPDATE),
    ),
    "lance-mean-free-epsilon": Entry(
        "lance, orthogonal to the mean activation",
        lambda start: compressed(start, mean_free=True), (EPSILON, register.UPDATE), modes=True,
    ),
    "lance-channels": Entry(
        "lance-mean-free with the mean", lambda start: equal_channels(start), (BUDGET, register.UPDATE)
    ),
    "lance-center": Entry(
        "lance-mean-free, the mean's own gradient added exactly",
        lambda start: equal_channels(start, center=True), (BUDGET, register.UPDATE),
    ),
    "lance-uniform": Entry("lance, --epsilon as large as --budget-kib allows", uniform, (BUDGET,), modes=True),
    # the batch mode is left alone: what a calibrated one keeps of another batch is little
    "lance-planned": Entry(
        "mean-free, --budget-kib shared out over layers and modes by sampled gradients",
        lambda start: planned(start, ["channel", "height", "width"]), (BUDGET,),
    ),
    "lance-planned-channels": Entry(
        "lance-planned over layers and channels alone", lambda start: planned(start, ["channel"]), (BUDGET,)
    ),
    "lance-planned-modes": Entry(
        "lance-planned over all modes, with the mean",
        lambda start: planned(start, mean_free=False), (BUDGET,), modes=True,
    ),
    "hosvd": Entry(
        "cores and factors of a fresh HOSVD at every step, by --epsilon",
        lambda start: with_store(start, lambda: Hosvd(start.values["epsilon"])), (EPSILON,),
    ),
    "asi": Entry("factors by one subspace iteration a step, ranks chosen in --budget-kib", asi, (BUDGET,)),
    "lance-sketch": Entry(
        "lance, the batch mode projected on directions drawn at every step",
        lambda start: compressed(start, batch_mode="sketch", batch_ratio=start.values["ratio"], seed=start.seed),
        (EPSILON, register.RATIO), modes=True,
    ),
    "lance-int8": Entry(
        "lance, its cores as 8-bit codes", lambda start: compressed(start, core_bits=8), (EPSILON,), modes=True
    ),
    # one seed for all layers
    "sketch": _of_register(
        "sketch",
        lambda start: with_store(start, lambda: Sketch(start.values["ratio"], seed=start.seed)), register.RATIO,
    ),
}  # fmt: skip
"""The methods of this experiment that the register lacks, or that begin otherwise here."""
