"""The register of methods: for each, how the traced step changes, and which settings it has.

A method may change three things, each of them a field of :class:`Method`:

what trains   arguments of :func:`lance_ref.tune` in place of the step's own (``head-only``, ``bias-only``, ``lora``);
what runs     other records than those of the plain step (``checkpoint``, ``micro-batch``, ``lora``);
what is kept  another activation store in every tuned layer, as it would describe itself (all others).

:mod:`analysis.steps.runs` does the same to a real net.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from analysis.commands.cli import check_effect
from analysis.steps.settings import Description, MethodStep, Settings

if TYPE_CHECKING:
    from analysis.steps.nets import TracedStep

Ranks = tuple[int | None, ...]


@dataclass(frozen=True)
class Method:
    """One method, as data.

    Attributes
    ----------
    about : str
        In a few words, for the help and beneath the table.
    settings : tuple of str
        Names of those :class:`Settings` that it heeds.
    tune : mapping
        Arguments of :func:`lance_ref.tune` that replace those of the step.
    runs : callable, optional
        (step, settings) -> MethodStep, where other operations run; before ``tune`` is heeded.
    store : callable, optional
        (ranks, settings) -> Description of the store of one tuned layer.
    ranks : {None, "given", "mean-free"}
        Whether the store has the ranks of ``--ranks`` or the spectra, or these with the mean's direction left out.
    calibration : {None, "plain", "mean-free", "center"}
        How the fixed subspaces are found.
    """

    about: str
    settings: tuple[str, ...] = ()
    tune: Mapping[str, str] = field(default_factory=dict)
    runs: Callable[[TracedStep, Settings], MethodStep] | None = None
    store: Callable[[Ranks | None, Settings], Description] | None = None
    ranks: str | None = None
    calibration: str | None = None


def _checkpoint(step: TracedStep, settings: Settings) -> MethodStep:
    from analysis.steps.changes import checkpointed

    return checkpointed(step, settings.segments)


def _micro_batch(step: TracedStep, settings: Settings) -> MethodStep:
    from analysis.steps.changes import in_micro_batches

    return in_micro_batches(step, settings.micro_batch)


def _lora(step: TracedStep, settings: Settings) -> MethodStep:
    from analysis.steps.changes import with_lora

    return with_lora(step, settings.lora_rank)


def _lance(ranks: Ranks | None, settings: Settings) -> Description:
    return {"name": "lance", "ranks": ranks, "order": "auto"}


def _with_ranks(name: str, **more: Any) -> Callable[[Ranks | None, Settings], Description]:
    return lambda ranks, settings: {"name": name, "ranks": ranks, **more}


METHODS: dict[str, Method] = {
    "bp": Method("plain backpropagation"),
    "head-only": Method("the classifier alone trains", tune={"selection": "head"}),
    "bias-only": Method("the biases of the tuned layers and the classifier train", tune={"parameters": "bias"}),
    "lance": Method(
        "cores by fixed, calibrated factors", ("calibration_batches",), store=_lance, ranks="given", calibration="plain"
    ),
    "lance-mean-free": Method(
        "as lance, orthogonal to the mean activation",
        ("calibration_batches",), store=_lance, ranks="mean-free", calibration="mean-free",
    ),
    "lance-center": Method(
        "as lance, of the activation without its mean, whose gradient is added exactly",
        ("calibration_batches",), store=_with_ranks("lance", order="auto", centred=True), ranks="given",
        calibration="center",
    ),
    "hosvd": Method(
        "cores and factors of a fresh HOSVD at every step, at lance's ranks",
        store=_with_ranks("hosvd", epsilon=None), ranks="given",
    ),
    "asi": Method(
        "cores and factors by one subspace iteration a step, at lance's ranks", store=_with_ranks("asi"), ranks="given"
    ),
    "gradient-filter": Method(
        "sums over patches of activation and gradient", ("patch",),
        store=lambda ranks, settings: {"name": "gradient-filter", "patch": settings.patch},
    ),
    "int8": Method("activations as 8-bit codes", store=lambda ranks, settings: {"name": "quantized", "bits": 8}),
    "int4": Method("activations as 4-bit codes", store=lambda ranks, settings: {"name": "quantized", "bits": 4}),
    "sketch": Method(
        "random combinations of the images of a batch", ("ratio",),
        store=lambda ranks, settings: {"name": "sketch", "ratio": settings.ratio},
    ),
    "checkpoint": Method("segments keep their input and run twice", ("segments",), runs=_checkpoint),
    "micro-batch": Method("the batch in parts, one after the other", ("micro_batch",), runs=_micro_batch),
    "lora": Method(
        "updates of low rank beside frozen linear layers and 1x1 convolutions, and the classifier", ("lora_rank",),
        tune={"selection": "head"}, runs=_lora,
    ),
}  # fmt: skip
"""Every method by its name on the command line, in the order of ``--method all``."""


def chosen_methods(asked: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """The names of the methods that were asked for; ``"all"`` means every one.

    Raises
    ------
    ValueError
        If a name is unknown, given twice, or stands beside ``"all"``.

    Examples
    --------
    >>> chosen_methods(["lance", "bp"]), len(chosen_methods("all")) == len(METHODS)
    (('lance', 'bp'), True)
    """
    names = [asked] if isinstance(asked, str) else list(asked)
    if names == ["all"]:
        return tuple(METHODS)
    if not names or len(set(names)) < len(names) or any(name not in METHODS for name in names):
        raise ValueError(f"methods are {names}, expected some of {', '.join(METHODS)}, each once, or all alone")
    return tuple(names)


def method_step(
    name: str, step: TracedStep, settings: Settings, ranks: Mapping[str, Ranks], tuned: Mapping[str, tuple[int, ...]]
) -> MethodStep:
    """The step of a method.

    Parameters
    ----------
    name : str
        One of :data:`METHODS`.
    step : TracedStep
        Plain backpropagation of the same net.
    settings : Settings
    ranks : mapping of layer path to ranks
        For methods that have ranks; a layer that is missing stays exact.
    tuned : mapping of layer path to input shape
        The tuned layers.

    Raises
    ------
    NotApplicableError
        If the method does not fit the net.
    """
    from dataclasses import replace

    from analysis.rules.account import with_described_stores

    method = METHODS[name]
    changed = MethodStep(step.records)
    if method.runs is not None or method.tune:
        changed = step.remember(
            (name, *settings.of(method.settings).values()), lambda: _changed(method, step, settings)
        )
    stores: dict[str, Description] = {}
    if method.store is not None:
        paths = tuned if method.ranks is None else ranks
        stores = {path: method.store(ranks.get(path), settings) for path in paths}
    return replace(changed, records=with_described_stores(changed.records, stores), stores=stores)


def _changed(method: Method, step: TracedStep, settings: Settings) -> MethodStep:
    """What a method runs in place of the plain step, activation stores aside."""
    from dataclasses import replace

    from analysis.steps.changes import retrained, trained_parameters

    changed = MethodStep(step.records) if method.runs is None else method.runs(step, settings)
    if not method.tune:
        return changed
    trains = trained_parameters(step, method.tune) | set(changed.facts.get("parameters", ()))
    return replace(changed, records=retrained(changed.records, trains))


def check_methods_heed(options: argparse.Namespace, methods: Iterable[str]) -> None:
    """Raise ValueError for an option of methods that none of the chosen methods has."""
    chosen = [METHODS[name] for name in methods]
    for name in Settings.__dataclass_fields__:
        heeding = [known for known, method in METHODS.items() if name in method.settings]
        check_effect(options, name, any(name in method.settings for method in chosen), f"one of {', '.join(heeding)}")
    ranked = [known for known, method in METHODS.items() if method.ranks is not None]
    for name in ("epsilon", "ranks", "spectra"):
        check_effect(options, name, any(method.ranks for method in chosen), f"one of {', '.join(ranked)}")
