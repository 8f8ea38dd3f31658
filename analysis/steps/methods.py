"""The methods of this library, one entry of the register each.

A method is written in three places: its activation store or its change of the step, the cost rule of that, and the
entry here. What the fields of an entry mean is said by :class:`analysis.steps.register.Method`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from analysis.commands.cli import count, name_of, share
from analysis.steps.register import (
    ENERGY,
    METHODS,
    Kept,
    Method,
    check_methods_heed,
    chosen_methods,
    exact,
    method,
    method_step,
)
from analysis.steps.settings import Description, MethodStep, Setting, Settings, TunedLayer

if TYPE_CHECKING:
    from analysis.steps.nets import TracedStep
    from lance_ref.nn.module import Module
    from lance_ref.stores import ActivationStore

__all__ = ["METHODS", "Method", "check_methods_heed", "chosen_methods", "method", "method_step"]

PATCH = Setting(
    "patch", 2, count, "places of the output map, in each direction, that are taken together", grid=(2, 4)
)  # fmt: skip
RATIO = Setting("ratio", 1 / 8, share, "directions by images of a batch", grid=(1 / 8, 1 / 2))
SEGMENTS = Setting(
    "segments", None, count, "stages that are put together (each stage that trains, but the last, is one)",
    grid=(None,), label="{} segments",
)  # fmt: skip
MICRO_BATCH = Setting(
    "micro_batch", None, count, "images at a time, a divisor of the batch (the largest up to a quarter of it)",
    grid=(1,), label="parts of {}",
)  # fmt: skip
LORA_RANK = Setting("lora_rank", 4, count, "rank of the updates", grid=(4,), label="rank {}")
CALIBRATION_BATCHES = Setting("calibration_batches", 100, count, "batches from which the subspaces are found, once")


def _update(text: str) -> str | None:
    """None for the whole weight, which is what every method trains where nothing else is said."""
    return None if name_of(lambda: ("weight", "subspace"))(text) == "weight" else text


UPDATE = Setting(
    "update", None, _update, "what trains: weight, or its coordinates in the subspace", grid=(None,),
    label="{} update",
)  # fmt: skip


# ---- what is kept ------------------------------------------------------------------------------


def _lance(layer: TunedLayer, centred: bool = False) -> ActivationStore:
    """A store with random subspaces and a mean of ones: bytes and multiply-adds depend on the ranks alone."""
    from dataclasses import replace

    import numpy as np

    from lance_ref.algebra.frame import Frame, feature_mode
    from lance_ref.algebra.subspace import Subspace
    from lance_ref.stores import Lance

    space = Subspace.random(layer.shape, layer.ranks, layer.rng)
    if centred:
        space = replace(space, frame=Frame(None, np.ones(layer.shape[feature_mode(layer.shape)])))
    return Lance(space, dtype=layer.dtype)


def _described_lance(layer: TunedLayer) -> Description:
    """Said without making random subspaces, which takes long for large layers."""
    return {"name": "lance", "ranks": layer.ranks, "shape": layer.shape, "order": "auto"}


def _hosvd(layer: TunedLayer) -> ActivationStore:
    from lance_ref.stores import Hosvd

    return Hosvd(ranks=layer.ranks)


def _asi(layer: TunedLayer) -> ActivationStore:
    from lance_ref.stores import Asi

    return Asi(layer.ranks)


def _gradient_filter(layer: TunedLayer) -> ActivationStore:
    from lance_ref.stores import GradientFilter

    return GradientFilter(layer.settings.patch)


def _quantized(bits: int) -> Callable[[TunedLayer], ActivationStore]:
    def make(layer: TunedLayer) -> ActivationStore:
        from lance_ref.stores import Quantized

        return Quantized(bits)

    return make


def _sketch(layer: TunedLayer) -> ActivationStore:
    from lance_ref.stores import Sketch

    return Sketch(layer.settings.ratio, seed=int(layer.rng.integers(2**31)))


def _kept_by_codes(bits: int) -> Callable[[tuple[int, ...], Settings], Kept]:
    """What codes of L = 2ᵇ − 1 steps keep: 1 − η, η = 3/(4L²), and η ≤ (k − 2)/(2L²) for k values a channel."""

    def kept(shape: tuple[int, ...], settings: Settings) -> Kept:
        levels = 2**bits - 1
        feature = 1 if len(shape) >= 4 else len(shape) - 1
        values = math.prod(shape) // shape[feature]
        worst = max(values - 2, 0) / (2 * levels**2)
        return 1 - min(3 / (4 * levels**2), worst), max(0.0, 1 - worst), 1.0

    return kept


def _kept_by_sketch(shape: tuple[int, ...], settings: Settings) -> Kept:
    """r/n for r random directions of n images, whatever the spectrum."""
    kept = max(1, round(settings.ratio * shape[0])) / shape[0]
    return kept, 1.0 if kept == 1 else 0.0, 1.0


# ---- what runs ---------------------------------------------------------------------------------


def _checkpoint(step: TracedStep, settings: Settings) -> MethodStep:
    from analysis.steps.changes import checkpointed

    return checkpointed(step, settings.segments)


def _recomputed(net: Module, facts: Mapping[str, Any]) -> AbstractContextManager[Any]:
    from analysis.steps.changes import recomputed

    return recomputed(net, facts["asked"])


def _micro_batch(step: TracedStep, settings: Settings) -> MethodStep:
    from analysis.steps.chunks import in_micro_batches

    return in_micro_batches(step, settings.micro_batch)


def _lora(step: TracedStep, settings: Settings) -> MethodStep:
    from analysis.steps.changes import with_lora

    return with_lora(step, settings.lora_rank)


def _adapted(net: Module, facts: Mapping[str, Any]) -> AbstractContextManager[Any]:
    from analysis.steps.changes import adapted

    return adapted(net, facts["layers"], facts["rank"])


# ---- the entries, in the order of --method all -------------------------------------------------

OTHER_SPECTRA = "the spectra are those of activations with their mean"

method("bp", "plain backpropagation", fidelity=exact)
method("head-only", "the classifier alone trains", tune={"selection": "head"}, fidelity=exact, layers=False)
method(
    "bias-only", "the biases of the tuned layers and the classifier train", tune={"parameters": "bias"},
    fidelity="biases are other parameters than the weights",
)  # fmt: skip
method(
    "lance", "cores by fixed, calibrated factors", settings=(CALIBRATION_BATCHES, UPDATE), make=_lance,
    describe=_described_lance, ranks="given", calibration="plain", fidelity=ENERGY,
)  # fmt: skip
method(
    "lance-mean-free", "as lance, orthogonal to the mean activation", settings=(CALIBRATION_BATCHES, UPDATE),
    make=_lance, describe=_described_lance, ranks="mean-free", calibration="mean-free", fidelity=OTHER_SPECTRA,
)  # fmt: skip
method(
    "lance-center", "as lance, of the activation without its mean, whose gradient is added exactly",
    settings=(CALIBRATION_BATCHES, UPDATE), make=lambda layer: _lance(layer, centred=True),
    describe=lambda layer: {**_described_lance(layer), "centred": True}, ranks="given", calibration="center",
    fidelity=OTHER_SPECTRA,
)  # fmt: skip
method(
    "hosvd", "cores and factors of a fresh HOSVD at every step, at lance's ranks", make=_hosvd,
    ranks="given", fidelity=ENERGY,
)  # fmt: skip
method(
    "asi", "cores and factors by one subspace iteration a step, at lance's ranks", make=_asi,
    ranks="given", fidelity=ENERGY,
)  # fmt: skip
method(
    "gradient-filter", "sums over patches of activation and gradient", settings=(PATCH,), make=_gradient_filter,
    fidelity="it changes the gradients of all layers below as well", ops=("conv2d", "linear"),
)  # fmt: skip
method("int8", "activations as 8-bit codes", make=_quantized(8), fidelity=_kept_by_codes(8))
method("int4", "activations as 4-bit codes", make=_quantized(4), fidelity=_kept_by_codes(4))
method(
    "sketch", "random combinations of the images of a batch", settings=(RATIO,), make=_sketch,
    fidelity=_kept_by_sketch,
)  # fmt: skip
method(
    "checkpoint", "segments keep their input and run twice", settings=(SEGMENTS,), runs=_checkpoint,
    on_net=_recomputed, fidelity=exact,
)  # fmt: skip
method(
    "micro-batch", "the batch in parts, one after the other", settings=(MICRO_BATCH,), runs=_micro_batch,
    fidelity=exact, parts=True,
)  # fmt: skip
method(
    "lora", "updates of low rank beside frozen linear layers and 1x1 convolutions, and the classifier",
    settings=(LORA_RANK,), tune={"selection": "head"}, runs=_lora, on_net=_adapted,
    fidelity="its updates are other parameters than the weights",
)  # fmt: skip
