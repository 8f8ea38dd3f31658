"""The register of methods: for each, what it changes in a training step, what it can be told, and what is known of it.

A method may change three things:

what trains   arguments of :func:`lance_ref.tune` in place of the step's own (``tune``);
what runs     other records than those of the plain step (``runs``), and the same on a real net (``on_net``);
what is kept  another activation store in every tuned layer (``make``).

:func:`method` is the one call that registers a method, for ours (:mod:`analysis.steps.methods`) and for those of
other packages. Every command takes names, options, help and checks from here.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from analysis.commands.cli import check_effect
from analysis.steps.settings import (
    KNOWN,
    Description,
    MethodStep,
    NotApplicableError,
    Ranks,
    Setting,
    Settings,
    TunedLayer,
)

if TYPE_CHECKING:
    from analysis.steps.nets import TracedStep
    from lance_ref.nn.module import Module
    from lance_ref.stores import ActivationStore

ENERGY = "energy"
"""As ``fidelity``: the share of the activation's energy that the directions of its ranks keep."""

Kept = tuple[float, float, float]
"""The share of a layer's weight gradient that a method keeps: estimated, at least, and at most."""


def exact(shape: tuple[int, ...], settings: Settings) -> Kept:
    """The fidelity of weight gradients that are those of plain backpropagation."""
    return 1.0, 1.0, 1.0


@dataclass(frozen=True)
class Method:
    """One method, as data.

    Attributes
    ----------
    about : str
        In a few words, for the help and beneath the table.
    settings : tuple of Setting
        Those that it heeds. The first is what ``METHOD@VALUE`` sets in the fine-tuning experiment. A method with the
        setting ``update`` has its layers train in the subspace where that is asked for.
    tune : mapping
        Arguments of :func:`lance_ref.tune` that replace those of the step. Default: none.
    runs : callable, optional
        (step, settings) -> MethodStep, where other operations run; before ``tune`` is heeded.
    on_net : callable, optional
        (net, facts of the MethodStep) -> context manager, inside which a real net runs these operations.
    make : callable, optional
        TunedLayer -> ActivationStore, a new one for each tuned layer.
    describe : callable, optional
        TunedLayer -> what the store says of itself in a trace. Default: it is made and asked.
    ranks : {None, "given", "mean-free"}
        Whether the store has the ranks of ``--ranks`` or the spectra, or these with the mean's direction left out.
    calibration : {None, "plain", "mean-free", "center"}
        How fixed subspaces are found.
    fidelity : callable or str
        (input shape of a layer, settings) -> (estimate, least, most), how much of the layer's weight gradient is kept;
        or :data:`ENERGY`; or why that is not predicted.
    begin : callable, optional
        (:class:`experiments.finetune.methods.Start`) -> dict of notes: what is done to a net before it is fine-tuned.
        Default: every tuned layer gets a store.
    layers : bool
        Whether it matters how many layers are tuned.
    parts : bool
        Whether the batch runs in parts, each with statistics of its own.
    ops : tuple of str
        Operations of the layers whose input the store takes. Default: those of all layers with weights.
    """

    about: str
    settings: tuple[Setting, ...] = ()
    tune: Mapping[str, str] = field(default_factory=dict)
    runs: Callable[[TracedStep, Settings], MethodStep] | None = None
    on_net: Callable[[Module, Mapping[str, Any]], AbstractContextManager[Any]] | None = None
    make: Callable[[TunedLayer], ActivationStore] | None = None
    describe: Callable[[TunedLayer], Description] | None = None
    ranks: str | None = None
    calibration: str | None = None
    fidelity: Callable[[tuple[int, ...], Settings], Kept] | str = "there is no formula for it"
    begin: Callable[[Any], dict[str, Any]] | None = None
    layers: bool = True
    parts: bool = False
    ops: tuple[str, ...] = ("conv2d", "linear", "conv3d", "conv_transpose2d")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its settings."""
        return tuple(setting.name for setting in self.settings)


METHODS: dict[str, Method] = {}
"""Every method by its name on the command line, in the order of ``--method all``."""


def method(name: str, about: str, **fields: Any) -> Method:
    """Register a method: from then on every command knows it.

    Parameters
    ----------
    name : str
        On the command line.
    about : str
        In a few words.
    **fields
        The other attributes of :class:`Method`.

    Raises
    ------
    TypeError
        If a field is unknown.
    ValueError
        If the name is taken or is no name, or one of its settings is known with another meaning.
    """
    entry = Method(about, **fields)
    if not name or name in (*METHODS, "all") or set(name) & set(" @,=;/\\") or not name.isprintable():
        taken = "which is taken" if name in (*METHODS, "all") else "expected a word without spaces and without @,=;/"
        raise ValueError(f"a method is called {name!r}, {taken}")
    for setting in entry.settings:
        if KNOWN.get(setting.name, setting) != setting:
            raise ValueError(f"setting {setting.name!r} of method {name!r} means something else in another method")
    KNOWN.update({setting.name: setting for setting in entry.settings})
    METHODS[name] = entry
    return entry


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
    from analysis.rules.account import with_described_stores
    from analysis.steps.changes import in_subspace

    method = METHODS[name]
    changed = MethodStep(step.records)
    if method.runs is not None or method.tune:
        changed = step.remember((name, *settings.of(method.names).values()), lambda: _changed(method, step, settings))
    stores: dict[str, Description] = {}
    if method.make is not None:
        _check_compressible(name, step)
        paths = tuned if method.ranks is None else ranks
        layers = tuned_layers(step.dtype, {path: tuned[path] for path in paths}, ranks, settings)
        stores = {layer.path: (method.describe or _made(method))(layer) for layer in layers}
    changed = replace(changed, records=with_described_stores(changed.records, stores), stores=stores)
    if settings.of(method.names).get("update") == "subspace":
        changed = in_subspace(changed)
    return replace(changed, ranks=ranks, settings=settings)


def _check_compressible(name: str, step: TracedStep) -> None:
    """Raise NotApplicableError for a tuned layer whose input the method's store does not take."""
    from analysis.rules.account import WEIGHTED
    from analysis.rules.recompute import flatten

    for record in flatten(step.records):
        if record.op in WEIGHTED and record.op not in METHODS[name].ops and record.path in step.tuned_layers:
            raise NotApplicableError(
                f"layer {record.path!r} is a {record.op}, whose input {name} does not compress; tune others"
            )


def tuned_layers(
    dtype: Any,
    shapes: Mapping[str, tuple[int, ...]],
    ranks: Mapping[str, Ranks],
    settings: Settings,
    seed: int = 0,
) -> Iterator[TunedLayer]:
    """What a method must know of each of these layers to make a store; one source of random numbers for all."""
    import numpy as np

    rng = np.random.default_rng(seed)
    for path, shape in shapes.items():
        yield TunedLayer(path, shape, np.dtype(dtype), ranks.get(path, ()), settings, rng)


def _made(method: Method) -> Callable[[TunedLayer], Description]:
    return lambda layer: method.make(layer).describe()  # type: ignore[misc]


def _changed(method: Method, step: TracedStep, settings: Settings) -> MethodStep:
    """What a method runs in place of the plain step, activation stores aside."""
    from analysis.steps.changes import retrained, trained_parameters

    changed = MethodStep(step.records) if method.runs is None else method.runs(step, settings)
    if not method.tune:
        return changed
    trains = trained_parameters(step, method.tune) | set(changed.facts.get("parameters", ()))
    return replace(changed, records=retrained(changed.records, trains))


# ---- on the command line -----------------------------------------------------------------------


def add_settings(
    parser: argparse.ArgumentParser,
    methods: Mapping[str, Any] = METHODS,
    grids: bool = False,
    later: Mapping[str, Any] | None = None,
) -> None:
    """An option for every setting of methods.

    Parameters
    ----------
    parser : ArgumentParser
    methods : mapping of name to method
        With ``settings`` each. Default: those of the register.
    grids : bool
        Whether an option takes several values, by default the setting's grid, as the planner does. Settings without a
        grid are left out then.
    later : mapping of setting to default, optional
        Of settings whose default is only known beside other options: the option is None where it is not given.

    Raises
    ------
    ValueError
        If the command has an option of that name already.
    """
    for setting in {setting.name: setting for method in methods.values() for setting in method.settings}.values():
        if grids and setting.grid is None:
            continue
        heeding = ", ".join(name for name, of in methods.items() if setting in of.settings)
        default = (later or {}).get(setting.name, setting.default)
        several: dict[str, Any] = {"nargs": "+", "default": list(setting.grid or ())} if grids else {}
        stated = several.get("default", [default])
        shown = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in stated if value)
        one = {"default": None if later and setting.name in later else default}
        said = re.sub(r" \([^()]*\)$", "", setting.help) if shown else setting.help  # the default is told once
        try:
            parser.add_argument(
                setting.option, type=setting.check,
                help=f"for {heeding}: {said}{f' ({shown})' if shown else ''}", **(several or one),
            )  # fmt: skip
        except argparse.ArgumentError:
            raise ValueError(
                f"setting {setting.name!r} of method {heeding} has the name of an option of this command"
            ) from None


def listed() -> str:
    """Every method with what it does, a line each, for the end of a help."""
    from analysis.commands.command_line import listing

    return listing("methods", {name: of.about for name, of in METHODS.items()})


def check_methods_heed(options: argparse.Namespace, methods: Iterable[str]) -> None:
    """Raise ValueError for an option of methods that none of the chosen methods has."""
    chosen = [METHODS[name] for name in methods]
    for name, setting in KNOWN.items():
        heeding = [known for known, of in METHODS.items() if setting in of.settings]
        effective = any(setting in of.settings for of in chosen)
        check_effect(options, name, effective, f"one of {', '.join(heeding)}")
    ranked = [known for known, of in METHODS.items() if of.ranks is not None]
    for name in ("epsilon", "ranks", "spectra"):
        check_effect(options, name, any(of.ranks for of in chosen), f"one of {', '.join(ranked)}")
