"""The methods of the fine-tuning experiment: what each does to a network before it trains.

A method is a function from a :class:`Setting` to the notes it wants in the results. All of them start
from the same weights and see the same batches; they differ in what trains and in what is kept for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

import lance_ref
from lance_ref import nn
from lance_ref.engine.tensor import Tensor
from lance_ref.lance.asi_ranks import choose_ranks
from lance_ref.lance.calibration import Calibration
from lance_ref.lance.gradient_samples import sample_gradients
from lance_ref.lance.planning import plan_ranks
from lance_ref.nn.module import Module
from lance_ref.nn.selection import Tuning, weighted_layers
from lance_ref.stores import ActivationStore, GradientFilter, Hosvd, Quantized, Sketch

Notes = dict[str, Any]
ALL_MODES = ("batch", "channel", "height", "width")
GRADIENT_SAMPLES = 2
"""Batches from which ASI and the planner with gradients choose ranks."""


@dataclass(frozen=True)
class Setting:
    """What a method starts from.

    Attributes
    ----------
    net : Module
        What takes the batches: the network, or what follows its frozen part.
    tuning : Tuning
    batches : list of (x, y)
        For calibration, drawn from the training set.
    epsilon : float
    modes : tuple of str
        Modes that LANCE compresses where the method does not say.
    budget_bytes : int
        For the cores of methods that work under a budget.
    patch : int
        Of the gradient filter.
    ratio : float
        Of random sketches of the batch.
    seed : int
    """

    net: Module
    tuning: Tuning
    batches: list[tuple[np.ndarray, np.ndarray]]
    epsilon: float
    modes: tuple[str, ...]
    budget_bytes: int
    patch: int
    ratio: float
    seed: int

    def calibrate(self, modes: Iterable[str] | None = None, **options: Any) -> Calibration:
        """Of all tuned layers, at the threshold of the setting."""
        wanted = self.modes if modes is None else tuple(modes)
        return lance_ref.calibrate(self.net, self.batches, epsilon=self.epsilon, modes=wanted, **options)

    def attach(self, make: Callable[[str], ActivationStore]) -> Notes:
        """A store of its own for every tuned layer; nothing to note."""
        lance_ref.attach(self.net, lambda path, layer: make(path))
        return {}


Method = Callable[[Setting], Notes]


def nothing(setting: Setting) -> Notes:
    """Plain backpropagation; what trains was decided by the tuning."""
    return {}


def lance(setting: Setting, **options: Any) -> Notes:
    """One threshold for all layers and modes."""
    calibration = setting.calibrate()
    lance_ref.compress(setting.net, calibration, **options)
    return _ranks(calibration)


def lance_mean_free(setting: Setting) -> Notes:
    """Channel directions orthogonal to the mean activation, as many in each layer as the budget gives equally."""
    return equal_channels(setting, mean_free=True)


def lance_mean_free_epsilon(setting: Setting) -> Notes:
    """As ``lance``, one threshold for all layers and modes, but orthogonal to the mean activation."""
    calibration = setting.calibrate(mean_free=True)
    lance_ref.compress(setting.net, calibration)
    return _ranks(calibration)


def lance_channels(setting: Setting) -> Notes:
    """The leading channel directions, mean included, as many in each layer as the budget gives equally."""
    return equal_channels(setting, mean_free=False)


def lance_center(setting: Setting) -> Notes:
    """The mean activation exactly, and channel directions of the rest, as many as the budget gives equally."""
    return equal_channels(setting, center=True)


def lance_uniform(setting: Setting) -> Notes:
    """The largest single threshold whose cores fit the budget: the papers' way to spend it."""
    calibration = setting.calibrate()
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        fits = _core_bytes(calibration.with_epsilon(middle)) <= setting.budget_bytes
        low, high = (middle, high) if fits else (low, middle)
    if low == 0:
        raise ValueError(f"budget is {setting.budget_bytes} bytes, less than rank 1 in every mode of every layer takes")
    calibration = calibration.with_epsilon(low)
    lance_ref.compress(setting.net, calibration)
    return {"epsilon": low, **_ranks(calibration)}


def lance_planned(setting: Setting) -> Notes:
    """Mean-free subspaces, the bytes shared out over layers and modes by the error of sampled weight gradients.

    The batch mode is left alone: what a calibrated one keeps of another batch is little.
    """
    return _planned(setting, setting.calibrate(["channel", "height", "width"], mean_free=True))


def lance_planned_channels(setting: Setting) -> Notes:
    """As planned, over layers and channels alone."""
    return _planned(setting, setting.calibrate(["channel"], mean_free=True))


def lance_planned_modes(setting: Setting) -> Notes:
    """As planned, over all modes of the setting and with the mean."""
    return _planned(setting, setting.calibrate())


def _planned(setting: Setting, calibration: Calibration) -> Notes:
    samples = sample_gradients(setting.net, setting.batches[:GRADIENT_SAMPLES])
    plan = plan_ranks(calibration, setting.budget_bytes, samples)
    calibration = plan.apply(setting.net, calibration)
    return {**_ranks(calibration, plan.trained), "not_trained": [p for p, r in plan.ranks.items() if r is None]}


def hosvd(setting: Setting) -> Notes:
    """A fresh HOSVD at every step, at the threshold of the setting."""
    return setting.attach(lambda path: Hosvd(setting.epsilon))


def asi(setting: Setting) -> Notes:
    """Subspace iteration at ranks chosen by perplexity under the budget."""
    plan = choose_ranks(sample_gradients(setting.net, setting.batches[:GRADIENT_SAMPLES]), setting.budget_bytes)
    lance_ref.attach(setting.net, plan.make)
    return {"ranks": {path: list(ranks) for path, ranks in plan.ranks.items()}}


def equal_channels(setting: Setting, **options: Any) -> Notes:
    """Channel directions only, the same number r in every ungrouped layer; grouped layers are not trained.

    A depthwise layer has one channel a group: its weight gradient cannot be had from few directions.
    """
    modules = weighted_layers(setting.net)
    layers = [path for path in setting.tuning.layers if getattr(modules[path], "groups", 1) == 1]
    calibration = setting.calibrate(["channel"], layers=layers, **options)
    spaces = {path: calibration[path] for path in layers}
    one = sum(4 * math.prod(space.shape) // space.shape[1] for space in spaces.values())
    r = setting.budget_bytes // one
    if r < 1:
        raise ValueError(f"budget is {setting.budget_bytes} bytes, one channel direction in every layer takes {one}")
    ranks = {path: [None] * len(space.shape) for path, space in spaces.items()}
    for path in ranks:
        ranks[path][1] = min(r, calibration.grams_of(path).free_directions)  # type: ignore[call-overload]
    calibration = calibration.with_ranks(ranks)
    lance_ref.compress(setting.net, calibration)
    for path in setting.tuning.layers:
        if path not in layers:
            modules[path].requires_grad_(False)
    return {**_ranks(calibration), "not_trained": [path for path in setting.tuning.layers if path not in layers]}


def _ranks(calibration: Calibration, layers: Iterable[str] | None = None) -> Notes:
    paths = calibration if layers is None else layers
    return {"ranks": {path: list(calibration[path].ranks) for path in paths}}


def _core_bytes(calibration: Calibration) -> int:
    return sum(4 * math.prod(space.core_shape) for space in calibration.values())


METHODS: dict[str, Method] = {
    "head-only": nothing,
    "bias-only": nothing,
    "bp": nothing,
    "lance": lance,
    "lance-mean-free": lance_mean_free,
    "lance-planned": lance_planned,
    "lance-sketch": lambda s: lance(s, batch_mode="sketch", batch_ratio=s.ratio, seed=s.seed),
    "lance-int8": lambda s: lance(s, core_bits=8),
    "lance-mean-free-epsilon": lance_mean_free_epsilon,
    "lance-uniform": lance_uniform,
    "lance-channels": lance_channels,
    "lance-center": lance_center,
    "lance-planned-channels": lance_planned_channels,
    "lance-planned-modes": lance_planned_modes,
    "hosvd": hosvd,
    "asi": asi,
    "gradient-filter": lambda s: s.attach(lambda path: GradientFilter(s.patch)),
    "sketch": lambda s: s.attach(lambda path: Sketch(s.ratio, seed=s.seed)),
    "int8": lambda s: s.attach(lambda path: Quantized(8)),
    "int4": lambda s: s.attach(lambda path: Quantized(4)),
    "checkpoint": nothing,
    "micro-batch": nothing,
}
"""Every method by its name on the command line."""

ABOUT = {
    "head-only": "the classifier alone trains",
    "bias-only": "the biases of the layers and the classifier",
    "bp": "plain backpropagation",
    "lance": "one threshold for all layers and modes",
    "lance-mean-free": "channel directions orthogonal to the mean activation, as many in each layer, in the budget",
    "lance-planned": "mean-free, the budget shared out over layers and modes by sampled gradients",
    "lance-sketch": "lance, the batch mode projected on directions drawn at every step",
    "lance-int8": "lance, its cores as 8-bit codes",
    "lance-mean-free-epsilon": "lance, orthogonal to the mean activation",
    "lance-uniform": "the largest single threshold in the budget",
    "lance-channels": "lance-mean-free with the mean",
    "lance-center": "lance-mean-free, the mean's own gradient added exactly",
    "lance-planned-channels": "lance-planned over layers and channels alone",
    "lance-planned-modes": "lance-planned over all modes, with the mean",
    "hosvd": "a fresh HOSVD at every step, at the threshold",
    "asi": "one subspace iteration a step, ranks chosen in the budget",
    "gradient-filter": "sums over patches of activation and gradient",
    "sketch": "random combinations of the images of a batch",
    "int8": "activations as 8-bit codes",
    "int4": "activations as 4-bit codes",
    "checkpoint": "segments keep their input and run twice",
    "micro-batch": "the batch in parts, one after the other",
}
"""What each method is, in a few words."""


def prepare(net: Module, selection: str, method: str) -> Tuning:
    """Choose what trains for this method, and mark the segments that are run again."""
    if method == "head-only":
        return lance_ref.tune(net, "head")
    tuning = lance_ref.tune(net, selection, parameters="bias" if method == "bias-only" else "all")
    if method == "checkpoint":
        _recompute_stages(net)
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
