"""What can be trained on a device: ``python -m analysis.plan --net mcunet --budget 512KiB``.

Which methods and settings fit its RAM, with how many layers and which batch, ranked by measured accuracy and predicted
gradient fidelity; or the least RAM for a target. Nothing runs: the net is traced on shapes alone, and device programs
are compiled.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from analysis.commands.cli import NET_HELP, any_file, count, figure_file, input_shape, pixels, positive, share
from analysis.commands.command_line import OneLineParser, nets_and_data, run_command, run_main
from analysis.planner.options import DEFAULT_BATCHES
from analysis.steps.register import add_settings, listed

UPDATES = ("batch", "image")
DEFAULT_DIRECTIONS = (8, 16, 24)
LARGEST = ("image-size", "batch", "directions")


def parser() -> argparse.ArgumentParser:
    p = OneLineParser(
        prog="python -m analysis.plan",
        description="Find the methods and settings that fit into the RAM of a device, with the number of layers and "
        "the batch that fit. They are ranked by measured accuracy and by predicted gradient fidelity. The answer also "
        "says what does not fit, and by how much, and prints the code that runs the first. With --target the answer is "
        "the least RAM that reaches the target.\n\n"
        "Example: lance-ref plan --net mcunet --image-size 32 --num-classes 10 --budget 256KiB",
        allow_abbrev=False,
        epilog=f"{listed()}\n\n{nets_and_data(False)}",
    )
    p.add_argument("--net", required=True, help=NET_HELP)
    p.add_argument("--budget", help="RAM of the device, as 256KiB, 1.5MiB or 300000B")
    p.add_argument(
        "--target", metavar="WHAT",
        help="in place of --budget, the least RAM for: accuracy=74 (per cent, as measured), fidelity=0.3, layers=10",
    )  # fmt: skip
    p.add_argument(
        "--largest", nargs="+", choices=LARGEST, metavar="WHAT",
        help=f"also find the largest value of these with which the first still fits: {', '.join(LARGEST)}",
    )  # fmt: skip
    p.add_argument("--flops-at-most", help="most multiply-adds, as 1.5x: relative to bp with equal layers and images")
    p.add_argument("--spectra", help="file that lance-ref spectra wrote (the one of the package, if any)")
    p.add_argument(
        "--batch", type=count, nargs="+", default=list(DEFAULT_BATCHES),
        help="numbers of images at a time to try; a batch of the largest number is also tried in parts (1 2 4 8 16 32)",
    )  # fmt: skip
    p.add_argument("--layers", type=count, help="the largest number of layers to tune, counted from the last (all)")
    p.add_argument(
        "--tune", nargs="+",
        help="which layers may be tuned, beginning with the last: all, last:n, or names with *; or best: the set of "
        "layers that keeps most of the gradient, for steps of the library (all)",
    )  # fmt: skip
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
        "--weights",
        default="flash",
        choices=["flash", "ram", "int8"],
        help="where weights are that do not train; int8: in flash, as int8 in device programs (flash)",
    )
    p.add_argument(
        "--calibration", default="both", choices=["device", "elsewhere", "both"],
        help="whether lance's Gram matrices have to fit too; both: a row for each (both)",
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
        help="with --engine device: directions of the channels that lance keeps (8 16 24)",
    )  # fmt: skip
    p.add_argument(
        "--update-after", nargs="+", choices=UPDATES, default=list(UPDATES),
        help="with --engine device: whether the weights change after a batch, or after each image (batch image)",
    )  # fmt: skip
    p.add_argument("--image-size", type=pixels, help="height and width in pixels")
    p.add_argument(
        "--input-shape", type=input_shape,
        help="shape of one input, as 3,32,32 or 784, in place of --image-size",
    )  # fmt: skip
    p.add_argument("--num-classes", type=count, help="outputs of the classifier (1000; a factory's own)")
    p.add_argument("--dtype", default="float32", choices=["float32", "float64"], help="type of all numbers (float32)")
    p.add_argument("--format", default="table", choices=["table", "json", "csv"], help="format of the output (table)")
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
    from analysis.planner.asked import device_of
    from analysis.planner.make import plan_of
    from analysis.planner.tables import csv_text, drawn, json_text

    plan, device = plan_of(options), device_of(options)
    if options.gmacs_per_second is not None:
        plan = replace(plan, macs_per_second=1e9 * options.gmacs_per_second)
    if options.plot is not None:
        from analysis.planner.plots import draw

        draw(plan, options.plot)
    texts = {"json": lambda: json_text(plan, device), "csv": lambda: csv_text(plan)}
    emit(drawn(plan, device), texts, options.format, options.output)


if __name__ == "__main__":
    sys.exit(run_main(main))
