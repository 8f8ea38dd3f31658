"""A plan as text, JSON and CSV."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from analysis.commands import console
from analysis.commands.console import Sheet, say
from analysis.planner.answer import amount, answer, fidelity, missing
from analysis.planner.costs import Device
from analysis.planner.search import SHOWN_DIGITS, Candidate, Plan, Row

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
PARTS = ("step", "gradients", "optimizer_state", "factors", "weights", "calibration", "total")
MEANING = (
    "fidelity: an estimate of the largest cos² between the method's weight gradient and backpropagation's that steps "
    "scaled layer by layer can reach, over all {count} layers besides the head; a layer that does not train counts 0, "
    "one that trains exactly its share ({shares}), one that is compressed the share of the energy that its activation "
    "keeps. 'at least': what is certain of that energy on the images measured. It is about one step's gradient, "
    "not about accuracy."
)
TOTAL = (
    "total: the larger of two moments, of which one is over before the other begins: a training step (step + factors + "
    "weights), and the calibration, where that runs on the device."
)
ACCURACY = (
    "accuracy: per cent of test images in the committed experiments, of a net of the same family and the same method, "
    "setting and engine, with at most as many layers as are chosen here (the library's with batches of 128, whatever "
    "the batch is here); '-' where there is no such experiment."
)
WEIGHTS = {"flash": "weights that do not train in flash", "ram": "all weights and buffers in RAM"}
COUNTED = {
    "peak": "memory: the simulated peak of a step (batch, activations in flight, tape, gradients, optimiser state, "
    "workspaces)",
    "kept": "memory: what is kept (tape, gradients and optimiser state, all at once), without activations in flight "
    "and workspaces",
    "program": "memory: the arena of a device program (image, maps, cores, gradients), beside the weights that train; "
    "factors in flash; one image at a time, so that the batch is 1 here: the gradients of a batch of any size are "
    "added up, or every image is an update",
}


def render(plan: Plan, device: Device, across: int | None = None) -> str:
    """The whole plan as plain text, lines at most ``across`` characters long (100)."""
    return console.as_text(drawn(plan, device), across)


def drawn(plan: Plan, device: Device) -> Callable[[Console], None]:
    """Prints all of it to a rich console: the answer, the tables, and what the numbers mean."""
    limit = "" if plan.flops_at_most is None else f", at most {float(plan.flops_at_most):g}x backpropagation's FLOPs"

    def draw(on: Console) -> None:
        say(on, f"{plan.facts.get('net', '')}: {amount(plan.budget, plan.unit)} {plan.unit} of RAM{limit}")
        for sentence in answer(plan):
            say(on, sentence)
        if plan.fitting:
            on.print(_fitting(plan))
        if any(row.best is None for row in plan.rows):
            on.print(_others(plan))
        for line in (*_notes(plan), *_meanings(plan, device)):
            say(on, line)
        if plan.facts.get("code"):
            say(on, f"To run the first of them{plan.facts.get('weights', '')}:")
            on.print(f"\n{plan.facts['code']}", markup=False, highlight=False, soft_wrap=True)

    return draw


def _meanings(plan: Plan, device: Device) -> list[str]:
    """What the columns count."""
    engines = {row.option.engine for row in plan.rows}
    calibrated = "calibrated on the device" if device.calibration == "device" else "calibrated elsewhere"
    lines = [f"ranks from: {plan.facts.get('ranks', '')}"]
    if "library" in engines:
        lines.append(
            f"library: {COUNTED[device.count]}; optimiser {device.optimizer}; {WEIGHTS[device.weights]}; {calibrated}"
        )
    if "device" in engines:
        lines.append(f"device: {COUNTED['program']}; optimiser {device.optimizer}; calibrated elsewhere")
    if plan.macs_per_second:
        lines.append(
            f"estimated ms: an estimate, multiply-adds of the step (of one image of a device program) at "
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
        if row.note:
            kind = "not to be had" if row.best is None and row.next is None else "fidelity not predicted"
            notes.setdefault(f"{kind} ({row.note})", {})[row.option.name] = None
        missing = row.next.memory if row.best is None and row.next is not None else None
        if missing is not None and missing.training <= plan.budget < missing.calibration:
            notes.setdefault("would fit if calibrated elsewhere", {})[row.option.name] = None
    lines = [f"{note}: {', '.join(names)}" for note, names in notes.items()]
    lines += [f"{batch} left out: {reason}" for batch, reason in plan.skipped.items()]
    return [*lines, *filter(None, [plan.facts.get("remark", ""), plan.facts.get("device", "")])]


# ---- tables ----------------------------------------------------------------------------------


def _fitting(plan: Plan) -> Sheet:
    batches = sorted({batch for row in plan.fitting for batch in row.layers})
    columns = ["method and setting", "engine", "accuracy", "fidelity", "at least", "layers", "batch", "total", "step"]
    columns += ["factors", "weights", "calibration", "FLOPs/bp", "+1 layer"]
    columns += ["estimated ms"] if plan.macs_per_second else []
    columns += ["most layers at batch " + ", ".join(map(str, batches))]
    table = Sheet(f"What fits (memory in {plan.unit})", columns, left=2)
    for row in plan.fitting:
        best = row.best
        assert best is not None
        memory, of = best.memory, best.fidelity
        known = "-" if best.measured is None else f"{100 * best.measured.accuracy:.1f}"
        estimates = ("-", "-") if of is None else (fidelity(best), f"{of.least:.{SHOWN_DIGITS}f}")
        parts = (memory.total, memory.step, memory.factors, memory.weights, memory.calibration)
        most = ", ".join("-" if row.layers.get(batch) is None else str(row.layers[batch]) for batch in batches)
        table.add(
            row.option.name, row.option.engine, known, *estimates, str(best.layers), str(best.batch),
            *(amount(part, plan.unit) for part in parts), f"{float(best.times_bp):.3f}", missing(row, plan.unit),
            *([f"{1e3 * best.macs / plan.macs_per_second:,.1f}"] if plan.macs_per_second else []), most,
            style="green" if row is plan.rows[0] else "" if of or best.measured else "dim",
        )  # fmt: skip
    return table


def _others(plan: Plan) -> Sheet:
    columns = ["method and setting", "engine", "layers", "batch", "total", "too much by", "step", "factors", "weights"]
    columns += ["calibration", "FLOPs/bp"]
    table = Sheet(f"What does not fit: the least of each (memory in {plan.unit})", columns, left=2)
    for row in plan.rows:
        if row.best is not None:
            continue
        c = row.next
        if c is None:
            table.add(row.option.name, row.option.engine, *["-"] * 9)
            continue
        m = c.memory
        total, *parts = (amount(part, plan.unit) for part in (m.total, m.step, m.factors, m.weights, m.calibration))
        where = (row.option.engine, str(c.layers), str(c.batch), total, missing(row, plan.unit))
        table.add(row.option.name, *where, *parts, f"{float(c.times_bp):.3f}")
    return table


# ---- JSON and CSV ----------------------------------------------------------------------------


def to_json(plan: Plan, device: Device) -> dict[str, Any]:
    """Everything, for machines; sizes in bytes."""
    return {
        "schema": SCHEMA,
        "net": plan.facts.get("net", ""),
        "ranks_from": plan.facts.get("ranks", ""),
        "fidelity": MEANING.format(count=len(plan.paths), shares=plan.facts.get("shares", "")),
        "memory": COUNTED[device.count],
        "device": {"budget_bytes": plan.budget, **vars(device)},
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
        "batch": c.batch,
        "fidelity": None if of is None else of.estimate,
        "fidelity_at_least": None if of is None else of.least,
        "fidelity_at_most": None if of is None else of.most,
        "accuracy": None if c.measured is None else c.measured.accuracy,
        "accuracy_from": None if c.measured is None else c.measured.shown,
        **{f"{name}_bytes": getattr(m, name) for name in PARTS},
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
