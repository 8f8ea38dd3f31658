"""A training step on a device: ``lance-ref device --net mcunet --tune last:4 --directions 8 --update batch``.

What the step takes of RAM and flash and what it computes, instruction by instruction. With ``--measure`` one step of
one random image runs as well, and every number is compared with a prediction from shapes alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from analysis.commands.cli import (
    NET_HELP,
    add_normalisation,
    any_file,
    check_effect,
    count,
    figure_file,
    folder_to_write,
    input_shape,
    pixels,
    share,
)
from analysis.commands.command_line import OneLineParser, listing, nets_and_data, run_command

if TYPE_CHECKING:
    from analysis.device.check import Difference
    from analysis.device.predict import DevicePrediction
    from analysis.device.subspaces import CalibrationImages
    from lance_ref.algebra.subspace import Subspace
    from lance_ref.device import Program
    from lance_ref.nn.module import Module

SCHEMA = 1
ABOUT = {
    "lance": "the weights of the tuned layers, from few directions of their inputs",
    "bp": "the weights of the tuned layers, by exact backpropagation",
    "bias": "the biases of the tuned layers",
    "head": "the classifier alone, which always trains",
}
METHODS = tuple(ABOUT)
DEFAULT_NUM_CLASSES = 10
DEFAULT_DIRECTIONS = 8
DEFAULT_CALIBRATION_IMAGES = 256
MOMENTUM = 0.9
"""The momentum of SGD, where ``--momentum`` asks for it; its value changes no size."""
COLUMN = 58
EXPORTED_IMAGES = 8
"""The number of images of ``--data`` that are exported with a C program: one update of its training program."""


def parser() -> argparse.ArgumentParser:
    p = OneLineParser(
        prog="python -m analysis.device",
        description="One training step compiled for a device: every array at a fixed address, one image at a time. "
        "What it takes of RAM and flash and what it computes, instruction by instruction.\n\n"
        "Example: lance-ref device --net mcunet --tune last:4 --directions 8",
        epilog=f"{listing('methods', ABOUT)}\n\n{nets_and_data()}",
        allow_abbrev=False,
    )
    p.add_argument("--net", required=True, help=NET_HELP)
    p.add_argument(
        "--num-classes", type=count,
        help=f"number of classes (those of --data, those that a function of yours gives, or {DEFAULT_NUM_CLASSES})",
    )  # fmt: skip
    p.add_argument("--image-size", type=pixels, help="height and width in pixels (what the net is made for)")
    p.add_argument(
        "--input-shape", type=input_shape,
        help="shape of one input, as 3,32,32 or 784, in place of --image-size",
    )  # fmt: skip
    p.add_argument(
        "--tune", nargs="+",
        help="layers that train besides the classifier: last:4 for the last four, all, head for none, or names with * "
        "for any letters (last:4, or all of a net that has fewer)",
    )  # fmt: skip
    p.add_argument("--method", default="lance", choices=METHODS, help="what trains, see below (lance)")
    ranks = p.add_mutually_exclusive_group()
    ranks.add_argument(
        "--directions", type=count, metavar="N",
        help=f"with lance: directions of the channels that are kept, without their mean ({DEFAULT_DIRECTIONS})",
    )  # fmt: skip
    ranks.add_argument(
        "--epsilon", type=share,
        help="with lance, in place of --directions: share of the squared values that the directions keep",
    )  # fmt: skip
    ranks.add_argument(
        "--ranks",
        help="with lance, in place of --directions: one fraction, or layer=r1,r2,r3,r4;... (r1: the batch, not used)",
    )  # fmt: skip
    p.add_argument("--spectra", help="with --epsilon: file that lance-ref spectra wrote")
    p.add_argument(
        "--data",
        help="images whose directions lance keeps, see below, and on which an exported program is tried; the net then "
        "has its pretrained weights, if there are any (random directions: sizes depend on shapes alone)",
    )
    p.add_argument(
        "--calibration-images", type=count, metavar="N",
        help=f"with --data: how many of the training images ({DEFAULT_CALIBRATION_IMAGES}, or all if there are fewer)",
    )  # fmt: skip
    add_normalisation(p)
    p.add_argument(
        "--train", default="subspace", choices=["subspace", "weight"],
        help="with lance: coordinates in the directions alone, or weights",
    )  # fmt: skip
    p.add_argument(
        "--update", default="batch", choices=["batch", "image"],
        help="when weights change: after a batch, or each image",
    )  # fmt: skip
    p.add_argument("--momentum", action="store_true", help="SGD with momentum")
    p.add_argument("--budget", help="RAM of the device, as 256KiB, 1.5MiB or 300000B (the least that is found)")
    p.add_argument("--format", default="table", choices=["table", "json"], help="format of the result (table)")
    p.add_argument(
        "--json", dest="format", action="store_const", const="json", default=argparse.SUPPRESS,
        help="the same as --format json",
    )  # fmt: skip
    p.add_argument("--output", type=any_file, help="write the result to this file (the terminal)")
    p.add_argument("--plot", type=figure_file, metavar="FILE", help="draw the arena into this .png or .svg file")
    p.add_argument("--export", type=folder_to_write, metavar="FOLDER", help="write the step as C99 into this folder")
    p.add_argument(
        "--weights", choices=["float32", "int8"],
        help="with --export: how weights that do not train are stored (float32)",
    )  # fmt: skip
    p.add_argument("--ram-section", metavar="NAME", help="with --export: the linker's section for the RAM (none)")
    p.add_argument("--flash-section", metavar="NAME", help="with --export: the linker's section for constants (none)")
    p.add_argument(
        "--measure", action="store_true",
        help="run a step of one random image and compare; exit code 1 if a number differs",
    )  # fmt: skip
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code: 0 done, 1 a number is not as predicted, 2 cannot run."""
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    from analysis.device.check import prediction_of

    _check(options)
    asked = asked_for(options)
    program, source = compiled(options, asked)
    predicted = prediction_of(program, asked.net, asked.shape)
    found = measured(program, predicted) if options.measure else None
    if options.plot is not None:
        program.plot(options.plot)
    facts = _facts(options, asked, program, source)
    if options.export is not None:
        facts["exported"] = _exported(options, program, asked.images)
    _write(options, facts, program, predicted, found)
    return 1 if found else 0


def _check(options: argparse.Namespace) -> None:
    """Options that change nothing beside the others are refused before the work."""
    for name in ("directions", "epsilon", "ranks", "train"):
        check_effect(options, name, options.method == "lance", "--method lance")
    check_effect(options, "spectra", options.epsilon is not None, "--epsilon, for which it has the spectra")
    check_effect(options, "spectra", options.data is None, "no --data, whose own spectra hold")
    for name in ("calibration_images", "mean", "std"):
        check_effect(options, name, options.data is not None, "--data, which has the images")
    check_effect(options, "data", options.method == "lance" or options.export is not None, "--method lance or --export")
    check_effect(options, "image_size", options.input_shape is None, "no --input-shape, which states height and width")
    for name in ("weights", "ram_section", "flash_section"):
        check_effect(options, name, options.export is not None, "--export, which writes them")
    check_effect(
        options, "tune", options.method != "head", "another method than head, which trains the classifier alone"
    )


class Asked(NamedTuple):
    """What was asked for: a net that is tuned, and images, if any."""

    net: Module
    weights: str  #: Where they came from.
    shape: tuple[int, ...]  #: Of one input.
    layers: tuple[str, ...]  #: That train besides the classifier.
    images: CalibrationImages | None


def compiled(options: argparse.Namespace, asked: Asked) -> tuple[Program, str]:
    """The program, and where LANCE's directions come from.

    Raises
    ------
    ValueError
        In one line: what is asked for does not exist, does not fit the net, or cannot run on a device.
    """
    from lance_ref import device
    from lance_ref.device.budget import parse_bytes

    budget = None if options.budget is None else parse_bytes(options.budget)  # before the work
    calibration, source = _directions(options, asked) if options.method == "lance" else (None, "")
    program = device.compile(
        asked.net, calibration, asked.shape, update=options.update, budget=budget, method=options.method,
        train=options.train, momentum=MOMENTUM if options.momentum else 0.0,
        preprocess=None if asked.images is None else asked.images.normalise,
    )  # fmt: skip
    return program, source


def asked_for(options: argparse.Namespace) -> Asked:
    """Raises as :func:`compiled`."""
    from analysis.device.subspaces import CalibrationImages
    from analysis.steps.net_choice import NetChoice
    from analysis.steps.nets import build, check_classes, input_shape_for, trace_step

    choice = NetChoice(options.net)
    size = choice.image_size if options.image_size is None and options.data is not None else options.image_size
    shape = input_shape_for(options.net, size, options.input_shape)
    images, classes = None, options.num_classes
    if options.data is not None:
        images = CalibrationImages.open(
            options.data, shape, choice.normalise(options.mean, options.std)[0], options.calibration_images,
            DEFAULT_CALIBRATION_IMAGES,
        )  # fmt: skip
        net, weights = choice.make(images.num_classes if classes is None else classes, shape, seed=0)
        net.eval()
    else:
        classes = DEFAULT_NUM_CLASSES if classes is None and choice.is_built_in else classes
        net = build(options.net, classes, shape, without_weights=False)
        weights = choice.origin(net)
    tune = "head" if options.method == "head" else options.tune
    selection = tune[0] if isinstance(tune, list) and len(tune) == 1 else tune
    step = trace_step(net, options.net, shape, 2, selection, "float32")
    check_classes(options.net, classes, step.num_classes)
    return Asked(net, weights.words, shape, step.tuned_layers, images)


def _directions(options: argparse.Namespace, asked: Asked) -> tuple[Mapping[str, Subspace], str]:
    """The directions of the images, or random ones; and a sentence on where they, or their numbers, come from."""
    from analysis.device.subspaces import MODES, random_subspaces

    images = asked.images
    if images is not None and options.epsilon is not None:
        found = images.calibrate(asked.net, asked.layers, MODES, options.epsilon)
        return found, f"energy {options.epsilon} of {images.words}"
    shapes, ranks, source = _ranks(options, asked.net, asked.shape, asked.layers)
    if images is None:
        return random_subspaces(shapes, ranks), source
    return images.subspaces(asked.net, ranks), f"{source} of {images.words}"


def _ranks(
    options: argparse.Namespace, net: Module, shape: tuple[int, ...], layers: Sequence[str]
) -> tuple[dict[str, tuple[int, ...]], dict[str, Any], str]:
    """Shapes of the layers' inputs, their ranks without the batch's, and where these come from."""
    from analysis.device.subspaces import channel_directions, input_shapes
    from analysis.ranks.choose import choose_ranks

    shapes = input_shapes(net, shape, layers)
    if options.epsilon is None and options.ranks is None:
        number = DEFAULT_DIRECTIONS if options.directions is None else options.directions
        return shapes, channel_directions(shapes, number), f"{number} mean-free directions of the channels"
    epsilon = 1.0 if options.epsilon is None else options.epsilon
    choice = choose_ranks(shapes, options.net, shape, epsilon, options.ranks, options.spectra)
    if options.epsilon is not None and not choice.by_energy:
        size = "x".join(map(str, shape))
        raise ValueError(
            f"--epsilon needs spectra, and there are none of {options.net} at {size}: give --spectra with a file from "
            "python -m analysis.spectra, or --directions"
        )
    return shapes, {path: of[1:] for path, of in choice.ranks.items()}, choice.source


def measured(program: Program, predicted: DevicePrediction) -> list[Difference]:
    """Run a step of one random image; what is not as predicted."""
    import numpy as np

    from analysis.device.check import differences

    rng = np.random.default_rng(0)
    C, H, W = program.graph.shapes[0]
    in_bytes = program.recipe.pixels is not None
    image = rng.integers(0, 256, (1, H, W, C), dtype=np.uint8) if in_bytes else rng.normal(size=(1, C, H, W))
    program.step(image, np.array([0]), 0.0)
    return differences(program, predicted)


def _exported(options: argparse.Namespace, program: Program, images: CalibrationImages | None) -> dict[str, Any]:
    """Write the program as C, with some of the images; what was written."""
    given: dict[str, Any] = {"ram_section": options.ram_section, "flash_section": options.flash_section}
    if images is not None:
        given["images"], given["labels"] = images.some(EXPORTED_IMAGES)
    done = program.export_c(options.export, options.weights or "float32", **given)
    return {"folder": str(options.export), "weights": options.weights or "float32", "ram_bytes": done.ram_bytes,
            "state_bytes": done.state_bytes, "flash_bytes": done.flash_bytes}  # fmt: skip


# ---- what is written ----------------------------------------------------------------------------


def _facts(options: argparse.Namespace, asked: Asked, program: Program, source: str) -> dict[str, Any]:
    return {
        "net": options.net,
        "weights_from": asked.weights,
        "input_shape": list(asked.shape),
        "num_classes": program.graph.shapes[program.graph.output][0],
        "tuned_layers": list(asked.layers),
        "ranks": {path: [None if U is None else U.shape[1] for U in of] for path, of in program.recipe.factors.items()},
        "ranks_from": source,
        "train": options.train if options.method == "lance" else None,
        "momentum": options.momentum,
    }


def _write(
    options: argparse.Namespace,
    facts: dict[str, Any],
    program: Program,
    predicted: DevicePrediction,
    found: list[Difference] | None,
) -> None:
    """The report, to the terminal, a pipe or a file; what was measured beside JSON goes to stderr."""
    from lance_ref.io.whole_file import write_text

    verdict = None if found is None else verdict_text(found)
    as_json = options.format == "json"
    text = json_text(facts, program, predicted, found) if as_json else table(facts, program, predicted)
    if options.output is None:
        sys.stdout.write(text)
    else:
        write_text(options.output, text)
    if verdict is not None:
        print(verdict, file=sys.stdout if options.format == "table" or options.output else sys.stderr)


def verdict_text(found: list[Difference]) -> str:
    """What came of the measurement."""
    if not found:
        return "measured: a step of one random image; RAM, flash and multiply-adds are as predicted"
    return "\n".join(["measured: a step of one random image, which differs", *(f"  {line}" for line in found)])


def table(facts: dict[str, Any], program: Program, predicted: DevicePrediction) -> str:
    """The whole report as text, lines of at most 80 characters."""
    import textwrap

    size, layers = "x".join(map(str, facts["input_shape"])), len(facts["tuned_layers"])
    also = f"{layers} layers and the classifier train" if layers else "the classifier trains"
    heading = f"{facts['net']}, input {size}, {facts['num_classes']} classes: {program.method}, {also}"
    update = "batch" if program.recipe.update == "batch" else "image"
    heading += f"; update after each {update}{', with momentum' if facts['momentum'] else ''}"
    source = [f"ranks: {facts['ranks_from']}"] if facts["ranks_from"] else []
    lines = [line for text in (heading, *source) for line in textwrap.wrap(text, 80)]
    lines += ["", str(program), "", f"{'multiply-adds of one image':<{COLUMN}}{'':>12}"]
    lines += [f"{kind:<{COLUMN}}{macs:>12,}" for kind, macs in predicted.macs.items() if macs]
    lines.append(f"{'all':<{COLUMN}}{sum(predicted.macs.values()):>12,}")
    if "exported" in facts:
        done = facts["exported"]
        lines += ["", f"exported to {done['folder']}: C99, weights in {done['weights']}"]
        lines += textwrap.wrap(f"weights: {facts['weights_from']}", 80)
        lines += [f"{'flash: constants of the C program':<{COLUMN}}{done['flash_bytes']:>12,}"]
        lines += [f"compare it with this program: make -C {done['folder']} test"]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def json_text(
    facts: dict[str, Any], program: Program, predicted: DevicePrediction, found: list[Difference] | None
) -> str:
    """The whole report for machines; sizes in bytes, multiply-adds of one image."""
    import json

    from analysis.commands.provenance import provenance

    described = {**program.describe(), "macs": {**predicted.macs, "total": sum(predicted.macs.values())}}
    agrees = {} if found is None else {"measured": {"agrees": not found, "differences": [vars(one) for one in found]}}
    whole = {"schema": SCHEMA, **facts, **described, **agrees, "provenance": provenance("analysis.device", 0)}
    return json.dumps(whole, indent=2, allow_nan=False) + "\n"
