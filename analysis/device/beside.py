"""The RAM of device programs, beneath a report of the cost model: the same net, layers and ranks."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import lance_ref
from analysis.device.programs import DEVICE_METHODS, why_not
from analysis.device.subspaces import input_shapes, random_subspaces
from analysis.ranks.choose import mean_free
from analysis.reports.predict import Prediction
from lance_ref import device

MOMENTUM = 0.9
"""Of SGD with momentum; its value changes no size."""
ACROSS = 100
"""Characters of a line, as in the report."""


def device_text(prediction: Prediction, methods: Sequence[str], momentum: bool = False, adam: bool = False) -> str:
    """A table of the programs of the methods that a device has, and why it lacks the others.

    Parameters
    ----------
    prediction : Prediction
        Of a net with weights.
    methods : sequence of str
    momentum : bool
        Whether SGD has momentum.
    adam : bool
        Whether the report is about Adam, which a device has not.
    """
    lines = ["Device programs: one image at a time, every array at a fixed address (lance-ref device)"]
    if adam:
        return f"{lines[0]}\n  none: a device has SGD with and without momentum, not Adam\n"
    lines.append(f"{'method':<18}{'update after':<14}{'RAM (KiB)':>12}{'flash (KiB)':>13}{'multiply-adds again':>21}")
    reasons = []
    for method in methods:
        if why_not(method):
            reasons.append(f"{method}: no device program: {why_not(method)}")
            continue
        for update in ("batch", "image"):
            try:
                program = _program(prediction, method, update, momentum)
            except ValueError as error:
                reasons.append(f"{method}: no device program: {' '.join(str(error).split())}")
                break
            ram, flash = program.ram_bytes / 2**10, program.flash_bytes / 2**10
            again = program.layout.recomputed_macs
            lines.append(f"{method:<18}{update:<14}{ram:>12,.1f}{flash:>13,.1f}{again:>21,}")
    wrapped = [line for reason in reasons for line in textwrap.wrap(reason, ACROSS, subsequent_indent="  ")]
    return "\n".join([*lines, *wrapped]) + "\n"


def _program(prediction: Prediction, method: str, update: str, momentum: bool) -> device.Program:
    """The smallest program that is found; the net is tuned afterwards as it was before."""
    step, choice = prediction.step, prediction.choice
    net, of = step.net, DEVICE_METHODS[method]
    selection = net.tuning.selection
    calibration = None
    if of == "lance":
        shapes = input_shapes(net, step.input_shape, step.tuned_layers)
        ranks = {} if choice is None else {path: (1, *r[1:]) for path, r in choice.ranks.items()}
        if method == "lance-mean-free":
            ranks = mean_free(ranks, shapes)
        calibration = random_subspaces(shapes, {path: r[1:] for path, r in ranks.items()})
    try:
        return device.compile(
            net, calibration, step.input_shape, selection, update, method=of, momentum=MOMENTUM if momentum else 0.0
        )
    finally:
        lance_ref.tune(net, selection)
