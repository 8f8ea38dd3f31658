"""A plan as text, JSON and CSV."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from analysis.commands import console
from analysis.commands.console import Sheet, say
from analysis.planner.costs import Device
from analysis.planner.search import SHOWN_DIGITS, Candidate, Plan, Row

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
PARTS = ("step", "gradients", "optimizer_state", "factors", "weights", "calibration", "total")
KIB = 2**10
NAMED = 4
"""Methods beside the first whose settings the answer states; the table has all of them."""
MEANING = (
    "fidelity: an estimate of the largest cos² between the method's weight gradient and backpropagation's that steps "
    "scaled layer by layer can reach, over all {count} layers besides the head; a layer that does not train counts 0, "
    "one that trains exactly its share ({shares}), one that is compressed the share of the energy that its activation "
    "keeps. 'at least': what is certain of that energy on the images measured. It is about one step's gradient, "
    "not about accuracy."
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
    """Prints all of it to a rich console."""
    calibrated = "calibrated on the device" if device.calibration == "device" else "calibrated elsewhere"
    limit = "" if plan.flops_at_most is None else f", at most {float(plan.flops_at_most):g}x backpropagation's FLOPs"

    def draw(on: Console) -> None:
        say(on, f"{plan.facts.get('net', '')}: {_kib(plan.budget)} KiB of RAM{limit}")
        say(on, conclusion(plan))
        say(on, f"ranks from: {plan.facts.get('ranks', '')}")
        say(on, f"{COUNTED[device.count]}; optimiser {device.optimizer}; {WEIGHTS[device.weights]}; {calibrated}")
        say(on, MEANING.format(count=len(plan.paths), shares=plan.facts.get("shares", "")))
        if plan.fitting:
            on.print(_fitting(plan, device))
        if any(row.best is None for row in plan.rows):
            on.print(_others(plan, device))
        for line in (*_notes(plan), conclusion(plan)):
            say(on, line)

    return draw


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
    return [*lines, *filter(None, [plan.facts.get("remark", "")])]


def conclusion(plan: Plan) -> str:
    """The answer in a sentence."""
    if plan.fitting:
        first, *others = [row.best for row in plan.fitting if row.best is not None]
        total = f"{_kib(first.memory.total)} of {_kib(plan.budget)} KiB"
        found = f"First: {first.option.name}, {_what(first, plan)}: fidelity {_fidelity(first)}, {total}."
        return f"{found} {_alternatives(plan, first, others)}"
    closest = plan.closest
    if closest is None:
        return "Nothing fits, and there was nothing that could be tried."
    if not closest.over_bytes:
        much = f"{float(closest.times_bp):.3f}x backpropagation's FLOPs, too much work"
        return f"Nothing fits. Closest: {closest.option.name}, {_what(closest, plan)}: {much}."
    return (
        f"Nothing fits in {_kib(plan.budget)} KiB. Closest: {closest.option.name}, {_what(closest, plan)}: "
        f"{_kib(closest.memory.total)} KiB, {_kib(closest.over_bytes)} KiB too much{_where(closest)}."
        f" {plan.facts.get('smaller', '')}"
    ).rstrip()


def _alternatives(plan: Plan, first: Candidate, others: Sequence[Candidate]) -> str:
    """The other methods that fit, each with the setting that stands first in the table."""
    best: dict[str, Candidate] = {}
    for other in others:
        if other.option.method != first.option.method:
            best.setdefault(other.option.method, other)
    if not best:
        return "No other method fits."
    named = [
        f"{other.option.name} ({_what(other, plan)}, fidelity {_fidelity(other)}, {_kib(other.memory.total)} KiB)"
        for other in list(best.values())[:NAMED]
    ]
    more = f"; and {len(best) - NAMED} more" if len(best) > NAMED else ""
    return f"Other methods that fit: {'; '.join(named)}{more}."


def _fidelity(candidate: Candidate) -> str:
    return "not predicted" if candidate.fidelity is None else f"{candidate.fidelity.estimate:.{SHOWN_DIGITS}f}"


def _where(candidate: Candidate) -> str:
    if candidate.memory.calibration > candidate.memory.training:
        return " while it is calibrated"
    return f" ({candidate.memory.at})" if candidate.memory.at else ""


def _what(candidate: Candidate, plan: Plan) -> str:
    count = len(plan.paths)
    which = f"the last {candidate.layers} of {count} layers, " if candidate.layers else ""
    return f"{f'all {count} layers, ' if candidate.layers == count else which}batch {candidate.batch}"


# ---- tables ----------------------------------------------------------------------------------


def _fitting(plan: Plan, device: Device) -> Sheet:
    batches = list(plan.rows[0].layers)
    columns = ["method and setting", "fidelity", "at least", "layers", "batch", device.count, "factors", "weights"]
    columns += ["calibration", "total", "FLOPs/bp", "+1 layer", "most layers at batch " + ", ".join(map(str, batches))]
    table = Sheet("What fits (memory in KiB)", columns)
    for row in plan.fitting:
        best = row.best
        assert best is not None
        memory, of = best.memory, best.fidelity
        fidelity = ("-", "-") if of is None else (_fidelity(best), f"{of.least:.{SHOWN_DIGITS}f}")
        parts = (memory.step, memory.factors, memory.weights, memory.calibration, memory.total)
        most = ", ".join("-" if row.layers.get(batch) is None else str(row.layers[batch]) for batch in batches)
        table.add(
            row.option.name, *fidelity, str(best.layers), str(best.batch), *map(_kib, parts),
            f"{float(best.times_bp):.3f}", _missing(row.next), most,
            style="green" if row is plan.rows[0] else "" if of else "dim",
        )  # fmt: skip
    return table


def _others(plan: Plan, device: Device) -> Sheet:
    columns = ["method and setting", "layers", "batch", device.count, "factors", "weights", "calibration", "total"]
    columns += ["too much by", "FLOPs/bp"]
    table = Sheet("What does not fit: the least of each (memory in KiB)", columns)
    for row in plan.rows:
        if row.best is not None:
            continue
        c = row.next
        if c is None:
            table.add(row.option.name, *["-"] * 9)
            continue
        m = c.memory
        parts = map(_kib, (m.step, m.factors, m.weights, m.calibration, m.total))
        where = (str(c.layers), str(c.batch))
        table.add(row.option.name, *where, *parts, _missing(c), f"{float(c.times_bp):.3f}")
    return table


def _missing(candidate: Candidate | None) -> str:
    """What the candidate lacks: bytes, or work."""
    if candidate is None:
        return "-"
    if candidate.over_bytes:
        return f"{_kib(candidate.over_bytes)} KiB"
    return f"{float(candidate.times_bp):.2f}x FLOPs" if candidate.too_much_work else "-"


def _kib(nbytes: int) -> str:
    """In KiB with one digit, rounded up, so that what does not fit is never shown as fitting."""
    tenths = -(-10 * nbytes // KIB)
    return f"{tenths // 10:,}.{tenths % 10}"


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
        "answer": conclusion(plan),
        "skipped": dict(plan.skipped),
        "rows": [_row_json(row) for row in plan.rows],
        "closest": None if plan.closest is None else _candidate_json(plan.closest),
    }


def _row_json(row: Row) -> dict[str, Any]:
    return {
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
        "method": c.option.method,
        "setting": c.option.setting,
        "layers": c.layers,
        "batch": c.batch,
        "fidelity": None if of is None else of.estimate,
        "fidelity_at_least": None if of is None else of.least,
        "fidelity_at_most": None if of is None else of.most,
        **{f"{name}_bytes": getattr(m, name) for name in PARTS},
        "over_bytes": c.over_bytes,
        "flops_over_bp": float(c.times_bp),
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
