"""What was asked for on the command line: the limit, the input, and the costs of the net on either engine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from analysis.commands.cli import check_effect
from analysis.planner.costs import Costs, Device
from analysis.planner.device_costs import DeviceCosts
from analysis.planner.options import ASSUMED_FRACTION, Target, parse_bytes, parse_target
from analysis.ranks.choose import ranks_from_spectra, shipped_spectra
from analysis.ranks.spectra_file import Spectra, load_spectra
from analysis.steps.nets import build, check_classes, input_shape_for


def device_of(options: argparse.Namespace) -> Device:
    """How the memory of the options is counted."""
    if options.engine == "device":
        return Device("program", options.weights, "elsewhere", options.optimizer)
    where = "elsewhere" if options.calibration == "elsewhere" else "device"
    return Device(options.count, options.weights, where, options.optimizer)


def limit_of(options: argparse.Namespace) -> int | Target:
    """The budget, or the target in its place."""
    if (options.budget is None) == (options.target is None):
        given = "neither" if options.budget is None else "both"
        raise ValueError(
            f"{given} of --budget and --target {'is' if given == 'neither' else 'are'} given, expected one"
        )
    check_effect(options, "largest", options.target is None, "--budget")
    return parse_target(options.target) if options.budget is None else parse_bytes(options.budget)


def shape_of(options: argparse.Namespace) -> tuple[int, ...]:
    """The shape of one input."""
    return input_shape_for(options.net, options.image_size, options.input_shape)


def _tune(options: argparse.Namespace) -> str | Sequence[str]:
    if options.tune in (None, ["best"]):
        return "all"
    return str(options.tune[0]) if len(options.tune) == 1 else tuple(options.tune)


def library_costs(options: argparse.Namespace, shape: tuple[int, ...]) -> tuple[Costs, str]:
    """The net, with spectra if there are any, and where the ranks come from."""
    net = build(options.net, options.num_classes, shape, without_weights=True)
    spectra, where = _spectra(options, shape)
    costs = Costs(net, options.net, shape, device_of(options), options.dtype, spectra, _tune(options))
    first = first_batch(options, costs)
    check_classes(options.net, options.num_classes, costs.whole(first).num_classes)
    if spectra is None:
        return costs, where
    ranks_from_spectra(spectra, costs.shapes(first), 1.0, where)  # looks at every layer and its shape
    return costs, f"{where}: {spectra.source}"


def device_costs(options: argparse.Namespace, shape: tuple[int, ...]) -> tuple[DeviceCosts, str]:
    """The net with weights, for device programs, and where spectra come from."""
    net = build(options.net, options.num_classes, shape, without_weights=False)
    spectra, where = _spectra(options, shape)
    limit = limit_of(options)
    weights = "int8" if options.weights == "int8" else "flash"
    costs = DeviceCosts(
        net, options.net, shape, options.dtype, spectra, None if isinstance(limit, Target) else limit,
        options.optimizer, _tune(options), weights,
    )  # fmt: skip
    return costs, where


def first_batch(options: argparse.Namespace, costs: Costs) -> int:
    """The first batch size that the net runs on."""
    batches: list[int] = options.batch
    return next((batch for batch in batches if not costs.runs(batch)), batches[0])


def _spectra(options: argparse.Namespace, input_shape: tuple[int, ...]) -> tuple[Spectra | None, str]:
    """Those that were given or shipped, and the words for where they come from."""
    if options.spectra is not None:
        return load_spectra(options.spectra), f"--spectra {options.spectra}"
    shipped = shipped_spectra(options.net, input_shape)
    if shipped is not None:
        return load_spectra(shipped), f"spectra shipped as analysis/data/{shipped.name}"
    fractions = "the fractions of --ranks" if options.ranks else f"a quarter of each mode ({ASSUMED_FRACTION})"
    return None, (
        f"assumed: {fractions}, for there are no spectra of {options.net} at {'x'.join(map(str, input_shape))}; what "
        "they keep is not known, so the fidelity of methods with ranks is not predicted. Give --spectra with a file "
        "from python -m analysis.spectra"
    )
