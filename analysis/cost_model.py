"""Predict what one training step keeps and computes: ``python -m analysis.cost_model --net mobilenetv2``.

The command line; :func:`analysis.cost` gives the same in Python. Nothing runs: the net is traced on shapes alone.
With ``--measure`` one real step runs as well, and every number is compared.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from analysis.cli import NET_HELP, OneLineParser, check_writable, run_command, run_main
from analysis.methods import METHODS, Settings
from analysis.predict import (
    DEFAULT_BASIS_BATCHES,
    DEFAULT_BATCH,
    DEFAULT_METHODS,
    DEFAULT_PROTECTED,
    Prediction,
    cost,
    predict,
)

__all__ = ["Prediction", "cost", "main", "parser", "predict"]

PANELS = ("tape", "macs", "batch", "frontier")
FIGURE_SUFFIXES = (".png", ".svg")


def parser() -> argparse.ArgumentParser:
    p = OneLineParser(
        prog="python -m analysis.cost_model",
        description="What one training step keeps in memory and computes, per layer and under three accountings: "
        "paper (inputs of the tuned layers), pytorch (what PyTorch's autograd saves), tape (what lance_ref keeps).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--net", required=True, help=NET_HELP)
    p.add_argument("--batch", type=int, default=DEFAULT_BATCH, help="images per step")
    p.add_argument("--image-size", type=int, help="height and width in pixels (224 for most nets)")
    p.add_argument("--input-shape", help="C,H,W or N, without the batch; in place of --image-size")
    p.add_argument("--num-classes", type=int, help="outputs of the classifier (1000; a factory's own)")
    p.add_argument("--tune", nargs="+", help="last:n, all, head, or globs of layer names (last:4, all if fewer)")
    p.add_argument(
        "--method", "--methods", nargs="+", default=list(DEFAULT_METHODS), metavar="METHOD",
        help=f"{', '.join(METHODS)}, or all",
    )  # fmt: skip
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
    p.add_argument(
        "--optimizer", default="sgd", choices=["sgd", "sgd-momentum", "adam"], help="whose state counts at the peak"
    )
    p.add_argument("--continual", type=int, metavar="T", help="also bill learning T tasks one after the other")
    p.add_argument(
        "--protected", type=float, metavar="SHARE",
        help=f"of --continual: share of a layer's directions that the last task must leave alone ({DEFAULT_PROTECTED})",
    )  # fmt: skip
    p.add_argument(
        "--basis-batches", type=int, metavar="N",
        help=f"of --continual: batches from which these directions are found ({DEFAULT_BASIS_BATCHES})",
    )  # fmt: skip
    p.add_argument("--format", default="table", choices=["table", "json", "csv"], help="of the output")
    p.add_argument(
        "--json", dest="format", action="store_const", const="json", default=argparse.SUPPRESS,
        help="the same as --format json",
    )  # fmt: skip
    p.add_argument("--output", help="write to this file, whole or not at all")
    p.add_argument("--plot", metavar="FILE", help="draw the report into this .png or .svg, whole or not at all")
    p.add_argument("--panels", nargs="+", choices=PANELS, help=f"of --plot ({' '.join(PANELS)})")
    p.add_argument("--measure", action="store_true", help="run one real step and compare; exit 1 on any difference")
    p.add_argument("--data", help="images for --measure: a data set of lance_ref.datasets, or a folder of pictures")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    return run_command(parser(), arguments, _run)


def _run(options: argparse.Namespace) -> int:
    _check(options)
    prediction = _predict(options)
    if options.plot is not None:
        prediction.report.plot(options.plot, panels=options.panels or PANELS)
    comparison = None
    if options.measure:
        from analysis.measure import compare

        comparison = compare(prediction, options.data, peaks=True)
    _write(options, prediction)
    if comparison is None:
        return 0
    print(comparison, file=sys.stdout if options.format == "table" or options.output else sys.stderr)
    return 0 if comparison.agrees else 1


def _check(options: argparse.Namespace) -> None:
    """Options that say nothing without another, and files that cannot be written: before the work."""
    if options.data is not None and not options.measure:
        raise ValueError("--data names images for --measure, which was not given")
    if options.panels is not None and options.plot is None:
        raise ValueError("--panels names panels of --plot, which was not given")
    for name in ("protected", "basis_batches"):
        if getattr(options, name) is not None and options.continual is None:
            raise ValueError(f"--{name.replace('_', '-')} belongs to --continual, which was not given")
    if options.output is not None:
        check_writable(options.output)
    if options.plot is not None:
        if os.path.splitext(options.plot)[1] not in FIGURE_SUFFIXES:
            raise ValueError(f"--plot is {options.plot!r}, expected the name of a {' or '.join(FIGURE_SUFFIXES)} file")
        check_writable(options.plot, "--plot")


def _predict(options: argparse.Namespace) -> Prediction:
    return predict(
        options.net, options.batch, options.image_size,
        None if options.input_shape is None else _parse_shape(options.input_shape), options.num_classes,
        options.tune[0] if options.tune and len(options.tune) == 1 else options.tune,
        options.method, options.epsilon, options.ranks, options.spectra, options.convention, options.dtype,
        with_weights=options.measure,
        settings=Settings(
            options.patch, options.ratio, options.segments, options.micro_batch, options.lora_rank,
            options.calibration_batches,
        ),
        continual=options.continual,
        protected=DEFAULT_PROTECTED if options.protected is None else options.protected,
        basis_batches=DEFAULT_BASIS_BATCHES if options.basis_batches is None else options.basis_batches,
        optimizer=options.optimizer,
    )  # fmt: skip


def _write(options: argparse.Namespace, prediction: Prediction) -> None:
    """The report, to the terminal, a pipe or a file."""
    from analysis.spectra_file import write_atomically
    from analysis.tables import render, show

    report = prediction.report
    if options.format == "table" and options.output is None:
        show(report, options.accounting)
        return
    writers: dict[str, Any] = {"json": report.json_text, "csv": report.csv_text}
    text = writers.get(options.format, lambda: render(report, options.accounting))()
    if options.output is None:
        sys.stdout.write(text)
    else:
        write_atomically(options.output, text)


def _parse_shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(re.fullmatch(r"\s*[1-9][0-9]{0,8}\s*", n) for n in parts):
        raise ValueError(f"--input-shape is {text!r}, expected C,H,W or N, positive integers")
    return tuple(int(n) for n in parts)


if __name__ == "__main__":
    sys.exit(run_main(main))
