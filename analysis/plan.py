"""What fits a device: ``python -m analysis.plan --net mcunet --budget 4MiB --spectra FILE``.

Which methods and settings fit its RAM, with how many layers and which batch, ranked by predicted gradient fidelity;
what does not fit, and by how much. Nothing runs: the net is traced on shapes alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from analysis.commands.cli import (
    NET_HELP,
    OneLineParser,
    any_file,
    check_effect,
    check_no_effect,
    check_once,
    count,
    figure_file,
    input_shape,
    nets_and_data,
    pixels,
    positive,
    run_command,
    run_main,
    share,
)
from analysis.planner.options import (
    ASSUMED_FRACTION,
    DEFAULT_BATCHES,
    DEFAULT_EPSILONS,
    options_for,
    parse_bytes,
    parse_fraction_of_modes,
    parse_times,
    unit_of,
)
from analysis.steps.methods import METHODS, check_methods_heed, chosen_methods
from analysis.steps.register import add_settings, listed
from analysis.steps.settings import KNOWN

if TYPE_CHECKING:
    from analysis.planner.costs import Costs, Device
    from analysis.planner.device_costs import DeviceCosts
    from analysis.planner.search import Plan
    from analysis.ranks.spectra_file import Spectra


SHARES = {"layers": "the same for every layer", "parameters": "in proportion to its weights"}
UPDATES = ("batch", "image")
DEFAULT_DIRECTIONS = (8, 16, 24)


def parser() -> argparse.ArgumentParser:
    p = OneLineParser(
        prog="python -m analysis.plan",
        description="Which methods and settings fit a device's RAM, with how many layers and which batch, ranked by "
        "predicted gradient fidelity; what does not fit, and by how much.\n\n"
        "Example: lance-ref plan --net mcunet --image-size 32 --num-classes 10 --budget 256KiB",
        allow_abbrev=False,
        epilog=f"{listed()}\n\n{nets_and_data(False)}",
    )
    p.add_argument("--net", required=True, help=NET_HELP)
    p.add_argument("--budget", required=True, help="RAM of the device, as 256KiB, 1.5MiB or 300000B")
    p.add_argument("--flops-at-most", help="most multiply-adds, as 1.5x of backpropagation through the same layers")
    p.add_argument("--spectra", help="file that lance-ref spectra wrote (the one of the package, if any)")
    p.add_argument("--batch", type=count, nargs="+", default=list(DEFAULT_BATCHES), help="batch sizes to try")
    p.add_argument("--layers", type=count, help="tune at most so many, from the last on (all)")
    p.add_argument(
        "--method",
        "--methods",
        nargs="+",
        default=["all"],
        metavar="METHOD",
        help="names of the list below, or all (all)",
    )
    p.add_argument("--epsilon", type=share, nargs="+", help="energy thresholds of ranks from spectra (0.7 0.9 0.99)")
    p.add_argument(
        "--ranks",
        nargs="+",
        help="fractions of each mode in place of thresholds, or beside --epsilon (without spectra: 0.25)",
    )
    add_settings(p, grids=True)
    p.add_argument(
        "--count", default="peak", choices=["peak", "kept"],
        help="peak: the simulated peak of a step; kept: tape, gradients and optimiser state alone",
    )  # fmt: skip
    p.add_argument(
        "--weights", default="flash", choices=["flash", "ram"], help="where weights are that do not train (flash)"
    )
    p.add_argument(
        "--calibration", default="device", choices=["device", "elsewhere"],
        help="whether lance's Gram matrices have to fit too (device)",
    )  # fmt: skip
    p.add_argument(
        "--optimizer", default="sgd", choices=["sgd", "sgd-momentum", "adam"], help="its state is in RAM (sgd)"
    )
    p.add_argument(
        "--shares", default="layers",
        help="shares of the gradient's energy: layers (the same for each), parameters, or a JSON file by layer",
    )  # fmt: skip
    p.add_argument(
        "--engine", default="both", choices=["library", "device", "both"],
        help="library: steps of lance_ref on whole batches; device: compiled programs, one image at a time (both)",
    )  # fmt: skip
    p.add_argument(
        "--directions", type=count, nargs="+", default=list(DEFAULT_DIRECTIONS), metavar="N",
        help="of --engine device: directions of the channels that lance keeps (8 16 24)",
    )  # fmt: skip
    p.add_argument(
        "--update-after", nargs="+", choices=UPDATES, default=list(UPDATES),
        help="of --engine device: whether the weights change after a batch, or after each image (batch image)",
    )  # fmt: skip
    p.add_argument("--image-size", type=pixels, help="height and width in pixels")
    p.add_argument("--input-shape", type=input_shape, help="of one input, as 3,32,32 or 784, in place of --image-size")
    p.add_argument("--num-classes", type=count, help="outputs of the classifier (1000; a factory's own)")
    p.add_argument("--dtype", default="float32", choices=["float32", "float64"], help="of all numbers (float32)")
    p.add_argument("--format", default="table", choices=["table", "json", "csv"], help="of the output (table)")
    p.add_argument(
        "--json", dest="format", action="store_const", const="json", default=argparse.SUPPRESS,
        help="the same as --format json",
    )  # fmt: skip
    p.add_argument(
        "--gmacs-per-second", type=positive, metavar="N",
        help="what the machine does, in billions of multiply-adds a second: adds an estimate of the time of a step",
    )  # fmt: skip
    p.add_argument(
        "--plot", type=figure_file, metavar="FILE",
        help="draw RAM by kind, the budget and what is known of accuracy into this .png or .svg, whole or not at all",
    )  # fmt: skip
    p.add_argument("--output", type=any_file, help="write the result to this file (the terminal)")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> None:
    from dataclasses import replace

    from analysis.commands.console import emit
    from analysis.planner.costs import Device
    from analysis.planner.tables import csv_text, drawn, json_text

    library = Device(options.count, options.weights, options.calibration, options.optimizer)
    device = Device("program", "flash", "elsewhere", options.optimizer) if options.engine == "device" else library
    if options.engine == "both":
        plan = make_both(options, library)
    else:
        plan = make_device_plan(options) if options.engine == "device" else make_plan(options, library)
    plan = with_code(options, plan, library)
    if options.gmacs_per_second is not None:
        plan = replace(plan, macs_per_second=1e9 * options.gmacs_per_second)
    if options.plot is not None:
        from analysis.planner.plots import draw

        draw(plan, options.plot)
    texts = {"json": lambda: json_text(plan, device), "csv": lambda: csv_text(plan)}
    emit(drawn(plan, device), texts, options.format, options.output)


def with_code(options: argparse.Namespace, plan: Plan, device: Device) -> Plan:
    """The plan, with Python that runs the first candidate; or, where nothing fits, with what would."""
    from dataclasses import replace

    from analysis.planner.code import code_for
    from analysis.steps.nets import input_shape_for

    if not plan.fitting:
        return replace(plan, facts={**plan.facts, "smaller": _what_would_fit(options, plan)})
    first = plan.fitting[0].best
    assert first is not None
    shape = input_shape_for(options.net, options.image_size, options.input_shape)
    code = code_for(first, options.net, shape, int(plan.facts["classes"]), options.dtype, device.optimizer)
    return replace(plan, facts={**plan.facts, "code": code})


SMALLER_SIZES = (192, 160, 128, 96, 64, 48, 32)
FEWER_CLASSES = (100, 10, 2)


def _what_would_fit(options: argparse.Namespace, plan: Plan) -> str:
    """Where nothing fits: the largest image, the most classes, of a few that are tried, with which something does."""
    from lance_ref import models

    built_in = options.net.partition("@")[0]
    if built_in not in models.names() or plan.closest is None or not plan.closest.over_bytes:
        return plan.facts.get("smaller", "")
    found = []
    size = options.image_size or (models.NETS[built_in].input_shape[-1] if options.input_shape is None else 0)
    images = len(models.NETS[built_in].input_shape) == 3 and options.input_shape is None
    for name, values, now in (
        ("image-size", SMALLER_SIZES if images else (), size),
        ("num-classes", FEWER_CLASSES, int(plan.facts["classes"])),
    ):
        for value in values:
            if value < now and _fits(options, name, value):
                found.append(f"--{name} {value}")
                break
    return f"Something fits with {' or with '.join(found)}." if found else plan.facts.get("smaller", "")


def _fits(options: argparse.Namespace, name: str, value: int) -> bool:
    """Whether the head alone fits with another value of an option: there is nothing that takes less."""
    from analysis.planner.costs import Device

    library = Device(options.count, options.weights, options.calibration, options.optimizer)
    changed = {name.replace("-", "_"): value, "method": ["head-only"]}
    left = parser().parse_args(["--net", options.net, "--budget", options.budget])
    kept = ("image_size", "input_shape", "num_classes", "dtype", "optimizer", "batch", "engine")
    asked = argparse.Namespace(**{**vars(left), **{key: getattr(options, key) for key in kept}, **changed})
    try:
        if options.engine != "library" and make_device_plan(asked).fitting:
            return True
        return options.engine != "device" and bool(make_plan(asked, library).fitting)
    except (ValueError, LookupError):
        return False


def make_both(options: argparse.Namespace, library: Device) -> Plan:
    """One plan of both engines; without rows of device programs, and with the reason, where there are none.

    Raises as :func:`make_plan`.
    """
    from dataclasses import replace

    from analysis.device.programs import DEVICE_METHODS
    from analysis.planner.search import merged

    plan = make_plan(options, library)
    programs = [name for name in chosen_methods(options.method) if name in DEVICE_METHODS and name != "lance-mean-free"]
    if not programs or options.optimizer == "adam":
        why = "adam has none" if programs else f"{' and '.join(options.method)} has none"
        return replace(plan, facts={**plan.facts, "device": f"device programs: {why}"})
    try:
        device = make_device_plan(argparse.Namespace(**{**vars(options), "method": programs, "engine": "both"}))
    except ValueError as error:
        return replace(plan, facts={**plan.facts, "device": f"device programs: none, for {error}"})
    return merged(plan, device)


def make_plan(options: argparse.Namespace, device: Device) -> Plan:
    """The plan for the options of the command line.

    Raises ValueError, TypeError, LookupError or OSError in one line that names what came and what is allowed.
    """
    from dataclasses import replace

    from analysis.peak.memory import ESTIMATED, estimated
    from analysis.planner.fidelity import why_not
    from analysis.planner.search import search
    from analysis.rules.recompute import flatten
    from analysis.steps.nets import remark

    budget = parse_bytes(options.budget)
    times = None if options.flops_at_most is None else parse_times(options.flops_at_most)
    methods = chosen_methods(options.method)
    fractions = [parse_fraction_of_modes(text) for text in options.ranks or []]
    epsilons = list(DEFAULT_EPSILONS) if options.epsilon is None else options.epsilon
    grids = {name: getattr(options, name) for name, setting in KNOWN.items() if setting.grid is not None}
    for name in ("batch", "epsilon", *grids):
        if getattr(options, name) is not None:
            check_once(options, name)
    if len(set(fractions)) < len(fractions):
        raise ValueError(f"--ranks is {' '.join(options.ranks)}, expected each once")
    _check_effects(options, methods)
    costs, ranks_from = _costs(options, device)
    if costs.spectra is None:
        if options.epsilon is not None:
            raise ValueError("--epsilon needs spectra: give --spectra with a file from python -m analysis.spectra")
        epsilons, fractions = [], fractions or [ASSUMED_FRACTION]
    elif options.ranks and options.epsilon is None:
        epsilons = []
    tried = options_for(methods, epsilons, fractions, grids)
    predicted = any(METHODS[of.method].layers and not why_not(of, costs.spectra is not None) for of in tried)
    check_effect(options, "shares", predicted, "a method whose fidelity is predicted")
    plan = search(costs, tried, options.batch, budget, times, options.shares, options.layers)
    size = "x".join(map(str, costs.input_shape))
    step = costs.whole(_first(options, costs))
    remarks = [remark(costs.net)]
    if costs.device.count == "peak":
        remarks += [f"peak of {what}: {ESTIMATED}" for what in estimated(flatten(step.records))]
    facts = {
        "net": f"{options.net}, input {size}, {step.num_classes} classes, {options.dtype}",
        "ranks": ranks_from,
        "shares": SHARES.get(options.shares, f"from {options.shares}"),
        "classes": str(step.num_classes),
        "remark": "; ".join(filter(None, remarks)),
        "smaller": _smaller(options, plan),
    }
    return replace(plan, facts=facts, unit=unit_of(options.budget))


def make_device_plan(options: argparse.Namespace) -> Plan:
    """The plan for device programs.

    Raises
    ------
    ValueError, TypeError, LookupError, OSError
        As of :func:`make_plan`, and if no device can run the net, or there is no program of a method.
    """
    from dataclasses import replace

    from analysis.device.programs import DEVICE_METHODS, why_not
    from analysis.planner.device_costs import DeviceCosts, device_options
    from analysis.planner.search import search
    from analysis.steps.nets import build, check_classes, input_shape_for

    budget = parse_bytes(options.budget)
    times = None if options.flops_at_most is None else parse_times(options.flops_at_most)
    if options.engine == "device":
        library = ("batch", "epsilon", "ranks", "count", "weights", "calibration", *KNOWN)
        why = "--engine device has one image at a time, weights in flash and directions alone"
        check_no_effect(options, library, why)
    programs = [name for name in DEVICE_METHODS if name != "lance-mean-free"]  # of the sizes of lance
    methods = programs if list(options.method) == ["all"] else chosen_methods(options.method)
    for name in methods:
        if name not in programs:
            why = "it has the sizes of lance" if name in DEVICE_METHODS else why_not(name)
            raise ValueError(f"--method {name} has no plan with --engine device: {why}")
    for name in ("directions", "update_after"):
        check_once(options, name)
    check_effect(options, "directions", "lance" in methods, "--method lance")
    shape = input_shape_for(options.net, options.image_size, options.input_shape)
    net = build(options.net, options.num_classes, shape, without_weights=False)
    spectra, where = _spectra(options, shape)
    costs = DeviceCosts(net, options.net, shape, options.dtype, spectra, budget, options.optimizer)
    classes = costs.whole(1).num_classes
    check_classes(options.net, options.num_classes, classes)
    tried = device_options(methods, options.directions, options.update_after)
    plan = search(costs, tried, (1,), budget, times, options.shares, options.layers)
    facts = {
        "net": f"{options.net}, input {'x'.join(map(str, shape))}, {classes} classes, {options.dtype}",
        "ranks": "--directions, of channels alone" + ("" if spectra is None else f"; {where}"),
        "shares": SHARES.get(options.shares, f"from {options.shares}"),
        "classes": str(classes),
        "remark": _beside_the_library(costs, plan),
        "smaller": _smaller(options, plan),
    }
    return replace(plan, facts=facts, unit=unit_of(options.budget))


def _beside_the_library(costs: DeviceCosts, plan: Plan) -> str:
    """What the library's step takes where a device program fits, and why that is more."""
    first = next((row.best for row in plan.fitting if row.best is not None and row.option.method == "lance"), None)
    if first is None:
        return ""
    memory = costs.in_the_library(first.option, first.layers)
    return (
        f"The library's engine takes {memory.total / 2**10:,.1f} KiB for {first.option.method} with these "
        f"{first.layers} layers and one image: it holds whole maps while it runs, and the whole weights that train, "
        "with their gradients. A device program makes hidden maps channel by channel, large maps tile by tile, and "
        "trains the weights within their directions"
    )


def _check_effects(options: argparse.Namespace, methods: Sequence[str]) -> None:
    """Options that change nothing beside the others are refused before the work."""
    check_methods_heed(options, methods)
    for name in ("directions", "update_after"):
        check_effect(options, name, options.engine != "library", "--engine device or both")
    check_effect(options, "image_size", options.input_shape is None, "no --input-shape, which states height and width")
    calibrated = [name for name, method in METHODS.items() if method.calibration]
    check_effect(options, "calibration", bool(set(calibrated) & set(methods)), f"one of {', '.join(calibrated)}")
    without = [name for name, method in METHODS.items() if not method.layers]
    check_effect(options, "layers", not set(methods) <= set(without), f"another method than {', '.join(without)}")


def _smaller(options: argparse.Namespace, plan: Plan) -> str:
    """Where nothing fits: the options left at their defaults that make a step smaller."""
    from lance_ref import models

    if plan.closest is None or not plan.closest.over_bytes:
        return ""
    built_in = options.net.partition("@")[0]
    of_vectors = built_in in models.NETS and len(models.NETS[built_in].input_shape) == 1
    fixed = of_vectors or options.net.endswith(".onnx")
    left = {
        "--image-size": options.image_size is None and options.input_shape is None and not fixed,
        "--num-classes": options.num_classes is None and built_in in models.names(),
        "--batch": plan.closest.batch > 1,
    }
    names = [name for name, there in left.items() if there]
    return f"A smaller {' or '.join(names)} may help." if names else ""


def _costs(options: argparse.Namespace, device: Device) -> tuple[Costs, str]:
    """The net, with spectra if there are any, and where the ranks come from."""
    from analysis.planner.costs import Costs
    from analysis.ranks.choose import ranks_from_spectra
    from analysis.steps.nets import build, check_classes, input_shape_for

    shape = input_shape_for(options.net, options.image_size, options.input_shape)
    net = build(options.net, options.num_classes, shape, without_weights=True)
    spectra, where = _spectra(options, shape)
    costs = Costs(net, options.net, shape, device, options.dtype, spectra)
    first = _first(options, costs)
    check_classes(options.net, options.num_classes, costs.whole(first).num_classes)
    if spectra is None:
        return costs, where
    ranks_from_spectra(spectra, costs.shapes(first), 1.0, where)  # looks at every layer and its shape
    return costs, f"{where}: {spectra.source}"


def _first(options: argparse.Namespace, costs: Costs) -> int:
    """The first batch size that the net runs on."""
    batches: list[int] = options.batch
    return next((batch for batch in batches if not costs.runs(batch)), batches[0])


def _spectra(options: argparse.Namespace, input_shape: tuple[int, ...]) -> tuple[Spectra | None, str]:
    """Those that were given or shipped, and the words for where they come from."""
    from analysis.ranks.choose import shipped_spectra
    from analysis.ranks.spectra_file import load_spectra

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


if __name__ == "__main__":
    sys.exit(run_main(main))
