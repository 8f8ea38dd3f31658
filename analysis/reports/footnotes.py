"""The lines beneath the tables of a report: calibrations, what the methods are, peaks of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from analysis.commands.names import plain
from analysis.steps.methods import METHODS
from analysis.steps.settings import KNOWN

if TYPE_CHECKING:
    from analysis.reports.report import Report

MOMENTS = {"forward": "in the forward pass", "backward": "in the backward pass", "optimiser": "in the update"}


def footnotes(report: Report) -> list[str]:
    """Calibrations, settings, what was left out, peaks, what of them is estimated, and what the net itself lacks."""
    estimates = [f"{plain(what)}: {said}" for what, said in report.estimates.items()]
    return [*_calibrations(report), *_about(report), *_peaks(report), *estimates, *filter(None, [report.remark])]


def _calibrations(report: Report) -> list[str]:
    """Two lines for each method that is calibrated; in billions of multiply-adds, whatever the convention."""
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
        back = f"paid back after {steps:,} step{'' if steps == 1 else 's'}" if steps else "never paid back"
        saved = cost.saved_macs_per_step
        sentences += [
            f"Calibration of {method}, once, on {cost.batches} batches: {cost.total_macs / 1e9:,.3f} GMACs ({listed}), "
            f"and {cost.gram_bytes / 2**20:,.3f} MiB of Gram matrices",
            f"    against a HOSVD at every step at these ranks, which takes "
            f"{abs(saved) / 1e9:,.3f} GMACs {'less' if saved < 0 else 'more'} a step, it is {back}",
        ]
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


def _peaks(report: Report) -> list[str]:
    """One line for each method: the most that is alive at once, when, and what is a part of it."""
    return [
        f"Peak memory of a step, {method}: {peak.peak_bytes / 2**20:,.3f} MiB, {MOMENTS[peak.moment]} ({peak.at}); "
        f"gradients {peak.gradients_bytes / 2**20:,.3f}, state of {report.optimizer} "
        f"{peak.optimizer_state_bytes / 2**20:,.3f}, and {peak.parameters_bytes / 2**20:,.3f} of parameters beside it"
        for method, peak in report.peaks.items()
    ]


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
