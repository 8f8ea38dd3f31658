"""The plans of the command: what was asked for becomes costs, options, a search, and code of what comes first."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from analysis.commands.cli import check_effect, check_no_effect, check_once
from analysis.device.programs import DEVICE_METHODS
from analysis.device.programs import why_not as why_no_program
from analysis.peak.memory import ESTIMATED, estimated
from analysis.planner.answer import amount
from analysis.planner.asked import device_costs, first_batch, library_costs, limit_of, shape_of
from analysis.planner.code import code_for
from analysis.planner.costs import Costs
from analysis.planner.device_costs import DeviceCosts, device_options
from analysis.planner.fidelity import why_not
from analysis.planner.inverse import by_memory, least, room, smaller, what_would_fit
from analysis.planner.options import (
    ASSUMED_FRACTION,
    DEFAULT_EPSILONS,
    Option,
    Target,
    calibrated,
    in_parts,
    options_for,
    parse_fraction_of_modes,
    parse_times,
    unit_of,
)
from analysis.planner.search import Plan, merged, search
from analysis.planner.sets import with_sets
from analysis.rules.recompute import flatten
from analysis.steps.methods import METHODS, check_methods_heed, chosen_methods
from analysis.steps.nets import check_classes, remark
from analysis.steps.settings import KNOWN

SHARES = {"layers": "the same", "parameters": "in proportion to its weights"}
PROGRAMS = tuple(name for name in DEVICE_METHODS if name != "lance-mean-free")
"""Methods of device programs; lance's are mean-free wherever they can be, and have the same sizes."""


def plan_of(options: argparse.Namespace) -> Plan:
    """The plan that was asked for: with code that runs what comes first, or with what would fit where nothing does.

    Raises
    ------
    ValueError, TypeError, LookupError, OSError
        In one line that names what came and what is allowed.
    """
    limit = limit_of(options)
    plan = {"library": library_plan, "device": device_plan, "both": both_plans}[options.engine](options)
    if not plan.fitting:
        if isinstance(limit, Target):
            return replace(plan, facts={**plan.facts, "reach": _reach(plan, limit)})
        return replace(plan, facts={**plan.facts, "smaller": what_would_fit(options, plan)})
    first = plan.fitting[0].best
    assert first is not None
    shape, classes = shape_of(options), int(plan.facts["classes"])
    stored = ', and program.export_c(folder, weights="int8") to write it as C' if first.memory.flash else ""
    facts = {"weights": stored if options.weights == "int8" else ""}
    facts |= {"code": code_for(first, plan, options.net, shape, classes, options.dtype, options.optimizer)}
    if options.largest:
        facts["room"] = (
            f"With all else as it is, these are the largest that fit: {'; '.join(room(options, plan, first))}."
        )
    return replace(plan, facts={**plan.facts, **facts})


def _searched(costs: Costs, tried: Sequence[Option], options: argparse.Namespace, batches: Sequence[int]) -> Plan:
    """The plan of one engine, without what is said of it."""
    limit = limit_of(options)
    times = None if options.flops_at_most is None else parse_times(options.flops_at_most)
    if isinstance(limit, Target):
        plan = least(costs, tried, batches, limit, times, options.shares, options.layers)
        return replace(plan, unit=_unit(plan.budget))
    improve = with_sets if options.tune == ["best"] and not isinstance(costs, DeviceCosts) else None
    plan = search(costs, tried, batches, limit, times, options.shares, options.layers, improve)
    return replace(plan, unit=unit_of(options.budget))


def _unit(nbytes: int) -> str:
    """The unit in which this number of bytes is easiest to read."""
    return "KiB" if nbytes < 2**20 else "MiB" if nbytes < 2**30 else "GiB"


# ---- one engine ----------------------------------------------------------------------------------


def library_plan(options: argparse.Namespace) -> Plan:
    """The plan for steps of the library. Raises as :func:`plan_of`."""
    methods = chosen_methods(options.method)
    if list(options.method) == ["all"]:  # every method takes a batch in parts
        methods = tuple(name for name in methods if not METHODS[name].parts)
    fractions = [parse_fraction_of_modes(text) for text in options.ranks or []]
    epsilons = list(DEFAULT_EPSILONS) if options.epsilon is None else options.epsilon
    grids = {name: getattr(options, name) for name, setting in KNOWN.items() if setting.grid is not None}
    for name in ("batch", "epsilon", *grids):
        if getattr(options, name) is not None:
            check_once(options, name)
    if len(set(fractions)) < len(fractions):
        raise ValueError(f"--ranks is {' '.join(options.ranks)}, expected each once")
    _check_effects(options, methods)
    costs, ranks_from = library_costs(options, shape_of(options))
    if costs.spectra is None:
        if options.epsilon is not None:
            raise ValueError("--epsilon needs spectra: give --spectra with a file from python -m analysis.spectra")
        epsilons, fractions = [], fractions or [ASSUMED_FRACTION]
    elif options.ranks and options.epsilon is None:
        epsilons = []
    tried = options_for(methods, epsilons, fractions, grids, combined=True)
    if len(options.batch) > 1:
        tried = in_parts(tried, max(options.batch))
    if options.calibration == "both":
        tried = calibrated(tried)
    predicted = any(METHODS[of.method].layers and not why_not(of, costs.spectra is not None) for of in tried)
    check_effect(options, "shares", predicted, "a method whose fidelity is predicted")
    plan = _searched(costs, tried, options, options.batch)
    step = costs.whole(first_batch(options, costs))
    remarks = [remark(costs.net)]
    if costs.device.count == "peak":
        remarks += [f"peak of {what}: {ESTIMATED}" for what in estimated(flatten(step.records))]
    facts = _facts(options, plan, step.num_classes)
    return replace(plan, facts={**facts, "ranks": ranks_from, "remark": "; ".join(filter(None, remarks))})


def device_plan(options: argparse.Namespace) -> Plan:
    """The plan for device programs.

    Raises as :func:`plan_of`; ValueError also if no device can run the net, or there is no program of a method.
    """
    if options.engine == "device":
        library = ("batch", "epsilon", "ranks", "count", "calibration", *KNOWN)
        why = "--engine device has one image at a time, weights in flash and directions alone"
        check_no_effect(options, library, why)
        if options.weights == "ram":
            raise ValueError(f"--weights ram has no effect here: {why}")
    methods = PROGRAMS if list(options.method) == ["all"] else chosen_methods(options.method)
    for name in methods:
        if name not in PROGRAMS:
            why = "it has the sizes of lance" if name in DEVICE_METHODS else why_no_program(name)
            raise ValueError(f"--method {name} has no plan with --engine device: {why}")
    for name in ("directions", "update_after"):
        check_once(options, name)
    check_effect(options, "directions", "lance" in methods, "--method lance")
    costs, where = device_costs(options, shape_of(options))
    classes = costs.whole(1).num_classes
    check_classes(options.net, options.num_classes, classes)
    tried = device_options(methods, options.directions, options.update_after)
    plan = _searched(costs, tried, options, (1,))
    ranks = "--directions, of channels alone" + ("" if costs.spectra is None else f"; {where}")
    remark = _beside_the_library(costs, plan)
    return replace(plan, facts={**_facts(options, plan, classes), "ranks": ranks, "remark": remark})


def both_plans(options: argparse.Namespace) -> Plan:
    """One plan of both engines; without rows of device programs, and with the reason, where there are none.

    Raises as :func:`plan_of`.
    """
    plan = library_plan(options)
    methods = [name for name in chosen_methods(options.method) if name in PROGRAMS]
    if not methods or options.optimizer == "adam":
        why = "adam has none" if methods else f"{' and '.join(options.method)} has none"
        return replace(plan, facts={**plan.facts, "device": f"device programs: {why}"})
    try:
        device = device_plan(argparse.Namespace(**{**vars(options), "method": methods}))
    except ValueError as error:
        return replace(plan, facts={**plan.facts, "device": f"device programs: none, for {error}"})
    if options.target is None:
        return merged(plan, device)
    rows = sorted((*plan.rows, *device.rows), key=by_memory)
    budget = by_memory(rows[0])[0] if rows[0].best is not None else 0
    facts = {**plan.facts, "device": device.facts.get("remark", "")}
    return replace(plan, rows=tuple(rows), budget=budget, unit=_unit(budget), facts=facts)


def _facts(options: argparse.Namespace, plan: Plan, classes: int) -> dict[str, str]:
    """What both engines say of the net and of the options."""
    size = "x".join(map(str, shape_of(options)))
    return {
        "name": options.net,
        "net": f"{options.net}, input {size}, {classes} classes, {options.dtype}",
        "classes": str(classes),
        "shares": SHARES.get(options.shares, f"as {options.shares} says"),
        "smaller": smaller(options, plan),
    }


def _beside_the_library(costs: DeviceCosts, plan: Plan) -> str:
    """What the library's step takes where a device program fits, and why that is more."""
    first = next((row.best for row in plan.fitting if row.best is not None and row.option.method == "lance"), None)
    if first is None:
        return ""
    memory = costs.in_the_library(first.option, first.layers)
    return (
        f"The library's engine takes {amount(memory.total, plan.unit)} {plan.unit} for {first.option.method} with "
        f"these {first.layers} layers and one image: it holds whole maps while it runs, and the whole weights that "
        "train, with their gradients. A device program makes hidden maps channel by channel and large maps tile by "
        "tile, and trains the weights within their directions"
    )


def _check_effects(options: argparse.Namespace, methods: Sequence[str]) -> None:
    """Options that change nothing beside the others are refused before the work."""
    check_methods_heed(options, methods)
    for name in ("directions", "update_after"):
        check_effect(options, name, options.engine != "library", "--engine device or both")
    if options.tune == ["best"] and (options.engine == "device" or options.target is not None):
        raise ValueError("--tune best has no effect here: it needs --budget, and --engine library or both")
    check_effect(options, "layers", options.tune != ["best"], "--tune other than best, which chooses how many itself")
    if options.weights == "int8" and options.engine == "library":
        raise ValueError("--weights int8 has no effect here: the library has float32 weights, it needs --engine device")
    check_effect(options, "image_size", options.input_shape is None, "no --input-shape, which states height and width")
    kinds = [name for name, method in METHODS.items() if method.calibration]
    check_effect(options, "calibration", bool(set(kinds) & set(methods)), f"one of {', '.join(kinds)}")
    without = [name for name, method in METHODS.items() if not method.layers]
    for name in ("layers", "tune"):
        check_effect(options, name, not set(methods) <= set(without), f"another method than {', '.join(without)}")


def _reach(plan: Plan, target: Target) -> str:
    """Why a target is out of reach: the most that is known of any candidate, and what there is no prediction of."""
    if target.kind == "layers":
        return f"There are {len(plan.paths)} layers."
    if target.kind == "fidelity":
        return "Fidelities are predicted of weight gradients alone, and of methods with ranks where there are spectra."
    return "Accuracies are those of the committed experiments, of nets of the same family."
