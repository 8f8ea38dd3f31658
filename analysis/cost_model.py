"""Predict what one training step keeps and computes: ``python -m analysis.cost_model --net mobilenetv2``.

From the shell or, with :func:`cost`, from Python. Nothing runs: the net is traced on shapes alone.
With ``--measure`` one real step runs as well, and every number is compared.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from analysis.cli import OneLineParser, check_writable, one_line
from analysis.methods import METHODS, NotApplicableError, Settings, chosen_methods, method_step

if TYPE_CHECKING:
    from analysis.account import Billed, CostCache
    from analysis.calibration_costs import CalibrationCost
    from analysis.methods import MethodStep
    from analysis.nets import TracedStep
    from analysis.ranks import RankChoice
    from analysis.report import Report
    from lance_ref.nn.module import Module

DEFAULT_METHODS = ("bp", "lance")
DEFAULT_BATCH = 128
Shapes = dict[str, tuple[int, ...]]
Ranks = dict[str, tuple[int | None, ...]]


@dataclass(frozen=True)
class Prediction:
    """A report, and what it was made from.

    Attributes
    ----------
    report : Report
    step : TracedStep
        Of plain backpropagation.
    choice : RankChoice or None
        Where LANCE's ranks come from; None if no method has ranks.
    bills : dict of method to list of Billed
    ranks : dict of method to ranks by layer
        Empty for methods that have none.
    steps : dict of method to MethodStep
        What each method runs.
    settings : Settings
    """

    report: Report
    step: TracedStep
    choice: RankChoice | None
    bills: dict[str, list[Billed]]
    ranks: dict[str, Ranks]
    steps: dict[str, MethodStep]
    settings: Settings


def cost(
    net: str | Module | TracedStep,
    *,
    batch: int | None = None,
    method: str | Sequence[str] | None = None,
    image_size: int | None = None,
    input_shape: Sequence[int] | None = None,
    num_classes: int = 1000,
    tune: str | Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    epsilon: float = 0.7,
    ranks: str | None = None,
    spectra: str | None = None,
    convention: str = "flops",
    dtype: str | None = None,
    **settings: Any,
) -> Report:
    """The cost of one training step: what ``python -m analysis.cost_model`` prints, as a value.

    Parameters
    ----------
    net : str, Module or TracedStep
        A name of ``lance_ref.models.names()``, ``pkg.module:factory``, or a net, which is tuned in place
        and left in training mode; or a step that was traced already (:func:`analysis.nets.trace_step`).
    batch : int, optional
        Images of a step, 128 by default; a traced step has its own, and its own shapes, dtype and tuning.
    method : str or sequence of str, optional
        Names of :data:`analysis.methods.METHODS`, or ``"all"``; "bp" and "lance" by default. Those at "lance"'s ranks
        are "lance-mean-free" (orthogonal to the mean activation), "lance-center" (of the activation without it),
        "hosvd" and "asi".
    image_size, num_classes : int
        ``num_classes`` is for names and factories; a net has its own.
    input_shape : sequence of int, optional
        (C, H, W) or (N,), without the batch; in place of ``image_size``.
    tune : str or sequence of str, optional
        As for :func:`lance_ref.tune`; by default the last four layers, or all of a net that has fewer.
    methods : sequence of str, optional
        The same as ``method``.
    epsilon : float
        Energy threshold in (0, 1], for ranks from spectra.
    ranks, spectra : str, optional
        A fraction or ``"layer=r1,r2,r3,r4;layer=…"``, or a file of spectra; see :mod:`analysis.ranks`.
    convention : {"flops", "paper"}
        "paper": multiply-adds of forward and weight gradient of the tuned layers alone, the head left
        out, the projection billed B·C·H·W·Σr, the weight gradient in the papers' order.
    dtype : {"float32", "float64"}, optional
        A net is converted to it, in place; by default a net's own, and float32 for names.
    **settings
        Of the methods: the attributes of :class:`analysis.methods.Settings`.

    Returns
    -------
    Report

    Raises
    ------
    ValueError, TypeError, LookupError, OSError
        In one line that names what came and what is allowed.

    Examples
    --------
    >>> report = cost("mobilenetv2", batch=64, tune="last:2", method="bp")
    >>> report.totals["bp"].activation_bytes["paper"]
    16056320
    """
    if method is not None and methods is not None:
        raise ValueError(f"method is {method!r} and methods are {methods!r}, expected one of them")
    asked = next((given for given in (method, methods) if given is not None), DEFAULT_METHODS)
    return predict(
        net, batch, image_size, input_shape, num_classes, tune, asked, epsilon, ranks, spectra, convention, dtype,
        settings=Settings(**settings),
    ).report  # fmt: skip


def predict(
    net: str | Module | TracedStep,
    batch: int | None = None,
    image_size: int | None = None,
    input_shape: Sequence[int] | None = None,
    num_classes: int = 1000,
    tune: str | Sequence[str] | None = None,
    methods: str | Sequence[str] = DEFAULT_METHODS,
    epsilon: float = 0.7,
    ranks: str | None = None,
    spectra: str | None = None,
    convention: str = "flops",
    dtype: str | None = None,
    with_weights: bool = False,
    settings: Settings | None = None,
) -> Prediction:
    """As :func:`cost`, with what a measurement needs beside the report."""
    from analysis.account import CostCache, account
    from analysis.report import CONVENTIONS, Report

    names = chosen_methods(methods if isinstance(methods, str) else list(methods))
    settings = Settings() if settings is None else settings
    if convention not in CONVENTIONS:
        raise ValueError(f"convention is {convention!r}, expected one of {', '.join(CONVENTIONS)}")
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon is {epsilon}, expected a number in (0, 1]")
    step = _step(net, batch, image_size, input_shape, num_classes, tune, dtype, with_weights)
    tuned, choice = {}, None
    if any(METHODS[name].store is not None for name in names):
        tuned = _tuned_inputs(step)
    if any(METHODS[name].ranks is not None for name in names):
        choice = _choose_ranks(step, tuned, epsilon, ranks, spectra)
    cache, steps, given, bills, notes = CostCache(), {}, {}, {}, {}
    for name in names:
        try:
            given[name] = _ranks_of(name, choice, tuned)
            steps[name] = method_step(name, step, settings, given[name], tuned)
        except NotApplicableError as error:
            if list(names) != list(METHODS):
                raise ValueError(f"method {name!r} does not fit net {step.name!r}: {error}") from None
            notes[name] = str(error)
            given.pop(name, None)
            continue
        of_step = steps[name]
        bills[name] = account(of_step.records, step.head, of_step.repeats, None if of_step.own_trace else cache)
    shape = step.input_shape
    report = Report.of(
        bills,
        convention,
        net=step.name,
        batch=step.batch,
        image_size=shape[1] if len(shape) == 3 and shape[1] == shape[2] else None,
        num_classes=step.num_classes,
        dtype=step.dtype,
        tuned_layers=step.tuned_layers,
        ranks_from=choice.source if choice else "not needed: no method compresses",
        calibration=_calibrations(step, bills, given, tuned, settings, cache),
        settings={name: {**settings.of(METHODS[name]), **_shown(steps[name].facts)} for name in bills},
        notes=notes,
    )
    return Prediction(report, step, choice, bills, given, steps, settings)


def _step(
    net: str | Module | TracedStep,
    batch: int | None,
    image_size: int | None,
    input_shape: Sequence[int] | None,
    num_classes: int,
    tune: str | Sequence[str] | None,
    dtype: str | None,
    with_weights: bool,
) -> TracedStep:
    """The plain step: the one that was given, or that of a net, traced."""
    from analysis.nets import TracedStep, build, input_shape_for, trace_step

    if isinstance(net, TracedStep):
        own = {"batch": net.batch, "input_shape": net.input_shape, "dtype": net.dtype, "image_size": None, "tune": None}
        asked = {"batch": batch, "input_shape": input_shape, "dtype": dtype, "image_size": image_size, "tune": tune}
        for name, value in asked.items():
            if value is not None and (tuple(value) if name == "input_shape" else value) != own[name]:  # type: ignore[arg-type]
                raise ValueError(f"{name} is {value!r}, but the step of net {net.name!r} was traced already")
        return net
    for name, number in (("batch", batch), ("num_classes", num_classes), ("image_size", image_size)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}, expected a positive integer")
    title = net if isinstance(net, str) else type(net).__name__
    shape = input_shape_for(title, image_size, input_shape)
    module = build(net, num_classes, shape, not with_weights) if isinstance(net, str) else net
    if dtype is None:
        dtype = "float32" if isinstance(net, str) else str(next((p.dtype for p in net.parameters()), "float32"))
    return trace_step(module, title, shape, DEFAULT_BATCH if batch is None else batch, tune, dtype)


def _choose_ranks(
    step: TracedStep, tuned: Shapes, epsilon: float, ranks: str | None, spectra: str | None
) -> RankChoice:
    """The ranks; those of shipped spectra are read from their file once."""
    from analysis.ranks import choose_ranks

    if ranks is not None or spectra is not None:
        return choose_ranks(tuned, step.name, step.input_shape, epsilon, ranks, spectra)
    return _shipped_ranks(tuple(tuned.items()), step.name, step.input_shape, epsilon)


@lru_cache(maxsize=64)
def _shipped_ranks(
    tuned: tuple[tuple[str, tuple[int, ...]], ...], net: str, input_shape: tuple[int, ...], epsilon: float
) -> RankChoice:
    from analysis.ranks import choose_ranks

    return choose_ranks(dict(tuned), net, input_shape, epsilon, None, None)


def _ranks_of(name: str, choice: RankChoice | None, tuned: Shapes) -> Ranks:
    """The ranks of a method, by layer; none for a method without ranks."""
    from analysis.ranks import mean_free

    kind = METHODS[name].ranks
    if kind is None or choice is None:
        return {}
    if kind == "given":
        return dict(choice.ranks)
    try:
        return mean_free(choice.ranks, tuned)
    except ValueError as error:
        raise NotApplicableError(str(error)) from None


def _calibrations(
    step: TracedStep,
    bills: dict[str, list[Billed]],
    given: dict[str, Ranks],
    tuned: Shapes,
    settings: Settings,
    cache: CostCache,
) -> dict[str, CalibrationCost]:
    """The calibration of every method that has one, with what each step saves against a HOSVD at the same ranks."""
    from analysis.account import account
    from analysis.calibration_costs import calibration_cost, saved_per_step
    from analysis.recompute_rules import flatten

    costs = {}
    for name in bills:
        kind = METHODS[name].calibration
        if kind is None:
            continue
        hosvd = method_step("hosvd", step, settings, given[name], tuned)
        saved = saved_per_step(bills[name], account(hosvd.records, step.head, cache=cache))
        forward = sum(bill.cost.forward_macs for bill in bills[name])
        costs[name] = calibration_cost(
            flatten(step.records), forward, given[name], settings.calibration_batches, kind, saved
        )
    return costs


def _shown(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that a reader wants to see, without those that only a real run needs."""
    return {name: value for name, value in facts.items() if name not in ("parameters", "asked", "rank")}


def _tuned_inputs(step: TracedStep) -> dict[str, tuple[int, ...]]:
    """Input shape of every tuned layer that is called, batch first."""
    from analysis.account import WEIGHTED
    from analysis.recompute_rules import flatten

    shapes: dict[str, tuple[int, ...]] = {}
    for record in flatten(step.records):
        if record.path in step.tuned_layers and record.op in WEIGHTED:
            shape = record.inputs[0].shape
            if shapes.setdefault(record.path, shape) != shape:
                raise ValueError(
                    f"layer {record.path!r} is called with inputs of shapes {shapes[record.path]} and {shape}, "
                    "LANCE's factors fit one shape"
                )
    return shapes


# ---- the command line ----------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = OneLineParser(
        prog="python -m analysis.cost_model",
        description="What one training step keeps in memory and computes, per layer and under three accountings: "
        "paper (inputs of the tuned layers), pytorch (what PyTorch's autograd saves), tape (what lance_ref keeps).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--net", required=True, help="name of a built-in net, or pkg.module:factory")
    p.add_argument("--batch", type=int, default=DEFAULT_BATCH, help="images per step")
    p.add_argument("--image-size", type=int, help="height and width in pixels (224 for most nets)")
    p.add_argument("--input-shape", help="C,H,W or N, without the batch; in place of --image-size")
    p.add_argument("--num-classes", type=int, default=1000, help="outputs of the classifier")
    p.add_argument("--tune", nargs="+", help="last:n, all, head, or globs of layer names (last:4, all if fewer)")
    p.add_argument(
        "--method", nargs="+", default=list(DEFAULT_METHODS), metavar="METHOD", help=f"{', '.join(METHODS)}, or all"
    )
    p.add_argument("--epsilon", type=float, default=0.7, help="energy threshold for ranks from spectra")
    p.add_argument("--ranks", help="a fraction for every mode, or layer=r1,r2,r3,r4;layer=... (-: mode left alone)")
    p.add_argument("--segments", type=int, help="of checkpoint (one for each stage that trains, but the last)")
    p.add_argument("--micro-batch", type=int, help="images at a time of micro-batch (a quarter of the batch)")
    defaults = Settings()
    p.add_argument("--lora-rank", type=int, default=defaults.lora_rank, help="of lora's updates")
    p.add_argument("--patch", type=int, default=defaults.patch, help="places that gradient-filter takes together")
    p.add_argument("--ratio", type=float, default=defaults.ratio, help="directions of sketch by images of a batch")
    p.add_argument(
        "--calibration-batches", type=int, default=defaults.calibration_batches,
        help="from which lance's subspaces are found, once",
    )  # fmt: skip
    p.add_argument("--spectra", help="file of measured spectra, from python -m analysis.spectra")
    p.add_argument(
        "--accounting", nargs="+", default=["paper", "pytorch", "tape"], choices=["paper", "pytorch", "tape"],
        help="columns of the printed table",
    )  # fmt: skip
    p.add_argument(
        "--convention", default="flops", choices=["flops", "paper"],
        help="paper: multiply-adds of forward and grad_weight of the tuned layers, as the LANCE paper counts",
    )  # fmt: skip
    p.add_argument("--dtype", default="float32", choices=["float32", "float64"], help="of activations and weights")
    p.add_argument("--format", default="table", choices=["table", "json", "csv"], help="of the output")
    p.add_argument("--output", help="write to this file, whole or not at all")
    p.add_argument("--measure", action="store_true", help="run one real step and compare; exit 1 on any difference")
    p.add_argument("--data", help="images for --measure: a data set of lance_ref.datasets, or a folder of pictures")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    p = parser()
    options = p.parse_args(arguments)
    try:
        return _run(options)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, LookupError, OSError, MemoryError) as error:
        p.error(one_line(error))


def _run(options: argparse.Namespace) -> int:
    from analysis.spectra_file import write_atomically
    from analysis.tables import render, show

    input_shape = None if options.input_shape is None else _parse_shape(options.input_shape)
    if options.data is not None and not options.measure:
        raise ValueError("--data names images for --measure, which was not given")
    if options.output is not None:
        check_writable(options.output)
    prediction = predict(
        options.net, options.batch, options.image_size, input_shape, options.num_classes,
        options.tune[0] if options.tune and len(options.tune) == 1 else options.tune,
        options.method, options.epsilon, options.ranks, options.spectra, options.convention, options.dtype,
        with_weights=options.measure,
        settings=Settings(
            options.patch, options.ratio, options.segments, options.micro_batch, options.lora_rank,
            options.calibration_batches,
        ),
    )  # fmt: skip
    report = prediction.report
    comparison = None
    if options.measure:
        from analysis.measure import compare

        comparison = compare(prediction, options.data)
    if options.format == "table" and options.output is None:
        show(report, options.accounting)
    else:
        writers: dict[str, Any] = {"json": report.json_text, "csv": report.csv_text}
        text = writers.get(options.format, lambda: render(report, options.accounting))()
        if options.output is None:
            sys.stdout.write(text)
        else:
            write_atomically(options.output, text)
    if comparison is None:
        return 0
    print(comparison, file=sys.stdout if options.format == "table" or options.output else sys.stderr)
    return 0 if comparison.agrees else 1


def _parse_shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(re.fullmatch(r"\s*[1-9][0-9]{0,8}\s*", n) for n in parts):
        raise ValueError(f"--input-shape is {text!r}, expected C,H,W or N, positive integers")
    return tuple(int(n) for n in parts)


if __name__ == "__main__":
    sys.exit(main())
