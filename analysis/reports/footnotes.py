"""The lines beneath the tables of a report: calibrations, what the methods are, peaks of memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from analysis.commands.console import readable
from analysis.commands.names import plain
from analysis.rules.tucker_costs import ConvSizes, conv_cheapest
from analysis.steps.methods import METHODS
from analysis.steps.settings import KNOWN

if TYPE_CHECKING:
    from analysis.reports.report import Report

MOMENTS = {"forward": "in the forward pass", "backward": "in the backward pass", "optimiser": "in the update"}


def footnotes(report: Report) -> list[str]:
    """Peaks and estimates, ranks, calibrations, settings, what was left out, and what the net itself lacks."""
    ranked = any(cost.ranks for row in report.rows for cost in row.methods.values())
    ranks = [f"ranks from: {report.ranks_from}"] if ranked else []
    estimates = [f"{plain(what)}: {said}" for what, said in report.estimates.items()]
    from analysis.reports.report import OF_THE_FILE

    file_only = f"pytorch (file): {OF_THE_FILE}" if report.file_only else ""
    no_tape = f"tape: none: {report.no_tape}" if report.no_tape else ""
    remarks = filter(None, [report.remark, no_tape, file_only])
    return [*_chunks(report), *_peaks(report), *estimates, *ranks, *_calibrations(report), *_about(report), *remarks]


def orders(report: Report) -> list[str]:
    """The orders in which LANCE's weight gradients are contracted, each with its layers; for a wide report."""
    layers: dict[str, list[str]] = {}
    if report.settings.get("lance", {}).get("update"):  # other gradients, of D
        return []
    for row in report.rows:
        ranks = row.methods["lance"].ranks if "lance" in row.methods else None
        if row.op != "linear" and ranks is not None and row.weight_shape is not None:
            (B, C_in, *size), (_, C_out, *size_out) = row.input_shape, row.output_shape
            transposed = row.op == "conv_transpose2d"
            _, width, *kernel = row.weight_shape
            groups = (C_out if transposed else C_in) // width
            sizes = ConvSizes(B, C_in, tuple(size), C_out, tuple(size_out), tuple(kernel), groups, transposed)
            _, order, expanded = conv_cheapest(sizes, ranks)
            back = " and ".join(("batch", "channels")[mode] for mode in expanded)
            layers.setdefault(f"{order}, {back} put back first" if back else order, []).append(row.name)
    found = "; ".join(f"{order}: {', '.join(names)}" for order, names in layers.items())
    return [f"Order of contraction of lance's weight gradients. {found}."] if layers else []


def _calibrations(report: Report) -> list[str]:
    """Three sentences for each method that is calibrated; in billions of multiply-adds, whatever the convention."""
    sentences = []
    for method, cost in report.calibration.items():
        parts = {
            "forward passes": cost.forward_macs,
            "Gram matrices": cost.gram_macs,
            "the mean's direction": cost.frame_macs,
            "eigenvectors": cost.eigenvector_macs,
        }
        listed = ", ".join(f"{name} {macs / 1e9:,.3f}" for name, macs in parts.items() if macs)
        steps = cost.steps_to_pay_back
        back = f"is paid back after {steps:,} step{'' if steps == 1 else 's'}" if steps else "is never paid back"
        saved = cost.saved_macs_per_step
        sentences.append(
            f"The calibration of {method} takes {cost.total_macs / 1e9:,.3f} GMACs, once, on {cost.batches} batches "
            f"({listed}). Its Gram matrices take {readable(cost.gram_bytes)}. A HOSVD at every step at these "
            f"ranks takes {abs(saved) / 1e9:,.3f} GMACs {'less' if saved < 0 else 'more'} a step; against it, the "
            f"calibration {back}."
        )
    return sentences


def _about(report: Report) -> list[str]:
    """What the methods are, where there is more than backpropagation and LANCE; and which were left out."""
    lines = []
    for method in report.methods:
        if method not in ("bp", "lance"):
            shown = {
                n: v for n, v in report.settings.get(method, {}).items() if n not in KNOWN or KNOWN[n].grid is not None
            }
            chosen = "; ".join(f"{name} {_setting(value)}" for name, value in shown.items() if value is not None)
            lines.append(f"{method}: {METHODS[method].about}{f' ({chosen})' if chosen else ''}")
    lines += [f"{method}: left out: {why}" for method, why in report.notes.items()]
    return lines


def _chunks(report: Report) -> list[str]:
    """How the methods take their batches, where that was asked for; those that take it alike together."""
    return [f"{', '.join(names)}: {clause}" for clause, names in _alike(report.chunks).items()]


def _alike(said: Mapping[str, str]) -> dict[str, list[str]]:
    """The methods of which the same is said, by what is said."""
    methods: dict[str, list[str]] = {}
    for method, words in said.items():
        methods.setdefault(words, []).append(method)
    return methods


def _peaks(report: Report) -> list[str]:
    """The most that is alive at once, when, and what stands beside it; methods with the same peak together."""
    said = {}
    for method, peak in report.peaks.items():
        said[method] = (
            f" is {readable(peak.peak_bytes)}, {MOMENTS[peak.moment]} ({peak.at}). The gradients take "
            f"{readable(peak.gradients_bytes)}, the state of {report.optimizer} takes "
            f"{readable(peak.optimizer_state_bytes)}; the parameters, which the peak leaves out, take "
            f"{readable(peak.parameters_bytes)}."
        )
    named = {text: [", ".join(names[:-1])] * (len(names) > 1) + names[-1:] for text, names in _alike(said).items()}
    return [f"The peak of a step with {' and '.join(names)}{text}" for text, names in named.items()]


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
