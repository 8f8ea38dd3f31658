"""A plan as text, JSON and CSV."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from analysis.commands import console
from analysis.commands.console import Sheet, say
from analysis.planner.answer import amount, answer, fidelity, images, missing
from analysis.planner.costs import Device
from analysis.planner.search import Candidate, Plan, Row
from analysis.steps.methods import METHODS

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 2
PARTS = ("step", "gradients", "optimizer_state", "factors", "weights", "calibration", "total")
MEANING = (
    "fidelity: predicted, from 0 to 1: the part of backpropagation's weight gradient that is kept, over all {count} "
    "layers besides the head, each of which counts {shares}; '-' where it is not known. It is about the gradient of "
    "one step, not about accuracy."
)
TOTAL = (
    "total: the larger of two moments, of which one is over before the other begins: training, and the calibration of "
    "methods that find subspaces first. '(elsewhere)': another machine finds them. '(device)': a device program; all "
    "others are steps of the library."
)
ACCURACY = (
    "accuracy: per cent of test images in the committed experiments, of a net of the same family with the same method, "
    "setting and engine, and at most as many layers (the library's with batches of 128); '-' where it was not measured."
)
WEIGHTS = {
    "flash": "weights that do not train in flash",
    "ram": "all weights and buffers in RAM",
    "int8": "weights that do not train in flash, in float32, for the library has no others",
}
COUNTED = {
    "peak": "memory: the simulated peak of a step (batch, activations in flight, tape, gradients, optimiser state, "
    "workspaces)",
    "kept": "memory: what is kept (tape, gradients and optimiser state, all at once), without activations in flight "
    "and workspaces",
    "program": "memory: the arena of a device program (image, maps, cores, gradients, weights that train); all else is "
    "in flash, frozen weights in {weights}; one image at a time, so that the batch is 1 here: 'update batch' adds up "
    "the gradients of any number of images, 'update image' changes the weights after each",
}


def render(plan: Plan, device: Device, across: int | None = None) -> str:
    """The whole plan as plain text, lines at most ``across`` characters long (100)."""
    return console.as_text(drawn(plan, device), across)


def drawn(plan: Plan, device: Device) -> Callable[[Console], None]:
    """Prints all of it to a rich console: the answer, the tables, and what the numbers mean."""
    limit = "" if plan.flops_at_most is None else f", at most {float(plan.flops_at_most):g}x backpropagation's FLOPs"

    def draw(on: Console) -> None:
        budget = f"{amount(plan.budget, plan.unit)} {plan.unit} of RAM"
        ram = f"the least RAM for {plan.target}" if plan.target else budget
        say(on, f"{plan.facts.get('net', '')}: {ram}{limit}")
        for sentence in answer(plan):
            say(on, sentence)
        if plan.fitting:
            on.print(_fitting(plan, device.weights == "int8"))
        if any(row.best is None and row.next is not None for row in plan.shown):
            on.print(_others(plan))
        hidden = len(plan.rows) - len(plan.shown)
        if hidden:
            say(on, f"The table has the best setting of each method; --format json or csv has all {len(plan.rows)}.")
        for line in (*_notes(plan), *_meanings(plan, device)):
            say(on, line)
        if plan.facts.get("code"):
            say(on, f"To run the first of them{plan.facts.get('weights', '')}:")
            on.print(f"\n{plan.facts['code']}", markup=False, highlight=False, soft_wrap=True)

    return draw


def _meanings(plan: Plan, device: Device) -> list[str]:
    """What the columns count."""
    engines = {row.option.engine for row in plan.rows}
    ranked = any(METHODS[row.option.method].ranks for row in plan.rows)
    lines = [f"ranks from: {plan.facts.get('ranks', '')}"] if ranked else []
    if "library" in engines:
        counted = COUNTED["peak" if device.count == "program" else device.count]
        lines.append(f"library: {counted}; optimiser {device.optimizer}; {WEIGHTS[device.weights]}")
    if "device" in engines:
        stored = "int8" if device.weights == "int8" else "float32"
        program = COUNTED["program"].format(weights=stored)
        lines.append(f"device: {program}; optimiser {device.optimizer}; subspaces are found elsewhere")
    if plan.macs_per_second:
        lines.append(
            f"estimated ms: an estimate, multiply-adds of an update (of one image of a device program) at "
            f"{plan.macs_per_second / 1e9:g} billions a second; neither time nor energy was measured."
        )
    lines.append(TOTAL)
    lines.append(MEANING.format(count=len(plan.paths), shares=plan.facts.get("shares", "")))
    lines.append(ACCURACY)
    return lines


def _notes(plan: Plan) -> list[str]:
    """Why fidelities are missing, why methods are, and which of them only their calibration keeps out."""
    notes: dict[str, dict[str, None]] = {}
    for row in plan.rows:
        if row.note and (row.best is not None or row.next is None):
            kind = "not to be had" if row.best is None else "fidelity not predicted"
            notes.setdefault(f"{kind} ({row.note})", {})[row.option.method] = None
        missing = row.next.memory if row.best is None and row.next is not None else None
        if missing is not None and missing.training <= plan.budget < missing.calibration:
            notes.setdefault("would fit if calibrated elsewhere", {})[row.option.name] = None
    lines = [f"{note}: {', '.join(names)}" for note, names in notes.items()]
    lines += [f"{batch} left out: {reason}" for batch, reason in plan.skipped.items()]
    return [*lines, *filter(None, [plan.facts.get("remark", ""), plan.facts.get("device", "")])]


# ---- tables ----------------------------------------------------------------------------------


def _method(row: Row) -> str:
    """The method as the tables name it, with its engine, or where it is calibrated."""
    where = " (device)" if row.option.engine == "device" else " (elsewhere)" if row.option.elsewhere else ""
    return f"{row.option.method}{where}"


def _fitting(plan: Plan, with_flash: bool) -> Sheet:
    columns = ["method", "setting", "total", "accuracy", "fidelity", "layers", "batch", "training", "calibration"]
    columns += ["FLOPs/bp", "+1 layer"]
    columns += ["estimated ms"] if plan.macs_per_second else []
    columns += ["flash"] if with_flash else []
    said = f"What reaches {plan.target}" if plan.target else "What fits"
    table = Sheet(f"{said} (memory in {plan.unit}; total: the larger of training and calibration)", columns, left=2)
    for row in plan.shown:
        best = row.best
        if best is None:
            continue
        memory, of = best.memory, best.fidelity
        known = "-" if best.measured is None else f"{100 * best.measured.accuracy:.1f}"
        calibration = amount(memory.calibration, plan.unit) if memory.calibration else "-"
        cells = [
            _method(row), row.option.setting, amount(memory.total, plan.unit), known,
            "-" if of is None else fidelity(best), str(best.layers), images(best), amount(memory.training, plan.unit),
            calibration, f"{float(best.times_bp):.3f}", missing(row, plan.unit),
        ]  # fmt: skip
        cells += [f"{1e3 * best.macs / plan.macs_per_second:,.1f}"] if plan.macs_per_second else []
        cells += [amount(memory.flash, plan.unit) if memory.flash else "-"] if with_flash else []
        table.add(*cells, style="green" if row is plan.rows[0] else "" if of or best.measured else "dim")
    return table


def _others(plan: Plan) -> Sheet:
    table = Sheet("What does not fit: the least of each", ["method", "setting", "too much by"], left=2)
    for row in plan.shown:
        if row.best is None and row.next is not None:
            table.add(_method(row), row.option.setting, missing(row, plan.unit))
    return table


# ---- JSON and CSV ----------------------------------------------------------------------------


def to_json(plan: Plan, device: Device) -> dict[str, Any]:
    """Everything, for machines; sizes in bytes."""
    return {
        "schema": SCHEMA,
        "net": plan.facts.get("net", ""),
        "ranks_from": plan.facts.get("ranks", ""),
        "fidelity": MEANING.format(count=len(plan.paths), shares=plan.facts.get("shares", "")),
        "memory": COUNTED[device.count].format(weights="int8" if device.weights == "int8" else "float32"),
        "device": {"budget_bytes": plan.budget, **vars(device)},
        "target": plan.target or None,
        "flops_at_most": None if plan.flops_at_most is None else float(plan.flops_at_most),
        "layers": list(plan.paths),
        "answer": " ".join(answer(plan)),
        "code": plan.facts.get("code", ""),
        "skipped": dict(plan.skipped),
        "rows": [_row_json(row) for row in plan.rows],
        "closest": None if plan.closest is None else _candidate_json(plan.closest),
    }


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "engine": row.option.engine,
        "method": row.option.method,
        "setting": row.option.setting,
        "calibrated_elsewhere": row.option.elsewhere or None,
        "fits": row.best is not None,
        "best": None if row.best is None else _candidate_json(row.best),
        "most_layers": {str(batch): n for batch, n in row.layers.items()},
        "next": None if row.next is None else _candidate_json(row.next),
        "note": row.note,
    }


def _candidate_json(c: Candidate) -> dict[str, Any]:
    m, of = c.memory, c.fidelity
    return {
        "engine": c.option.engine,
        "method": c.option.method,
        "setting": c.option.setting,
        "layers": c.layers,
        "paths": list(c.paths) or None,
        "batch": c.batch,
        "at_a_time": c.at_a_time,
        "calibrated_elsewhere": c.option.elsewhere or None,
        "fidelity": None if of is None else of.estimate,
        "fidelity_at_least": None if of is None else of.least,
        "fidelity_at_most": None if of is None else of.most,
        "accuracy": None if c.measured is None else c.measured.accuracy,
        "accuracy_from": None if c.measured is None else c.measured.shown,
        **{f"{name}_bytes": getattr(m, name) for name in PARTS},
        "flash_bytes": m.flash or None,
        "over_bytes": c.over_bytes,
        "flops_over_bp": float(c.times_bp),
        "macs": c.macs,
        "too_much_work": c.too_much_work,
        "peak_at": m.at,
    }


def json_text(plan: Plan, device: Device) -> str:
    """:func:`to_json` as text."""
    return json.dumps(to_json(plan, device), indent=1) + "\n"


def csv_text(plan: Plan) -> str:
    """One line for each row: the best that fits or the least that does not, and whether it fits."""
    shown = [(row, row.best or row.next) for row in plan.rows]
    lines = [
        {"fits": row.best is not None, **_candidate_json(c), "note": row.note} if c else {
            "fits": False, "method": row.option.method, "setting": row.option.setting, "note": row.note
        }
        for row, c in shown
    ]  # fmt: skip
    names = dict.fromkeys(name for line in lines for name in line if name != "note")
    return console.csv_text(lines, [*names, "note"])
