"""Predict what one training step keeps and computes: ``python -m analysis.cost_model --net mobilenetv2``.

From the shell or, with :func:`cost`, from Python. Nothing runs: the net is traced on shapes alone.
With ``--measure`` one real step runs as well, and every number is compared.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from analysis.cli import OneLineParser, check_writable, one_line

if TYPE_CHECKING:
    from analysis.account import Billed
    from analysis.nets import TracedStep
    from analysis.ranks import RankChoice
    from analysis.report import Report
    from lance_ref.nn.module import Module

METHODS = ("bp", "lance", "lance-mean-free", "lance-center")
DEFAULT_METHODS = ("bp", "lance")


@dataclass(frozen=True)
class Prediction:
    """A report, and what it was made from."""

    report: Report
    step: TracedStep
    choice: RankChoice | None
    bills: dict[str, list[Billed]]
    ranks: dict[str, dict[str, tuple[int | None, ...]]]


def cost(
    net: str | Module,
    *,
    batch: int = 128,
    image_size: int | None = None,
    input_shape: Sequence[int] | None = None,
    num_classes: int = 1000,
    tune: str | Sequence[str] | None = None,
    methods: Sequence[str] = DEFAULT_METHODS,
    epsilon: float = 0.7,
    ranks: str | None = None,
    spectra: str | None = None,
    convention: str = "flops",
    dtype: str | None = None,
) -> Report:
    """The cost of one training step: what ``python -m analysis.cost_model`` prints, as a value.

    Parameters
    ----------
    net : str or Module
        A name of ``lance_ref.models.names()``, ``pkg.module:factory``, or a net; a net is tuned in place
        and left in training mode.
    batch, image_size, num_classes : int
        ``num_classes`` is for names and factories; a net has its own.
    input_shape : sequence of int, optional
        (C, H, W) or (N,), without the batch; in place of ``image_size``.
    tune : str or sequence of str, optional
        As for :func:`lance_ref.tune`; by default the last four layers, or all of a net that has fewer.
    methods : sequence of {"bp", "lance", "lance-mean-free", "lance-center"}
        The last two at the ranks of "lance": orthogonal to the mean activation, or of the activation without it.
    epsilon : float
        Energy threshold in (0, 1], for ranks from spectra.
    ranks, spectra : str, optional
        A fraction or ``"layer=r1,r2,r3,r4;layer=…"``, or a file of spectra; see :mod:`analysis.ranks`.
    convention : {"flops", "paper"}
        "paper": multiply-adds of forward and weight gradient of the tuned layers alone, the head left
        out, the projection billed B·C·H·W·Σr, the weight gradient in the papers' order.
    dtype : {"float32", "float64"}, optional
        A net is converted to it, in place; by default a net's own, and float32 for names.

    Returns
    -------
    Report

    Raises
    ------
    ValueError, TypeError, LookupError, OSError
        In one line that names what came and what is allowed.

    Examples
    --------
    >>> report = cost("mobilenetv2", batch=64, tune="last:2", methods=["bp"])
    >>> report.totals["bp"].activation_bytes["paper"]
    16056320
    """
    return predict(
        net, batch, image_size, input_shape, num_classes, tune, methods, epsilon, ranks, spectra, convention, dtype
    ).report


def predict(
    net: str | Module,
    batch: int = 128,
    image_size: int | None = None,
    input_shape: Sequence[int] | None = None,
    num_classes: int = 1000,
    tune: str | Sequence[str] | None = None,
    methods: Sequence[str] = DEFAULT_METHODS,
    epsilon: float = 0.7,
    ranks: str | None = None,
    spectra: str | None = None,
    convention: str = "flops",
    dtype: str | None = None,
    with_weights: bool = False,
) -> Prediction:
    """As :func:`cost`, with what a measurement needs beside the report."""
    from analysis.account import account, with_stores
    from analysis.nets import build, input_shape_for, trace_step
    from analysis.ranks import choose_ranks, mean_free
    from analysis.report import CONVENTIONS, Report

    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods or len(set(methods)) < len(methods):
        raise ValueError(f"methods are {list(methods)}, expected some of {', '.join(METHODS)}, each once")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention is {convention!r}, expected one of {', '.join(CONVENTIONS)}")
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon is {epsilon}, expected a number in (0, 1]")
    for name, number in (("batch", batch), ("num_classes", num_classes), ("image_size", image_size)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}, expected a positive integer")

    name = net if isinstance(net, str) else type(net).__name__
    shape = input_shape_for(name, image_size, input_shape)
    module = build(net, num_classes, shape, not with_weights) if isinstance(net, str) else net
    if dtype is None:
        dtype = "float32" if isinstance(net, str) else str(next((p.dtype for p in net.parameters()), "float32"))
    step = trace_step(module, name, shape, batch, tune, dtype)

    choice = None
    if set(methods) - {"bp"}:
        choice = choose_ranks(_tuned_inputs(step), name, shape, epsilon, ranks, spectra)
    given: dict[str, dict[str, tuple[int | None, ...]]] = {"bp": {}}
    if choice is not None:
        given |= {"lance": choice.ranks, "lance-center": choice.ranks}
        if "lance-mean-free" in methods:
            given["lance-mean-free"] = mean_free(choice.ranks, _tuned_inputs(step))
    bills = {
        method: account(with_stores(step.records, given[method], method == "lance-center"), step.head)
        for method in methods
    }
    report = Report.of(
        bills,
        convention,
        net=name,
        batch=batch,
        image_size=shape[1] if len(shape) == 3 and shape[1] == shape[2] else None,
        num_classes=step.num_classes,
        dtype=dtype,
        tuned_layers=step.tuned_layers,
        ranks_from=choice.source if choice else "not needed: no method compresses",
    )
    return Prediction(report, step, choice, bills, given)


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
    p.add_argument("--batch", type=int, default=128, help="images per step")
    p.add_argument("--image-size", type=int, help="height and width in pixels (224 for most nets)")
    p.add_argument("--input-shape", help="C,H,W or N, without the batch; in place of --image-size")
    p.add_argument("--num-classes", type=int, default=1000, help="outputs of the classifier")
    p.add_argument("--tune", nargs="+", help="last:n, all, head, or globs of layer names (last:4, all if fewer)")
    p.add_argument("--method", nargs="+", default=list(DEFAULT_METHODS), metavar="METHOD", help=", ".join(METHODS))
    p.add_argument("--epsilon", type=float, default=0.7, help="energy threshold for ranks from spectra")
    p.add_argument("--ranks", help="a fraction for every mode, or layer=r1,r2,r3,r4;layer=... (-: mode left alone)")
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
