"""The RAM of device programs, beneath a report of the cost model: the same net, layers and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import lance_ref
from analysis.commands.console import DrawText, Sheet, say
from analysis.device.programs import DEVICE_METHODS, why_not
from analysis.device.subspaces import input_shapes, random_subspaces
from analysis.ranks.choose import mean_free
from analysis.reports.prediction import Prediction
from lance_ref import device

if TYPE_CHECKING:
    from rich.console import Console

MOMENTUM = 0.9
"""The momentum of SGD; its value changes no size."""


def with_programs(draw: DrawText, prediction: Prediction, methods: Sequence[str], optimizer: str = "sgd") -> DrawText:
    """What ``draw`` draws, and beneath it a table of device programs.

    Parameters
    ----------
    draw : callable
        Prints the report to a rich console.
    prediction : Prediction
        Of a net with weights.
    methods : sequence of str
        Those that a device lacks are listed with the reason.
    optimizer : {"sgd", "sgd-momentum", "adam"}
    """
    sheet, reasons = _table(prediction, methods, optimizer)

    def both(on: Console) -> None:
        draw(on)
        if sheet.rows:
            on.print(sheet)
        for reason in reasons:
            say(on, reason)

    return both


def _table(prediction: Prediction, methods: Sequence[str], optimizer: str) -> tuple[Sheet, list[str]]:
    columns = ["method", "update after", "RAM", "flash", "multiply-adds again"]
    sheet = Sheet("Device programs: one image at a time, every array at a fixed address (KiB)", columns, left=2)
    if optimizer == "adam":
        return sheet, ["no device program: a device has SGD with and without momentum, not Adam"]
    reasons = []
    for method in methods:
        if why_not(method):
            reasons.append(f"{method}: no device program: {why_not(method)}")
            continue
        for update in ("batch", "image"):
            try:
                program = _program(prediction, method, update, optimizer == "sgd-momentum")
            except ValueError as error:
                reasons.append(f"{method}: no device program: {error}")
                break
            ram, flash = (f"{nbytes / 2**10:,.1f}" for nbytes in (program.ram_bytes, program.flash_bytes))
            sheet.add(method, update, ram, flash, f"{program.layout.recomputed_macs:,}")
    return sheet, reasons


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
